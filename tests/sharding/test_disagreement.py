"""Ranks that do different things, raise, die, are stuck or leave: all of them end soon, and say why.

Each run has a process group of its own, so that the warm ranks survive it.
"""

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardstep as ss
from shardstep.collectives import Group, Pending, ends, heard, watch
from shardstep.errors import CollectiveError
from shardstep.launch import run_local

TIMEOUT_S = 8.0
SECONDS = 5.0
FAULTY_STEP = 1
ROOT = Path(__file__).parents[2]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.inside: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self.linear(x)) * 1.0


class Run:
    """Three steps of three equal units, with a fault in step 1 on rank 1; what this rank raised, and when."""

    def __init__(self, timeout_s: float = TIMEOUT_S, **options: Any) -> None:
        self.group = dist.new_group(timeout=timedelta(seconds=timeout_s))
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Block() for _ in range(3)))
        self.optimizer = ss.optim.AdamW(self.model.parameters(), lr=0.1)
        self.sharded = ss.shard(self.model, self.optimizer, units="[0-9]", group=self.group, **options)
        self.faulty = self.sharded.rank == 1
        self.door: Group = self.sharded._group

    def steps(self, before: Callable[[], None], backward: Callable[[Tensor], None] = Tensor.backward) -> None:
        for step in range(3):
            if step == FAULTY_STEP:
                self.begin = time.monotonic()
                if self.faulty:
                    before()
            backward(self.model(torch.ones(2, 8)).sum())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def end(self, call: Callable[[], None], tell: bool = True) -> tuple[str, str, float]:
        """``tell``: let the others know of an exception, as happens where it ends a rank."""
        try:
            call()
        except Exception as error:
            if tell:
                self.door._watch.tell_failure(error)
            ended = type(error).__name__, str(error), time.monotonic() - self.begin
        else:
            ended = "nothing", ss.digest(self.model, self.optimizer), 0.0
        if not tell and ended[0] == "ValueError":
            time.sleep(3)  # it was caught, and the rank does something else
        ends.WATCHES.remove(self.door._watch)
        self.door._watch.close()
        return ended


@contextmanager
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watch, "STALL_S", 0.3)
        patched.setattr(heard, "STALL_S", 0.3)
        patched.setattr(heard, "RAISED_S", 0.5)
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_groups_are_left(ranks) -> Iterator[None]:
    """Their threads would go on; and torch takes a name twice when one has been destroyed."""
    yield
    for machines in (1, 2):
        ranks(2, machines).stop()


# - different collectives


