"""`overlap_param_gather`: step() leaves parameters on their way, and nobody ever sees them half arrived.

Rank 1 is slow to publish the last unit; so on rank 0 whatever does not wait sees old values of its part.
"""

import copy
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import shardstep as ss
from shardstep.errors import CollectiveError
from shardstep.launch import run_local
from shardstep.sharding import step as step_module
from shardstep.sharding.access import Access
from shardstep.sharding.arriving import ArrivingParameter
from shardstep.sharding.space import Space
from tests.conftest import RankFailed
from tests.sharding import test_disagreement
from tests.sharding.test_disagreement import quick
from tests.sharding.test_skipping import LEAVES, Paths, batch

WIDTH = 48
SECONDS = 5.0


class Run:
    """Three units, each with a part on either of two ranks, and steps on demand."""

    def __init__(self, make: Callable[..., Any] = ss.optim.AdamW, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        self.optimizer = make(self.model.parameters(), lr=0.1)
        self.sharded = ss.shard(self.model, self.optimizer, units="[0-9]", **options)
        self.x = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)

    def backward(self) -> None:
        self.model(self.x).square().mean().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def last(self) -> nn.Parameter:
        return self.model[2].weight

    def arriving(self) -> list[str]:
        return [unit.name for unit in self.sharded._units if any(space.is_arriving for space in unit.spaces)]


@contextmanager
def slow_rank_1(run: Run, act: Callable[[], None]) -> Iterator[None]:
    """Inside, rank 1 does ``act`` before it publishes unit '2'."""
    publish = Space.publish

    def slowly(space: Space, phase: str, **options: Any) -> Any:
        if space.unit_name == "2" and run.sharded.rank == 1 and phase.startswith("publishing step"):
            act()
        return publish(space, phase, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Space, "publish", slowly)
        yield


# - step() does not wait, the units do


def timed_step(stage: int, overlaps: bool) -> tuple[float, list[list[str]], bool]:
    """Seconds of a step; the units on their way after it, after a forward of unit '0' and of all; types of '2'."""
    run = Run(stage=stage, overlap_param_gather=overlaps)
    run.model[0].register_forward_pre_hook(_expect_whole)  # runs after the engine's
    run.step()
    run.backward()
    with slow_rank_1(run, lambda: time.sleep(0.6)):
        begin = time.monotonic()
        run.optimizer.step()
        seconds = time.monotonic() - begin
    arriving = [run.arriving()]
    with torch.no_grad():
        run.model[0](run.x)
        arriving.append(run.arriving())
        is_arriving = isinstance(run.last, ArrivingParameter)
        run.model(run.x)
        arriving.append(run.arriving())
    assert not isinstance(run.last, ArrivingParameter)
    return seconds, arriving, is_arriving


def _expect_whole(module: nn.Module, _: Any) -> None:
    assert type(module.weight) is nn.Parameter


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_does_not_wait_for_a_slow_rank_and_each_unit_waits_for_its_own(ranks, stage):
    fast, slow = ranks(2).run(timed_step, stage, True)
    assert fast[0] < 0.4
    assert slow[0] >= 0.6
    for _, arriving, is_arriving in (fast, slow):
        assert arriving == [["0", "1", "2"], ["1", "2"], []]
        assert is_arriving


@pytest.mark.parametrize("stage", [1, 3])
def test_without_it_or_at_other_stages_nothing_is_left_on_its_way(ranks, stage):
    fast, _ = ranks(2).run(timed_step, stage, stage == 3)
    assert fast[1:] == ([[], [], []], False)
    assert (fast[0] >= 0.5) == (stage == 1)


# - whoever reads or writes


def written(run: Run) -> Tensor:
    with torch.no_grad():
        return run.last.mul_(0.5).clone()


def loaded(module: nn.Module, run: Run) -> Tensor:
    module.load_state_dict({name: values * 0.5 for name, values in module.state_dict().items()})
    return run.last.detach().clone()


def in_gathered(run: Run) -> Tensor:
    with ss.gathered(run.model), torch.no_grad():
        return run.last.add_(0.25).clone()


def set_by_name(run: Run) -> Tensor:
    run.sharded.set_full_param("2.weight", torch.full((WIDTH, WIDTH), 0.125))
    return run.last.detach().clone()


def averaged(run: Run) -> Tensor:
    average = ss.Average(run.model, decay=0.5)
    average.update()
    run.step()
    with average.applied(), torch.no_grad():
        inside = run.model(run.x)
    return torch.cat([inside.flatten(), run.last.detach().flatten()])


def evaluated(run: Run) -> Tensor:
    with torch.no_grad():
        return run.model(run.x)


def stored(run: Run) -> Tensor:
    return torch.empty(0).set_(run.last.untyped_storage()).clone()


