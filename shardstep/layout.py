"""Where each parameter lies in its unit's flat space, and which run of it a rank owns.

Plain data and arithmetic: a layout is counted in blocks of 1,024 elements and does not depend on the
world size, the stage or the optimizer; those only choose intervals of it. Nothing here allocates memory,
talks to another rank or changes a module.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch

from shardstep.types import BLOCK_NUMEL, SCALED_NUMEL

Key = TypeVar("Key")

ALIGNMENT_NUMEL = SCALED_NUMEL
"""A parameter begins at a multiple of this, so that elements which share a scale do so on every shard; it is 512 bytes
in a 2-byte dtype, 1,024 in fp32."""


@dataclass(frozen=True)
class Slot:
    """The place of one parameter: elements [offset, offset + numel) of a flat space."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int

    @property
    def end(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class Layout:
    """The slots of one flat space, in order, and its length in blocks."""

    dtype: torch.dtype
    slots: tuple[Slot, ...]
    blocks: int

    @property
    def numel(self) -> int:
        """Elements, the last block filled up with padding."""
        return self.blocks * BLOCK_NUMEL

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The runs (start, end) between slots and up to the end, which must hold zeros."""
        ends = [slot.end for slot in self.slots]
        starts = [slot.offset for slot in self.slots[1:]] + [self.numel]
        return tuple((end, start) for end, start in zip(ends, starts, strict=True) if end < start)

    def shard_numel(self, world_size: int) -> int:
        """Elements of every rank's shard: the same for all, so the flat buffer is padded to their sum."""
        return -(-self.blocks // world_size) * BLOCK_NUMEL

    def padded_numel(self, world_size: int) -> int:
        """Elements of a buffer that holds the whole space, cut into ``world_size`` equal shards."""
        return self.shard_numel(world_size) * world_size

    def slot_at(self, offset: int) -> Slot:
        """The slot that holds element ``offset`` (or the last one before it, in a gap)."""
        return [slot for slot in self.slots if slot.offset <= offset][-1]

    def runs(self, keys: Sequence[Key], start: int, stop: int) -> Iterator[tuple[Key, int, int]]:
        """Cut [start, stop) into runs (key, start, end) of neighbouring slots with equal keys.

        ``keys`` has one entry per slot. Gaps belong to the slot before them, so runs begin and end at
        multiples of ``ALIGNMENT_NUMEL`` whatever the interval.
        """
        bounds = [slot.offset for slot in self.slots] + [stop]
        first, last = 0, len(self.slots)
        while first < last:
            after = first + 1
            while after < last and keys[after] == keys[first]:
                after += 1
            begin, end = max(bounds[first], start), min(max(bounds[after], start), stop)
            if begin < end:
                yield keys[first], begin, end
            first = after


def lay_out(dtype: torch.dtype, parameters: Iterable[tuple[str, Sequence[int]]]) -> Layout:
    """Lay out parameters, given as (name, shape), one after another in one flat space."""
    slots, offset = [], 0
    for name, shape in parameters:
        numel = 1
        for extent in shape:
            numel *= extent
        slots.append(Slot(name, tuple(shape), offset, numel))
        offset = -(-(offset + numel) // ALIGNMENT_NUMEL) * ALIGNMENT_NUMEL
    return Layout(dtype, tuple(slots), max(1, -(-offset // BLOCK_NUMEL)))


def joined(layouts: Sequence[Layout]) -> Layout:
    """One space after another in one; each begins with a block, so the blocks are the same ones."""
    slots, blocks = list[Slot](), 0
    for layout in layouts:
        slots += [replace(slot, offset=slot.offset + blocks * BLOCK_NUMEL) for slot in layout.slots]
        blocks += layout.blocks
    return Layout(layouts[0].dtype, tuple(slots), blocks)


def fingerprint(named_layouts: Iterable[tuple[str, Layout]]) -> str:
    """A short hash of all layouts of a model; equal on all ranks when the models have equal structure."""
    record = [
        [unit, str(layout.dtype), layout.blocks, [[s.name, s.shape, s.offset] for s in layout.slots]]
        for unit, layout in named_layouts
    ]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]
