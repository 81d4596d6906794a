"""Small neighbouring blocks that are gathered and sent together: the bits, names and bytes of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.sharding import units
from tests.sharding.models import BF16, Tied, Tokens, train
from tests.sharding.test_bytes import Counted, counted_run
from tests.sharding.test_skipping import digest_of_run as digest_of_any_order

MIXED = {"blocks.0": 3, "blocks.3": 1, "blocks.*": 2, "": 0}
JOINED = ["", "blocks.0 to blocks.1", "blocks.2 to blocks.3"]


class Deep(Tied):
    def __init__(self) -> None:
        super().__init__(blocks=4)


@contextmanager
def joining(small_numel: int) -> Iterator[None]:
    before, units.SMALL_NUMEL = units.SMALL_NUMEL, small_numel
    try:
        yield
    finally:
        units.SMALL_NUMEL = before


def run(small_numel: int, options: dict[str, Any]) -> tuple[str, list[str]]:
    with joining(small_numel):
        model, optimizer, sharded = train(Deep, Tokens(), clip_norm=0.05, **options)
    return ss.digest(model, optimizer), list(sharded.stages)


def runs(small_numel: int, every: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [run(small_numel, options) for options in every]


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_units_apart_and_joined_give_the_same_bits(ranks, world_size, precision):
    wanted, apart = run(0, {"stage": 0, "precision": precision})
    assert len(apart) == 5
    every = [{"stage": stage, "precision": precision, "prefetch": 1} for stage in (0, 1, 2, 3, MIXED)]
    for small_numel in (2 * (2048 + 1024), 1 << 20):
        for found in ranks(world_size).run(runs, small_numel, every):
            assert [digest for digest, _ in found] == [wanted] * len(every)


def test_neighbours_are_joined_up_to_a_number_of_elements_and_within_one_stage():
    numel = 2048 + 1024  # of a block, trained and frozen, in whole blocks of the layout
    assert run(2 * numel, {"stage": 3})[1] == JOINED
    assert run(2 * numel - 1, {"stage": 3})[1] == ["", *(f"blocks.{n}" for n in range(4))]
    assert run(1 << 20, {"stage": 3})[1] == ["", "blocks.0 to blocks.3"]
    assert run(1 << 20, {"stage": MIXED})[1] == ["", "blocks.0", "blocks.1 to blocks.2", "blocks.3"]
    assert run(1 << 20, {"stage": 3, "units": ["blocks.*"]})[1] == ["", *(f"blocks.{n}" for n in range(4))]


def any_order(small_numel: int) -> str:
    with joining(small_numel):
        return digest_of_any_order({"stage": 3, "clip_norm": 0.05})


def test_ranks_use_joined_blocks_in_any_order_and_leave_some_out(ranks):
    assert set(ranks(2).run(any_order, 1 << 20)) == {any_order(0)}


def fewer_messages(small_numel: int) -> tuple[int, bool]:
    with joining(small_numel):
        model, _, sharded = train(Deep, Tokens(), stage=3, prefetch=0)
    with torch.no_grad():
        model(torch.zeros(2, 9, dtype=torch.long))
    freed = all(parameter.untyped_storage().nbytes() == 0 for parameter in model.parameters())
    return sharded.traffic.calls, freed


def test_joined_units_need_fewer_messages_and_are_freed(ranks):
    (apart, freed_apart), (joined, freed_joined) = (ranks(2).run(fewer_messages, numel)[0] for numel in (0, 1 << 20))
    assert joined < apart / 2
    assert (freed_apart, freed_joined) == (True, True)


def counted(stage: Any, own_leaves: int) -> Counted:
    with joining(1 << 13):
        return counted_run(own_leaves, {"stage": stage, "clip_norm": 0.05})


@pytest.mark.parametrize("own_leaves", [1, 3])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bytes_of_joined_units_equal_the_formula(ranks, stage, own_leaves):
    for found in ranks(2).run(counted, stage, own_leaves):
        assert found.peak == found.formula
        assert found.sent == found.sent_formula + found.sent_norms


class Boxes(nn.Module):
    """Blocks whose order of use is not that in which they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in reversed(self.blocks):
            x = x + block(x)
            whole.append([p.untyped_storage().nbytes() > 0 for p in self.parameters()])
        return x.sum()


whole: list[list[bool]] = []


def test_a_joined_unit_is_freed_when_all_of_its_blocks_have_run(monkeypatch):
    monkeypatch.setattr(units, "SMALL_NUMEL", 1 << 20)
    model = Boxes()
    optimizer = ss.optim.SGD(model.parameters(), lr=0.1)
    ss.shard(model, optimizer, stage=3)
    whole.clear()
    with torch.no_grad():
        model(torch.ones(1, 5))
    assert [set(seen) for seen in whole] == [{True}, {True}, {False}]