def saved_and_loaded(run: Run) -> Tensor:
    file = io.BytesIO()
    torch.save(run.last, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


KINDS: dict[str, Callable[[Run], Tensor | str]] = {
    "detach": lambda run: run.last.detach().clone(),
    "data": lambda run: run.last.data.clone(),
    "arithmetic": lambda run: run.last + 1,
    "two units": lambda run: torch.stack([run.model[1].weight, run.last]),
    "item": lambda run: str(run.last[-1, -1].item()),
    "list": lambda run: str(run.last.tolist()),
    "repr": lambda run: repr(run.last),
    "deepcopy": lambda run: copy.deepcopy(run.last),
    "file": saved_and_loaded,
    "storage": stored,
    "vector": lambda run: parameters_to_vector(run.model.parameters()),
    "write": written,
    "state_dict": lambda run: run.model.state_dict()["2.weight"],
    "state_dict of a part": lambda run: run.model[2].state_dict()["weight"].clone(),
    "load_state_dict": lambda run: loaded(run.model, run),
    "load_state_dict of a part": lambda run: loaded(run.model[2], run),
    "gathered": in_gathered,
    "digest": lambda run: ss.digest(run.model, run.optimizer),
    "full_param": lambda run: run.sharded.full_param("2.weight"),
    "set_full_param": set_by_name,
    "state": lambda run: run.optimizer.state_dict()["state"][4]["exp_avg"],
    "average": averaged,
    "evaluation": evaluated,
    "evaluation of a part": lambda run: run.model[2](run.x.to(run.last.dtype)).detach(),
}


def read_after_steps(stage: int, precision: ss.Precision | None, overlaps: bool) -> list[tuple[str, str]]:
    """What each kind of reading gives right after a step, and the digest at the end."""
    run = Run(stage=stage, precision=precision, overlap_param_gather=overlaps)
    found = []
    with slow_rank_1(run, lambda: time.sleep(0.03)):
        for kind, read in KINDS.items():
            run.step()
            value = read(run)
            if isinstance(value, Tensor):
                value = hashlib.sha256(value.detach().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
            found.append((kind, value))
        run.step()
    return [*found, ("at the end", ss.digest(run.model, run.optimizer))]


BF16 = ss.Precision(params=torch.bfloat16, reduce=torch.float32)


@pytest.mark.parametrize(("world_size", "stage", "precision"), [(1, 1, None), (2, 1, None), (2, 2, BF16)])
def test_whoever_reads_or_writes_right_after_a_step_has_the_new_values(ranks, world_size, stage, precision):
    wanted = ranks(world_size).run(read_after_steps, stage, precision, False)
    assert ranks(world_size).run(read_after_steps, stage, precision, True) == wanted
    assert all(rows == wanted[0] for rows in wanted)


def kept_apart() -> tuple[bool, ...]:
    """What needs no values does not wait."""
    run = Run(stage=1, overlap_param_gather=True)
    run.step()
    weight = run.last
    assert weight.shape == (WIDTH, WIDTH)
    assert weight.numel() == WIDTH * WIDTH
    assert weight.grad is None
    assert weight.requires_grad
    assert list(run.model.named_parameters())[4][1] is weight
    before = isinstance(weight, ArrivingParameter)
    weight.sum()
    return before, type(weight) is nn.Parameter, isinstance(run.model[1].weight, ArrivingParameter)


def test_what_needs_no_values_waits_for_nothing(ranks):
    assert ranks(2).run(kept_apart) == [(True, True, True)] * 2


# - what is not used before it is updated again


@contextmanager
def no_early_segment() -> Iterator[None]:
    """Inside, no shard is handed out for updating that has not arrived everywhere."""
    segment_of, early = step_module.segment_of, []

    def watched(space: Space, *arguments: Any) -> Any:
        early.extend([space.unit_name] if space.is_arriving else [])
        return segment_of(space, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step_module, "segment_of", watched)
        yield
    assert not early


def digest_of_paths(overlaps: bool) -> str:
    """Rank 0 leaves out unit '1', and updates its part of it; so does rank 1 with unit '0'."""
    torch.manual_seed(5)
    model = Paths()
    optimizer = ss.optim.AdamW(model.parameters(), lr=0.01)
    sharded = ss.shard(model, optimizer, stage=1, overlap_param_gather=overlaps)
    left = 0
    with no_early_segment():
        for step in range(3):
            for leaf in range(sharded.rank, LEAVES, sharded.world_size):
                model(batch(step, leaf), (leaf % 2,), 3).backward()
            left += sum(unit.is_freed for unit in sharded._units)
            optimizer.step()
            optimizer.zero_grad()
    assert (left > 0) == overlaps
    return ss.digest(model, optimizer)


def test_a_shard_is_not_updated_while_peers_take_it(ranks):
    wanted = digest_of_paths(False)
    assert ranks(2).run(digest_of_paths, True) == [wanted] * 2


def writers_that_wait() -> list[list[str]]:
    """The units on their way when averages change places with parameters, and when new values are written by name."""
    run = Run(stage=1, overlap_param_gather=True)
    average = ss.Average(run.model, decay=0.5)
    arriving = []

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def first(*arguments: Any) -> Any:
            arriving.append(run.arriving())
            return call(*arguments)

        return first

    with pytest.MonkeyPatch.context() as patched:
        for owner, name in ((Space, "exchange"), (Access, "_from_rank_0")):
            patched.setattr(owner, name, watched(getattr(owner, name)))
        run.step()
        average.update()
        with average.applied():
            pass
        run.step()
        run.sharded.set_full_param("1.weight", torch.ones(WIDTH, WIDTH))
        run.sharded.full_param("0.weight")
        arriving.append(run.arriving())
    return arriving


def test_nobody_else_writes_what_peers_take(ranks):
    for arriving in ranks(2).run(writers_that_wait):
        assert arriving == [[]] * 6 + [["0", "2"], ["2"]]


def moved_between_steps(overlaps: bool) -> str:
    """An optimizer that moves its parameters between steps, right after one."""
    run = Run(stage=1, overlap_param_gather=overlaps, make=ss.optim.AdamWScheduleFree)
    with no_early_segment(), slow_rank_1(run, lambda: time.sleep(0.03)):
        for _ in range(3):
            run.optimizer.train()
            run.step()
            run.optimizer.eval()
    return ss.digest(run.model, run.optimizer)


def test_an_optimizer_that_moves_parameters_between_steps(ranks):
    assert ranks(2).run(moved_between_steps, True) == [moved_between_steps(False)] * 2


# - a rank that is lost on the way


def raised_on_the_way() -> tuple[str, str, float]:
    """Rank 1 raises before it has published unit '2' in step 1; rank 0 has made its step by then."""
    publish = Space.publish

    def boom(space: Space, phase: str, **options: Any) -> Any:
        if space.unit_name == "2":
            time.sleep(0.2)
            raise ValueError("bad shard")
        return publish(space, phase, **options)

    with quick(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(Space, "publish", publish)  # to be put back
        run = test_disagreement.Run(stage=1, overlap_param_gather=True)
        return run.end(lambda: run.steps(lambda: patched.setattr(Space, "publish", boom)))


def test_a_rank_that_raises_while_parameters_are_on_their_way(ranks):
    other, raised = ranks(2).run(raised_on_the_way)
    assert raised[:2] == ("ValueError", "bad shard")
    assert other[0] == "CollectiveError"
    sentence = (
        r"rank 1: ValueError: bad shard \(step 1, optimizer\.step\(\)\); rank 0 of 2 was in the gather of unit '2'"
    )
    assert re.match(sentence, other[1]), other
    assert other[2] < SECONDS


def end_after_a_step() -> None:
    """Rank 0 ends when its step is done; rank 1 is slow to begin to publish, and evaluates what it has got."""
    run = Run(stage=1, overlap_param_gather=True)
    run.backward()
    publish = Space.publish
    with pytest.MonkeyPatch.context() as patched:
        if run.sharded.rank == 1:
            patched.setattr(Space, "publish", lambda *args, **kw: time.sleep(0.5) or publish(*args, **kw))
        run.optimizer.step()
    if run.sharded.rank == 1:
        with torch.no_grad():
            run.model(run.x)


def test_a_rank_whose_training_ends_leaves_when_its_peers_have_its_parameters():
    run_local(end_after_a_step, 2)


def died_on_the_way() -> None:
    """Rank 1 dies before it has published unit '2' in step 1; rank 0 has made its step by then."""
    run = Run(stage=1, overlap_param_gather=True)

    def die() -> None:
        time.sleep(0.3)
        os._exit(7)

    run.step()
    begin = time.monotonic()
    with slow_rank_1(run, die):
        run.step()
    try:
        run.backward()
    except CollectiveError:
        for read in (run.last.sum, run.last.clone, lambda: run.model[2](run.x)):
            with pytest.raises(CollectiveError, match=r"rank 1 died.* for publishing step 1"):
                read()
        assert isinstance(run.last, ArrivingParameter)
        raise
    finally:
        assert time.monotonic() - begin < SECONDS


def test_a_rank_that_dies_while_parameters_are_on_their_way(ranks):
    with pytest.raises(RankFailed) as failed:
        ranks(2).run(died_on_the_way)
    survivor, dead = failed.value.failures
    assert dead[0] == "died"
    assert survivor[0] == "CollectiveError", failed.value
    sentence = r"rank 1 died: .*; rank 0 of 2 was in the gather of unit '[012]' for publishing step 1"
    assert re.match(sentence, survivor[1]), survivor
