"""The global norm: block sums that no cut changes, close to exact sums, and torch's coefficient."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardstep.layout import BLOCK_NUMEL, joined, lay_out
from shardstep.sharding.clip import block_sums, clip_coefficient, global_norm
from shardstep.sharding.units import Part


def random_blocks(blocks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(blocks)
    scales = 10.0 ** torch.randint(-4, 5, (blocks * BLOCK_NUMEL,), generator=generator)
    return (torch.randn(blocks * BLOCK_NUMEL, generator=generator) * scales).to(dtype)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 150), st.data())
def test_block_sums_do_not_depend_on_the_cut(blocks, data):
    values = random_blocks(blocks)
    cuts = sorted(data.draw(st.lists(st.integers(0, blocks), max_size=3)))
    bounds = [0, *cuts, blocks]
    parts = [values[a * BLOCK_NUMEL : b * BLOCK_NUMEL] for a, b in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat([block_sums(part.clone()) for part in parts]), block_sums(values))


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sums_leave_the_gradient_alone(dtype):
    values = random_blocks(70, dtype)
    before = values.clone()
    block_sums(values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sums_are_close_to_exact_sums(dtype):
    values = random_blocks(70, dtype)
    exact = [math.fsum(x * x for x in block.tolist()) for block in values.view(-1, BLOCK_NUMEL)]
    torch.testing.assert_close(block_sums(values.clone()), torch.tensor(exact, dtype=torch.float64), rtol=1e-15, atol=0)


class Rank(SimpleNamespace):
    """One of several ranks, as the norm sees its group: everyone's block sums are known already."""

    def all_gather_small(self, own: Tensor, *, label: str) -> Tensor:
        assert torch.equal(own, self.everyone[self.rank])
        return torch.stack(self.everyone)


def space_of(layouts: dict[int, Any], frozen: int | None = None) -> Any:
    """A space that joins these, each of one tensor, by number."""
    parts = tuple(Part(number, layout.blocks, 1) for number, layout in layouts.items())
    trained = [number != frozen for number in layouts]
    return SimpleNamespace(layout=joined([*layouts.values()]), parts=parts, trained_parts=trained)


def norms_on(world_size: int, sums: list[Tensor], layouts: list[Any]) -> list[float]:
    """The global norm as each of ``world_size`` ranks computes it."""
    padded = [
        torch.nn.functional.pad(s, (0, layout.padded_numel(world_size) - layout.numel))
        for s, layout in zip(sums, layouts, strict=True)
    ]
    cuts = [[whole.chunk(world_size)[rank] for whole in padded] for rank in range(world_size)]
    everyone = [torch.cat([block_sums(run) for run in runs]) for runs in cuts]
    spaces = [space_of({n: layout}) for n, layout in enumerate(layouts)]
    ranks = [Rank(rank=rank, size=world_size, everyone=everyone) for rank in range(world_size)]
    return [global_norm(list(zip(spaces, cuts[rank.rank], strict=True)), rank, 0) for rank in ranks]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(2, 6))
def test_the_norm_has_the_same_bits_on_any_number_of_ranks(blocks, world_size):
    layouts = [lay_out(torch.float32, [("p", (count * BLOCK_NUMEL - 3,))]) for count in blocks]
    sums = [random_blocks(layout.blocks) for layout in layouts]
    (alone,) = norms_on(1, sums, layouts)
    assert set(norms_on(world_size, sums, layouts)) == {alone}
    assert alone == pytest.approx(torch.linalg.vector_norm(torch.cat(sums).double()).item(), rel=1e-14)


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1.0, 7.0, math.inf])
@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.5, 1.0, 2.0, 1e12])
def test_the_coefficient_is_torchs(norm, clip_norm):
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    parameter.grad = torch.tensor(norm, dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_(parameter, clip_norm)
    assert clip_coefficient(norm, clip_norm) * norm == pytest.approx(parameter.grad.item(), rel=1e-15)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=6))
def test_the_norm_has_the_same_bits_whatever_spaces_are_joined(blocks):
    layouts = [lay_out(torch.float32, [("p", (count * BLOCK_NUMEL,))]) for count in blocks]
    sums = [random_blocks(layout.blocks) for layout in layouts]
    apart = [space_of({n: layout}) for n, layout in enumerate(layouts)]
    together = []
    layouts.append(lay_out(torch.float32, [("p", (7,))]))  # frozen, beside others that have joined the optimizer
    sums.append(torch.zeros(BLOCK_NUMEL))
    count = len(layouts)
    for members in (range(0, count, 2), range(1, count, 2)):  # as frozen and trained ones of several units
        space = space_of({n: layouts[n] for n in members}, frozen=count - 1)
        together.append((space, torch.cat([sums[n] for n in members])))
    del sums[-1]
    alone = Rank(rank=0, size=1, everyone=[torch.cat([block_sums(run) for run in sums])])
    alone_joined = Rank(rank=0, size=1, everyone=[torch.cat([block_sums(run) for _, run in together])])
    assert global_norm(together, alone_joined, 0) == global_norm(list(zip(apart, sums, strict=True)), alone, 0)
