"""Rules with matrix products on shards: the same bits everywhere, balanced owners, and known bytes."""

from dataclasses import astuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import shardstep as ss
from shardstep.config import Stage
from shardstep.layout import lay_out
from shardstep.optim import Optimizer
from shardstep.sharding.ownership import moving_bytes, owners, places
from tests.rules.test_steps import every_kind
from tests.sharding.models import BF16, Tokens

MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}


class Block(nn.Module):
    """Matrices of all proportions, one that is used now and then, and a frozen one. ``plain``: neither of these."""

    def __init__(self, width: int, plain: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.sometimes = nn.Linear(width, width, bias=False)
        if not plain:
            frozen = torch.linspace(0.5, 1.5, width * width).view(width, width)
            self.frozen = nn.Parameter(frozen, requires_grad=False)

    def forward(self, x: Tensor, use_all: bool) -> Tensor:
        y = self.down(F.gelu(self.up(x @ self.frozen if hasattr(self, "frozen") else x)))
        return x + y + (self.sometimes(x) if use_all else 0)


class Matrices(nn.Module):
    """A language model of matrices alone, whose head is its embedding. ``plain``: without what bends the formula."""

    def __init__(self, width: int = 20, blocks: int = 3, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width, plain) for _ in range(blocks))
        self.head = nn.Linear(width, 50, bias=False)
        if not plain:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for number, block in enumerate(self.blocks):
            x = block(x, use_all=self.plain or bool((tokens[0, 0] + number) % 2))
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), tokens[:, 1:].flatten())


def trained(options: dict[str, Any], plain: bool = False) -> tuple[nn.Module, ss.optim.Muon, ss.Sharded, list[int]]:
    """With the bytes sent in each of three steps."""
    torch.manual_seed(1)
    model = Matrices(blocks=12 if plain else 3, plain=plain)
    optimizer = ss.optim.Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)
    sharded = ss.shard(model, optimizer, **options)
    sent, before = [], sharded.traffic.sent_bytes
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=5):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            sent.append(sharded.traffic.sent_bytes - before)
            before = sharded.traffic.sent_bytes
            if micro.step == 2:
                break
    return model, optimizer, sharded, sent


def muon_digest(options: dict[str, Any]) -> str:
    model, optimizer, _, _ = trained(options)
    return ss.digest(model, optimizer)


def muon_digests(all_options: list[dict[str, Any]]) -> list[str]:
    return [muon_digest(options) for options in all_options]


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
def test_muon_has_the_bits_of_the_one_rank_run(ranks, precision):
    common = {"precision": precision, "clip_norm": 0.5}
    expected = muon_digest({"stage": 0, **common})
    layouts = [{"stage": stage, **common} for stage in (0, 1, 2, 3, MIXED)]
    layouts.append({"stage": 1, "schedule": "per step", "trace_nonfinite": True, **common})
    for world_size in (1, 2, 4):
        for digests in ranks(world_size).run(muon_digests, layouts):
            assert digests == [expected] * len(layouts), world_size


