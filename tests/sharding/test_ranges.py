"""`sharded.ranges()`: what it says of every rank, held against where the values really lie."""

from typing import Any

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.sharding.ranges import Ranges
from tests.sharding.models import BF16, Tied
from tests.sharding.test_bytes import BLOCK, Tower

MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}


def sharded(make: Any, **options: Any) -> tuple[nn.Module, ss.Sharded]:
    torch.manual_seed(3)
    model = make()
    optimizer = ss.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return model, ss.shard(model, optimizer, **options)


def maps_that_fit(options: dict[str, Any]) -> list[Ranges]:
    """Every rank's map; this rank's is held against its buffers."""
    model, handle = sharded(lambda: Tied(width=40), **options)
    own = handle.ranges()
    spaces = {slot.name: space for unit in handle._units for space in unit.spaces for slot in space.layout.slots}
    for found in own:
        space, values = spaces[found.name], handle.full_param(found.name).flatten()
        assert len(found.buffer) == values.numel() == model.get_parameter(found.name).numel()
        assert torch.equal(space.master[_slice(found.gbuf_local)], values[_slice(found.param)])
        with ss.gathered(model):
            whole = space.flat.clone()
        assert torch.equal(whole[_slice(found.gbuf_world)], values[_slice(found.param)].to(whole.dtype))
        assert torch.equal(whole[_slice(found.buffer)], values.to(whole.dtype))
    maps = [handle.ranges(rank) for rank in range(handle.world_size)]
    assert maps[handle.rank] == own
    return maps


def _slice(run: range) -> slice:
    return slice(run.start, run.stop)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_knows_what_every_rank_owns(ranks, world_size):
    for options in ({"stage": 0}, {"stage": 1, "precision": BF16}, {"stage": 3}, {"stage": MIXED}):
        first, *others = ranks(world_size).run(maps_that_fit, options)
        assert all(other == first for other in others)
        for buffers in zip(*(found.buffers for found in first), strict=True):
            assert {buffer.numel for buffer in buffers} == {world_size * buffers[0].shard_numel}
            assert buffers[0].shard_numel % BLOCK == 0
            shared = buffers[0].stage > 0
            for rank, buffer in enumerate(buffers):
                begin, numel = (rank * buffer.shard_numel, buffer.shard_numel) if shared else (0, buffer.numel)
                assert buffer.owned == range(begin, begin + numel)
            for of_each_rank in zip(*(buffer.parameters for buffer in buffers), strict=True):
                parts = [found.gbuf_world for found in (of_each_rank if shared else of_each_rank[:1])]
                assert [i for part in parts for i in part] == list(of_each_rank[0].buffer)
                assert all(len(found.param) == len(found.gbuf_local) == len(found.gbuf_world) for found in of_each_rank)
        assert [len(found) for found in first] == [len(list(first[0]))] * world_size


def printed() -> str:
    _, handle = sharded(Tower, stage={"floors.3.*": 0, "*": 1}, units=["floors.*.0"])
    before = handle.traffic.calls
    text = str(handle.ranges(1))
    assert handle.traffic.calls == before
    return text


TABLE = """\
rank 1 of 2: what it owns, in elements

the root unit, float32, stage 1: 2,048 elements (1,048 of padding) in 2 shards of 1,024; owned: [1,024, 2,048)
  parameter          shape       buffer      gbuf_world  gbuf_local           param
  scale              1000    [0, 1,000)               -           -               -

unit 'floors.0.0', float32, stage 1: 2,048 elements (48 of padding) in 2 shards of 1,024; owned: [1,024, 2,048)
  parameter          shape       buffer      gbuf_world  gbuf_local           param
  floors.0.0.weight  1000x2  [0, 2,000)  [1,024, 2,000)    [0, 976)  [1,024, 2,000)
"""


def test_it_prints_as_a_table(ranks):
    first, second = ranks(2).run(printed)
    assert first == second
    assert first.startswith(TABLE), first
    last = first.splitlines()[-3:]
    assert last[0].startswith("unit 'floors.3.0', float32, stage 0: 2,048 elements (48 of padding) in 2 shards ")
    assert last[0].endswith("owned: [0, 2,048)")
    assert last[2].split("  ")[-1] == "[0, 2,000)"


def test_frozen_buffers_are_named_and_scalars_have_no_shape():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))
            self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    _, handle = sharded(Odd, stage=1)
    rows = str(handle.ranges()).splitlines()
    assert rows[2].startswith("the root unit, float32, stage 1: 1,024 elements (1,023 of padding)")
    assert rows[4].split() == ["gain", "-", *["[0,", "1)"] * 4]
    assert rows[6].startswith("the root unit, float32, frozen, stage 1: 1,024 elements (1,021 of padding)")


@pytest.mark.parametrize("rank", [1, -1, "0", True])
def test_there_is_no_such_rank(rank):
    _, handle = sharded(Tower, stage=1)
    with pytest.raises(ss.ConfigError, match=rf"expected a rank of 0 to 0 for ranges\(\), got {rank!r}"):
        handle.ranges(rank)
