"""Bytes are known: the ledger's peak is the formula's to the byte, and so is what each rank sends.

The formula's scope: every parameter gets a gradient in every micro-batch. The closed forms below are written
out by hand for one block of 1,024 elements in each space, so that they do not lean on the formula's code.
"""

import ctypes
import math
import os
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from shardstep.demo.gpt import GPT, GPTConfig
from shardstep.sharding.memory import laying_out, return_holes
from tests.sharding.models import BF16

CONFIG = GPTConfig(layers=4, width=14, heads=2, context=8, vocabulary=50)
MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.2": 2, "blocks.3": 0, "": 3}
MIXED_PER_STEP = {"blocks.1": 0, "blocks.3": 0, "*": 1}
BLOCK = 1024


class Windows:
    """A map-style dataset of token windows."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(CONFIG.vocabulary, (9,), generator=torch.Generator().manual_seed(index))


def sharded_gpt(**options: Any) -> tuple[nn.Module, ss.optim.AdamW, ss.Sharded]:
    torch.manual_seed(1)
    model = GPT(CONFIG)
    optimizer = ss.optim.AdamW(model.parameters())
    return model, optimizer, ss.shard(model, optimizer, **options)


def train_steps(
    model: nn.Module, optimizer: ss.optim.AdamW, sharded: ss.Sharded, own_leaves: int, steps: int
) -> list[int]:
    """Bytes sent in each step."""
    sent, before = [], sharded.traffic.sent_bytes
    for micro in sharded.micro_batches(
        Windows(), global_batch=own_leaves * sharded.world_size, micro_batch=1, seed=0, epochs=9
    ):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            sent.append(sharded.traffic.sent_bytes - before)
            before = sharded.traffic.sent_bytes
            if micro.step == steps - 1:
                break
    return sent


@dataclass(frozen=True)
class Counted:
    """What one rank counted over two steps: peaks as (parameters, gradients, state), and the bytes of a step."""

    peak: tuple[int, ...]
    formula: tuple[int, ...]
    unsharded: tuple[int, ...]
    sent: int
    sent_formula: int
    sent_norms: int


def counted_run(own_leaves: int, options: dict[str, Any]) -> Counted:
    model, optimizer, sharded = sharded_gpt(**options)
    sent = train_steps(model, optimizer, sharded, own_leaves, 2)
    report = sharded.bytes
    return Counted(
        *map(astuple, (report.peak, report.formula, report.unsharded)),
        sent=sent[1],
        sent_formula=sharded.step_bytes(own_leaves),
        sent_norms=norm_bytes(sharded.world_size) if "clip_norm" in options else 0,
    )


def counted_runs(runs: list[tuple[int, dict[str, Any]]]) -> list[Counted]:
    return [counted_run(*run) for run in runs]


def norm_bytes(world_size: int) -> int:
    """One float64 for each block of this rank's shards to each other rank; the layout is done here by hand."""
    plain = GPT(CONFIG)
    root = [parameter for name, parameter in plain.named_parameters() if not name.startswith("blocks.")]
    blocks = 0
    for own in [root, *(list(block.parameters()) for block in plain.blocks)]:
        elements = sum(math.ceil(parameter.numel() / 256) * 256 for parameter in own)
        blocks += math.ceil(math.ceil(elements / BLOCK) / world_size)
    return 8 * blocks * (world_size - 1)


def every_run(precision: ss.Precision | None, leaves: tuple[int, ...]) -> list[tuple[int, dict[str, Any]]]:
    """(leaves on each rank, options). Prefetch matters where parameters are sharded only."""
    per_leaf = [(own, {"stage": stage, "precision": precision}) for stage in (0, 1, 2, 3, MIXED) for own in leaves]
    prefetched = [
        (own, {"stage": stage, "precision": precision, "prefetch": prefetch, "clip_norm": 0.05})
        for stage in (3, MIXED)
        for own, prefetch in ((1, 0), (2, 2))
    ]
    per_step = [
        (own, {"stage": stage, "precision": precision, "schedule": "per step", "clip_norm": 0.05})
        for stage in (0, 1, MIXED_PER_STEP)
        for own in (1, 2)
    ]
    return per_leaf + prefetched + per_step


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("world_size", "machines", "leaves"), [(1, 1, (1, 2, 3)), (2, 1, (1, 2, 3)), (4, 1, (1, 3)), (4, 2, (1, 3))]
)
def test_the_formulas_are_exact_to_the_byte(ranks, world_size, machines, leaves, precision):
    """Peaks, and bytes sent: gathers and exchanges by the formula, and the norms where the step clips.

    Control is left out on both sides: announcements of a few integers travel uncounted.
    """
    runs = every_run(precision, leaves)
    for results in ranks(world_size, machines).run(counted_runs, runs):
        rows = list(zip(runs, results, strict=True))
        assert not [(run, row.peak, row.formula) for run, row in rows if row.peak != row.formula]
        assert not [(run, row) for run, row in rows if row.sent != row.sent_formula + row.sent_norms]
        assert all((row.sent > 0) == (world_size > 1) for row in results)


