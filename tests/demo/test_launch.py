"""Local ranks: results in order, failures that name the rank, nothing left running."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from shardstep import launch
from shardstep.errors import CollectiveError, ConfigError
from shardstep.launch import run_local


def current_rank() -> int:
    return int(multiprocessing.current_process().name.removeprefix("rank "))


def describe(word: str) -> dict[str, object]:
    return {"rank": current_rank(), "word": word, "threads": torch.get_num_threads()}


def fail_on_rank_1() -> None:
    if current_rank() == 1:
        raise ValueError("the dog ate it")
    time.sleep(60)


def die_on_rank_1() -> None:
    if current_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    raise CollectiveError("a peer is gone")


def here() -> int:
    return os.getpid()


@pytest.fixture(autouse=True)
def _leaves_nothing_running() -> Iterator[None]:
    before = set(multiprocessing.active_children())  # the pool's workers, if other tests have asked for them
    yield
    assert set(multiprocessing.active_children()) <= before


def test_results_come_back_in_rank_order() -> None:
    assert run_local(describe, 2, "ok") == [{"rank": rank, "word": "ok", "threads": 1} for rank in (0, 1)]


def test_one_rank_runs_in_this_process_and_leaves_its_threads_alone() -> None:
    before = torch.get_num_threads()
    assert run_local(here, 1) == [os.getpid()]
    assert torch.get_num_threads() == before


def test_a_failure_names_the_rank_and_shows_its_traceback_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    with pytest.raises(CollectiveError, match=r"^rank 1 ended with ValueError: the dog ate it$"):
        run_local(fail_on_rank_1, 2)
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_silent_death_is_the_cause_whatever_the_others_say() -> None:
    with pytest.raises(CollectiveError, match=r"^rank 1 ended by signal SIGKILL"):
        run_local(die_on_rank_1, 2)


def test_no_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a world size of at least 1 .*, got 0"):
        run_local(here, 0)


def tunables() -> str | None:
    return os.environ.get("GLIBC_TUNABLES")


@pytest.mark.parametrize("mine", [None, "glibc.malloc.arena_max=2"])
def test_ranks_start_with_a_bounded_heap_unless_the_user_has_tuned_it(mine, monkeypatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if mine:
        monkeypatch.setenv("GLIBC_TUNABLES", mine)
    assert run_local(tunables, 2) == [mine or "glibc.malloc.tcache_count=0"] * 2
    assert tunables() == mine
