"""Ranks that use other units, or other parameters of one, than their peers at that time: no wait, the same bits."""

import gc
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardstep as ss
from shardstep.collectives import Group, neighbours
from shardstep.launch import run_local
from shardstep.sharding.loans import Loan
from tests.sharding.models import BF16

LEAVES, STEPS, WIDTH = 4, 3, 9
PATHS = [((0, 1, 2, 3), 0), ((3, 1), 3), ((2,), 1), ((1, 0, 3), 2)]
"""For each leaf: the blocks in the order of their use, and the one whose second matrix is left out."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, whole: bool) -> Tensor:
        y = x + torch.tanh(self.always(x))
        return y + self.sometimes(y) if whole else y


class Paths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, path: tuple[int, ...], left_out: int) -> Tensor:
        for index in path:
            x = self.blocks[index](x, index != left_out)
        return self.head(x).square().mean()


def batch(step: int, leaf: int) -> Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(LEAVES * step + leaf))


def digest_of_run(options: dict[str, Any]) -> str:
    torch.manual_seed(5)
    model = Paths()
    optimizer = ss.optim.AdamW(model.parameters(), lr=0.01)
    sharded = ss.shard(model, optimizer, **options)
    for step in range(STEPS):
        for leaf in range(sharded.rank, LEAVES, sharded.world_size):
            with torch.no_grad():
                model(batch(step, leaf), *PATHS[-1 - leaf])
            model(batch(step, leaf), *PATHS[leaf]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with ss.gathered(model), torch.no_grad():
            model.head.bias.mul_(0.5)
    assert sharded.traffic.sent_bytes > 0 or sharded.world_size == 1
    return ss.digest(model, optimizer)


def digests_of_runs(all_options: list[dict[str, Any]]) -> list[str]:
    return [digest_of_run(options) for options in all_options]


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("world_size", "machines"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_every_rank_its_own_units_in_its_own_order(ranks, world_size, machines, precision):
    common = {"precision": precision, "clip_norm": 0.5}
    expected = digest_of_run({"stage": 0, **common})
    runs = [{"stage": 3, "prefetch": prefetch, **common} for prefetch in (0, 1, 3)]
    runs.append({"stage": {"blocks.0": 2, "*": 3}, **common})
    runs += [{"stage": 3, "prefetch": prefetch, "debug": "collectives", **common} for prefetch in (0, 1)]
    for digests in ranks(world_size, machines).run(digests_of_runs, runs):
        assert digests == [expected] * len(runs)


def one_rank_goes_twice() -> str:
    """Between two announcements a loan is taken once; a second time all ranks have to gather together."""
    torch.manual_seed(5)
    model = Paths()
    optimizer = ss.optim.AdamW(model.parameters(), lr=0.01)
    ss.shard(model, optimizer, stage=3, prefetch=0)
    model(batch(0, 0), (0, 1, 0, 1), 2).backward()
    optimizer.step()
    return ss.digest(model, optimizer)


@pytest.mark.parametrize("machines", [1, 2])
def test_a_module_that_is_used_twice(ranks, machines):
    (expected,) = ranks(1).run(one_rank_goes_twice)
    assert ranks(2, machines).run(one_rank_goes_twice) == [expected] * 2


def loans_of_the_moment() -> tuple[float, float]:
    """What is taken are the values when it is taken, and a rank may take while the other does nothing."""
    group = Group()
    shard, first = torch.full((5,), float(group.rank)), 0
    group.reserve_tags(1)
    loan = group.lend(shard, 1 - group.rank, tag=first, label="loan")
    shard += 10
    group.exchange_json("both have written", label="meeting")
    flat = torch.empty(10)
    if group.rank == 0:
        group.take(flat, shard, [], tag=first, label="taking").wait()
    group.exchange_json("rank 0 has read", label="meeting")
    if group.rank == 1:
        loan.wait()
        group.take(flat, shard, [], tag=first, label="taking").wait()
    else:
        loan.wait()
    return float(flat[0]), float(flat[-1])


def test_what_is_taken_are_the_values_of_that_time(ranks):
    assert ranks(2, machines=2).run(loans_of_the_moment) == [(10.0, 11.0)] * 2


def slow_reader(slow_rank: int | None) -> tuple[str, list[float]]:
    """Whoever writes into shards must wait for this rank, which always takes them late; and it for slow writers."""
    torch.manual_seed(5)
    model = Paths()
    optimizer = ss.optim.AdamW(model.parameters(), lr=0.01)
    sharded = ss.shard(model, optimizer, stage=3, prefetch=1)
    average = ss.Average(model, decay=0.5)
    patched, seen = pytest.MonkeyPatch(), list[float]()
    if sharded.rank == slow_rank:
        take = Loan.take
        patched.setattr(Loan, "take", lambda *args: time.sleep(0.02) or take(*args))
    for step in range(2):
        for leaf in range(sharded.rank, LEAVES, sharded.world_size):
            model(batch(step, leaf), *PATHS[leaf]).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        with ss.gathered(model), torch.no_grad():
            seen.append(float(sum(parameter.double().sum() for parameter in model.parameters())))
            for parameter in model.parameters():
                parameter.mul_(0.5)
    with average.applied(), torch.no_grad():
        seen.append(float(model(batch(0, 0), *PATHS[0])))
    with torch.no_grad():
        seen.append(float(model(batch(0, 0), *PATHS[0])))
    patched.undo()
    return ss.digest(model, optimizer), seen


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_nobody_writes_while_a_slow_rank_is_reading(ranks, slow_rank, machines):
    (expected,) = ranks(1).run(slow_reader, None)
    assert ranks(2, machines).run(slow_reader, slow_rank) == [expected] * 2


class Late(nn.Module):
    """A forward that takes rank 1 longer."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.15 * (dist.is_initialized() and dist.get_rank() == 1))
        return self.inside(x)


def last_evaluation(machines: int) -> float:
    """At its end a rank lets go of the model, while the other is still using it."""
    if dist.is_initialized():
        neighbours._machine = lambda: 1 + dist.get_rank() * machines // 2  # as conftest has it in its own ranks
    torch.manual_seed(0)
    model = nn.Sequential(*(Late() for _ in range(3)))
    optimizer = ss.optim.AdamW(model.parameters(), lr=0.1)
    ss.shard(model, optimizer, stage=3, units="[0-9]", prefetch=0)
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        return float(model(torch.ones(2, 7)).sum())


@pytest.mark.parametrize("machines", [1, 2])
def test_a_rank_that_has_ended_stays_while_others_use_its_shards(ranks, machines):
    wanted = last_evaluation(machines)
    assert run_local(last_evaluation, 2, machines) == [wanted] * 2


def lent_afterwards(machines: int) -> tuple[float, list[int], dict[int, Any]]:
    result, watch, lent = last_evaluation(machines), Group()._watch, list[int]()
    gc.collect()
    for _ in range(100):
        lent.append(len(watch._lent))
        if not lent[-1]:
            break
        time.sleep(0.02)
    return result, lent, watch._let_go


@pytest.mark.parametrize("machines", [1, 2])
def test_what_is_lent_outlives_the_model_until_all_ranks_have_let_go_of_it(ranks, machines):
    wanted = last_evaluation(machines)
    ranks(2, machines).run(gc.collect)
    (result, lent, left), (_, _, left_on_1) = ranks(2, machines).run(lent_afterwards, machines)
    assert result == wanted
    assert lent[0]
    assert not lent[-1]
    assert left == left_on_1 == {}