@pytest.mark.parametrize("leaves", [1, 2])
@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
def test_the_unsharded_formula_is_the_peak_of_one_rank(ranks, precision, leaves):
    alone = counted_run(2 * leaves, {"stage": 0, "precision": precision})
    for counted in ranks(2).run(counted_run, leaves, {"stage": 3, "precision": precision}):
        assert counted.unsharded == alone.peak


# - closed forms, by hand


class Tower(nn.Module):
    """A root of one 1,000-element parameter and four units of 2,000 elements: one and two blocks of 1,024."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1000))
        self.floors = nn.ModuleList(nn.Sequential(nn.Linear(2, 1000, bias=False), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([floor(x) for floor in self.floors]).sum(0) * self.scale


ROOT, FLOOR = 1 * BLOCK, 2 * BLOCK
"""Elements of the root and of one unit, to whole blocks."""
ROOT_SHARD, FLOOR_SHARD = 1 * BLOCK, 1 * BLOCK
"""Elements of their shards on 2 ranks: whole blocks, so the root's second one is padding."""
PADDED_ROOT = 2 * ROOT_SHARD
ALL, ALL_SHARDS = PADDED_ROOT + 4 * FLOOR, ROOT_SHARD + 4 * FLOOR_SHARD


def tower_bytes(options: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """Peak bytes, and the bytes sent in the second step."""
    torch.manual_seed(1)
    model = Tower()
    optimizer = ss.optim.AdamW(model.parameters())
    sharded = ss.shard(model, optimizer, **options)
    for _ in range(2):
        before = sharded.traffic.sent_bytes
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return astuple(sharded.bytes.peak), sharded.traffic.sent_bytes - before


def tower_on_two_ranks(ranks: Any, **options: Any) -> tuple[tuple[int, ...], int]:
    first, second = ranks(2).run(tower_bytes, options)
    assert first == second
    return first


def test_stage_0_by_hand(ranks):
    (parameters, gradients, state), sent = tower_on_two_ranks(ranks, stage=0)
    assert parameters == 4 * ALL
    assert state == 2 * 4 * ALL  # exp_avg and exp_avg_sq
    # Kept leaves, whose memory takes the sums too, and the half of one leaf that is on its way from the other rank.
    assert gradients == 4 * (ALL + FLOOR_SHARD)
    # Each leaf's other half to the other rank, and the sum of this rank's half.
    assert sent == 2 * 4 * ALL_SHARDS


def test_stage_1_by_hand(ranks):
    (parameters, gradients, state), sent = tower_on_two_ranks(ranks, stage=1)
    assert parameters == 4 * ALL
    assert state == 2 * 4 * ALL_SHARDS
    assert gradients == 4 * (ALL + FLOOR_SHARD)
    assert sent == 2 * 4 * ALL_SHARDS  # half of each leaf, and this rank's updated half


def test_stage_2_by_hand(ranks):
    (parameters, gradients, state), sent = tower_on_two_ranks(ranks, stage=2)
    assert parameters == 4 * ALL
    assert state == 2 * 4 * ALL_SHARDS
    # The root's leaf is open from the first gradient on. The worst moment: floors 3, 2 and 1 are summed, floor 0's
    # leaf travels (leaf and received half), and the leaf that floor 1 gave back is the spare.
    waiting = 3 * FLOOR_SHARD + (FLOOR + FLOOR_SHARD) + FLOOR
    assert gradients == 4 * (PADDED_ROOT + waiting)
    assert sent == 2 * 4 * ALL_SHARDS


@pytest.mark.parametrize("prefetch", [0, 1, 2, 9])
def test_stage_3_by_hand(ranks, prefetch):
    (parameters, gradients, state), sent = tower_on_two_ranks(ranks, stage=3, prefetch=prefetch)
    window = min(1 + prefetch, 4) * FLOOR
    assert parameters == 4 * (ALL_SHARDS + PADDED_ROOT + window)
    assert state == 2 * 4 * ALL_SHARDS
    assert gradients == 4 * (PADDED_ROOT + 3 * FLOOR_SHARD + (FLOOR + FLOOR_SHARD) + FLOOR)
    # Gathered for forward and for backward, but for what stays whole over the turn; half of each leaf.
    over_the_turn = ROOT_SHARD + min(1 + prefetch, 4) * FLOOR_SHARD
    assert sent == 4 * ((2 + 1) * ALL_SHARDS - over_the_turn)


def test_bf16_by_hand(ranks):
    (parameters, _, state), sent = tower_on_two_ranks(ranks, stage=3, precision=BF16, prefetch=0)
    assert parameters == 2 * (ALL_SHARDS + PADDED_ROOT + FLOOR)
    assert state == 3 * 4 * ALL_SHARDS  # the fp32 master as well
    assert sent == 2 * ((2 + 1) * ALL_SHARDS - ROOT_SHARD - FLOOR_SHARD)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_free_memory_between_what_stays_goes_back_to_the_kernel_every_so_many_steps():
    with laying_out():
        pass
    buffers = [torch.ones(1 << 18) for _ in range(64)]
    keep = buffers[1::2]
    before = resident_bytes()
    del buffers
    return_holes(63)
    assert resident_bytes() > before - (8 << 20)
    return_holes(64)
    assert resident_bytes() < before - (24 << 20)
    assert all(bool((buffer == 1).all()) for buffer in keep)