class Fault:
    """Wraps the door of one rank, and does something wrong at the n-th collective from now on."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.left = kind, number
        for name in ("exchange", "all_gather", "all_gather_small"):
            setattr(Group, name, self._wrapped(getattr(Group, name), name == "all_gather_small"))

    def _wrapped(self, call: Callable[..., Any], small: bool) -> Callable[..., Any]:
        def wrapped(group: Group, *tensors: Any, **names: Any) -> Any:
            self.left -= 1
            if self.left != -1:
                return call(group, *tensors, **names)
            if self.kind == "skipped":
                return torch.stack([tensors[0]] * group.size) if small else Pending((), names["label"], group)
            if self.kind == "twice":
                call(group, *tensors, **names).wait()
            elif self.kind == "size":
                tensors = tuple(map(_half, tensors))
            elif self.kind == "dtype":
                tensors = tuple(map(_as_int32, tensors))
            return call(group, *tensors, **names)

        return wrapped


def _half(tensor: Any) -> Any:
    if isinstance(tensor, list):
        return list(map(_half, tensor))
    return None if tensor is None else tensor[: tensor.numel() // 2]


def _as_int32(tensor: Any) -> Any:
    if isinstance(tensor, list):
        return list(map(_as_int32, tensor))
    return None if tensor is None else tensor.view(torch.int32)


def at_the_nth_collective(kind: str, number: int, debug: str | None) -> tuple[str, str, float]:
    with quick(), pytest.MonkeyPatch.context() as patched:
        for name in ("exchange", "all_gather", "all_gather_small"):
            patched.setattr(Group, name, getattr(Group, name))  # to be put back
        run = Run(stage=1, clip_norm=1.0, debug=debug)
        return run.end(lambda: run.steps(lambda: Fault(kind, number) and None))


FAULTS = [
    ("skipped", 0, "exchange of the gradients of unit '2' in step 1"),
    ("skipped", 3, "gather of block norms in step 1"),
    ("skipped", 6, "gather of unit '2' for publishing step 1"),
    ("twice", 1, "exchange of the gradients of unit '1' in step 1"),
    ("size", 2, r"exchange of the gradients of unit '0' in step 1 \(4,096 bytes of float32\)"),
    ("size", 3, "gather of block norms"),
    ("size", 5, r"publishing step 1 \(4,096 bytes of float32\)"),
    ("dtype", 0, r"exchange of the gradients of unit '2' in step 1 \(8,192 bytes of int32\)"),
    ("dtype", 4, r"gather of unit '0' for publishing step 1 \(8,192 bytes of int32\)"),
]


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize(("kind", "number", "named"), FAULTS)
def test_a_collective_that_differs_is_named_on_all_ranks(ranks, kind, number, named, machines):
    for name, text, seconds in ranks(2, machines).run(at_the_nth_collective, kind, number, None):
        assert name == "RankMismatchError", text
        assert re.search(r"as number \d+ since shard\(\), rank 0 ran the .*, but rank 1 ran the ", text)
        assert re.search(named, text), text
        assert seconds < SECONDS


@pytest.mark.parametrize(("kind", "number", "named"), [FAULTS[1], FAULTS[5], FAULTS[7]])
def test_with_debug_at_the_very_call(ranks, kind, number, named):
    for name, text, seconds in ranks(2).run(at_the_nth_collective, kind, number, "collectives"):
        assert name == "RankMismatchError", text
        assert re.search(named, text), text
        assert seconds < SECONDS


def in_swapped_order() -> tuple[str, str, float]:
    with quick():
        run = Run(stage=2)
        return run.end(lambda: run.steps(lambda: run.sharded._gradients._turns.reverse()))


def test_equal_collectives_in_swapped_order(ranks):
    for name, text, seconds in ranks(2).run(in_swapped_order):
        assert name == "RankMismatchError"
        assert "rank 0 ran the exchange of the gradients of unit '2' in step 1 (8,192 bytes of float32)" in text
        assert "but rank 1 ran the exchange of the gradients of unit '0' in step 1 (8,192 bytes of float32)" in text
        assert seconds < SECONDS


def without_a_step() -> tuple[str, str, float]:
    with quick():
        run = Run(stage=3)
        return run.end(lambda: run.steps(lambda: setattr(run.optimizer, "step", lambda: None)))


def test_a_skipped_step(ranks):
    for name, text, seconds in ranks(2).run(without_a_step):
        assert name in ("RankMismatchError", "SequenceError")
        if name == "RankMismatchError":
            assert "rank 0 calls optimizer.step()" in text
        assert seconds < SECONDS


def with_collectives_of_ones_own() -> tuple[str, str, float]:
    """Rank 0 begins a broadcast and a message of its own before a step of ours, rank 1 takes them after it."""
    run = Run(stage=1, clip_norm=1.0)
    sent, got = torch.full((2, 3), 7.0), torch.zeros(2, 3)
    works = []
    if not run.faulty:
        works = [dist.broadcast(sent[0], 0, run.group, async_op=True), dist.isend(sent[1], 1, run.group)]
    run.begin = time.monotonic()
    run.steps(lambda: None)
    if run.faulty:
        dist.broadcast(got[0], 0, run.group)
        dist.recv(got[1], 0, run.group)
        assert torch.equal(got, sent)
    for work in works:
        work.wait()
    return run.end(lambda: None)


def test_collectives_of_ones_own_on_the_same_group_are_not_taken_for_ours(ranks):
    first, second = ranks(2).run(with_collectives_of_ones_own)
    assert first == second
    assert first[0] == "nothing", first


def test_debug_has_one_value():
    model = nn.Linear(2, 2)
    with pytest.raises(ss.ConfigError, match=r"expected debug to be 'collectives' or None, got 'all'"):
        ss.shard(model, ss.optim.AdamW(model.parameters()), debug="all")


# - a rank that raises


def boom(*_: Any) -> Any:
    raise ValueError("bad batch")


def raising(where: str, stage: int, tell: bool) -> tuple[str, str, float]:
    with quick():
        run = Run(stage=stage)

        def before() -> None:
            if where == "loader":
                boom()
            elif where == "forward":
                run.model[1].inside = boom
            elif where == "backward":
                run.model[1].inside = lambda x: x.register_hook(boom) and x
            elif where == "step":
                run.optimizer.check_update = boom

        return run.end(lambda: run.steps(before), tell)


RAISES = {
    "loader": r"step 1, before its first forward",
    "forward": r"step 1, forward of unit '1'",
    "backward": r"step 1, backward of unit '1'",
    "step": r"step 1, optimizer\.step\(\)",
}


@pytest.mark.parametrize(("stage", "machines"), [(0, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("where", RAISES)
def test_a_rank_that_raises_tells_the_others(ranks, where, stage, machines):
    other, raised = ranks(2, machines).run(raising, where, stage, True)
    assert raised[:2] == ("ValueError", "bad batch")
    assert other[0] == "CollectiveError"
    assert re.match(rf"rank 1: ValueError: bad batch \({RAISES[where]}\); rank 0 of 2 was in the ", other[1]), other
    assert other[2] < SECONDS


def test_an_exception_that_leaves_a_forward_is_told_even_if_it_is_caught(ranks):
    other, raised = ranks(2).run(raising, "forward", 3, False)
    assert raised[:2] == ("ValueError", "bad batch")
    assert re.match(r"rank 1: ValueError: bad batch \(step 1, forward of unit '1'\)", other[1]), other
    assert 0.5 < other[2] < SECONDS


def caught_and_gone_on() -> tuple[str, str, float]:
    """Both ranks catch what a forward raises; rank 1 takes its time."""
    with quick():
        run = Run(stage=3)
        run.begin = time.monotonic()
        inside, run.model[1].inside = run.model[1].inside, boom
        with suppress(ValueError):
            run.model(torch.ones(2, 8))
        run.model[1].inside = inside
        run.optimizer.zero_grad()
        time.sleep(1.2 if run.faulty else 0)
        return run.end(lambda: run.steps(lambda: None))


def test_an_exception_that_all_ranks_catch_ends_nothing(ranks):
    first, second = ranks(2).run(caught_and_gone_on)
    assert first == second
    assert first[0] == "nothing", first


def raise_on_rank_1() -> None:
    model = nn.Linear(4, 4)
    sharded = ss.shard(model, ss.optim.AdamW(model.parameters()), stage=3)
    if sharded.rank == 1:
        raise KeyError("batch 7")
    model(torch.ones(1, 4)).sum().backward()


def test_run_local_still_names_the_true_cause() -> None:
    with pytest.raises(CollectiveError, match=r"^rank 1 ended with KeyError: 'batch 7'$"):
        run_local(raise_on_rank_1, 2)


SCRIPT = """
import sys
from tests.sharding.test_disagreement import raise_on_rank_1
from shardstep.collectives import connect_local
connect_local(int(sys.argv[1]), 2, sys.argv[2])
raise_on_rank_1()
"""


def test_an_uncaught_exception_ends_both_processes(tmp_path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    pipes: dict[str, Any] = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], **pipes) for rank in range(2)]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "CollectiveError: rank 1: KeyError: 'batch 7' (step 0, " in errors[0]
    assert errors[1].strip().endswith("KeyError: 'batch 7'")


# - a rank that is stuck, or leaves


def stuck() -> tuple[tuple[str, str, float], list[tuple[float, str]]]:
    """Rank 1 sleeps in the forward of a unit, for longer than the timeout."""
    warned = list[tuple[float, str]]()
    run = Run(timeout_s=3.0, stage=3)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append((time.monotonic() - run.begin, record.getMessage()))

    handler = Handler()
    logging.getLogger("shardstep").addHandler(handler)

    def before() -> None:
        run.model[1].inside = lambda x: time.sleep(4.5) or x

    ended = run.end(lambda: run.steps(before))
    logging.getLogger("shardstep").removeHandler(handler)
    return ended, warned


@pytest.mark.parametrize("machines", [1, 2])
def test_a_stuck_rank_is_named_at_half_the_timeout_and_the_job_ends_at_the_timeout(ranks, machines):
    (waiting, warned), (sleeper, told) = ranks(2, machines).run(stuck)
    sentence = r"rank 1 has not arrived in the .* for \d s: it is in step 1, forward of unit '1' since \d s"
    for lines in (warned, told):
        at, text = lines[0]
        assert 1.5 <= at < 2.7
        assert re.match(sentence, text), text
    assert waiting[0] == "CollectiveError"
    assert re.match(sentence, waiting[1]), waiting
    assert waiting[2] < 4.0
    assert sleeper[0] == "CollectiveError"
    assert re.match(sentence, sleeper[1]), sleeper
    assert sleeper[2] < 4.5 + SECONDS


def left_early() -> tuple[str, str, float]:
    with quick():
        run = Run(stage=3)
        return run.end(lambda: run.steps(lambda: run.door._watch.close() or boom()), tell=False)


def test_a_rank_that_ends_its_training_early_is_named(ranks):
    other, _ = ranks(2).run(left_early)
    assert other[0] == "CollectiveError"
    assert other[1].startswith("rank 1 has ended its training (step 1, before its first forward); rank 0 of 2 was in")
    assert other[2] < SECONDS