def one_leaf(shard: bool) -> str:
    torch.manual_seed(1)
    model = Matrices()
    optimizer = ss.optim.Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)
    if shard:
        ss.shard(model, optimizer, stage=3)
    for step in range(3):
        model(torch.stack([Tokens()[i + 4 * step] for i in range(4)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer)


def test_one_micro_batch_gives_the_bits_of_the_optimizer_alone():
    """Matrices of less than a block: the norms of larger ones are summed over other blocks in a flat space."""
    assert one_leaf(True) == one_leaf(False)


def reduced_digest(width: int, stage: int) -> str:
    """A rule whose head, middle and tail all make sums, on gradients that are the same on all ranks."""
    torch.manual_seed(2)
    model = Matrices(width)
    optimizer = type("EveryKind", (Optimizer,), {"rule": every_kind})(
        [p for p in model.parameters() if p.requires_grad]
    )
    ss.shard(model, optimizer, stage=stage)
    for _ in range(3):
        model(torch.stack([Tokens()[i] for i in range(4)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer)


def test_rules_with_sums_around_their_products(ranks):
    expected = reduced_digest(16, 0)
    for world_size, stage in ((1, 3), (2, 0), (2, 1), (4, 3)):
        assert set(ranks(world_size).run(reduced_digest, 16, stage)) == {expected}, (world_size, stage)


def counted(options: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Peaks and formula, bytes sent in a step and formula."""
    _, _, sharded, sent = trained(options, plain=True)
    report = sharded.bytes
    return astuple(report.peak), astuple(report.formula), sent[1], sharded.step_bytes(4 // sharded.world_size)


def all_counted(runs: list[dict[str, Any]]) -> list[Any]:
    return [counted(run) for run in runs]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_bytes_of_whole_tensors_are_in_the_formula(ranks, world_size):
    """With so many units that the update needs more than backward. The formula leaves the sums for norms out."""
    runs = [{"stage": stage, "precision": precision} for precision in (None, BF16) for stage in (0, 1, 2, 3, MIXED)]
    for results in ranks(world_size).run(all_counted, runs):
        for run, (peak, formula, sent, sent_formula) in zip(runs, results, strict=True):
            assert peak == formula, run
            assert sent == sent_formula + norm_bytes(run["stage"], world_size), run


def norm_bytes(stage: Any, world_size: int) -> int:
    """A float64 for each block of each matrix, as many as the fullest shard of its unit has, to each other rank."""
    model, sent = Matrices(blocks=12, plain=True), 0
    units = {
        "": [model.embed.weight, model.head.weight],
        **{f"blocks.{i}": list(block.parameters()) for i, block in enumerate(model.blocks)},
    }
    for name, parameters in units.items():
        pattern = stage if isinstance(stage, int) else next(stage[p] for p in (name, "blocks.*", "") if p in stage)
        slots = lay_out(torch.float32, [("", tuple(p.shape)) for p in parameters if p.requires_grad])
        shard = slots.shard_numel(world_size)
        most = 0
        for rank in range(world_size):
            spans = [(max(s.offset, rank * shard), min(s.end, (rank + 1) * shard)) for s in slots.slots]
            most = max(most, sum(-(-stop // 1024) - start // 1024 for start, stop in spans if start < stop))
        sent += 8 * most * (world_size - 1) if pattern else 0
    return sent


def test_owners_by_hand():
    """Greedy, the costliest first: 9 | 7 | 5 5, then 4 to the second."""
    assert owners([5, 9, 4, 7, 5], 3) == [2, 0, 1, 1, 2]
    assert owners([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert owners([3], 4) == [0]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60), st.integers(1, 8))
def test_owners_are_balanced(costs, world_size):
    """Longest-processing-time-first is within 4/3 - 1/(3n) of the best, which is at least the mean and the largest."""
    loads = [0] * world_size
    for cost, owner in zip(costs, owners(costs, world_size), strict=True):
        loads[owner] += cost
    assert max(loads) <= sum(costs) / world_size + max(costs)


def test_bytes_by_hand():
    """On 2 ranks, one matrix of 3 blocks: shards of 2 blocks, so rank 0 has 2 of them and rank 1 one."""
    layout = lay_out(torch.float32, [("weight", (48, 64))])
    ((place,),) = places([(layout, Stage(True, True, True))], 2)
    assert (place.owner, place.spans) == (0, ((0, 2048), (2048, 3072)))
    numel, other = 3072, 1024
    most, sent = moving_bytes([place], [(2, 4)], 0)
    assert sent == 4 * other
    assert most == max(2 * (other + numel), 2 * numel + 4 * numel, 4 * numel + 4 * other)
    assert moving_bytes([place], [(2, 4)], 1) == (4 * other, 2 * other)
    ((everywhere,),) = places([(layout, Stage(False, False, False))], 2)
    assert moving_bytes([everywhere], [(2, 4)], 0)[1] == 4 * numel, "nothing goes in, all of it goes out"
    assert moving_bytes([everywhere], [(2, 4)], 1)[1] == 0
