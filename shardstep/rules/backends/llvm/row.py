"""What the compiled code is given for one run of elements: a row of 8-byte words, the same for writer and reader.

    array addresses | address of low, or 0 | count | offset | address of the partials of each reduction
    | place in the tensor, columns, rows, addresses of the vectors (for a phase with rows and columns) | scalars

The partials of a row or column reduction are addressed as if they began with the tensor's first line. A table is rows
one after another, so that one call serves many tensors. Nothing here touches memory.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardstep.rules.binding import Binding
from shardstep.rules.ir import Phase
from shardstep.types import BLOCK_NUMEL as BLOCK


@dataclass(frozen=True)
class RowLayout:
    """``arrays``: those that the phase touches, in the binding's order; the rest are counts. ``vectors``: None for a
    phase without rows and columns.
    """

    arrays: tuple[str, ...]
    reductions: int
    scalars: int
    vectors: int | None = None

    @property
    def low(self) -> int:
        """The word that this one is; likewise below."""
        return len(self.arrays)

    @property
    def count(self) -> int:
        return self.low + 1

    @property
    def offset(self) -> int:
        return self.low + 2

    @property
    def first_partials(self) -> int:
        return self.low + 3

    @property
    def first_of_lines(self) -> int:
        return self.first_partials + self.reductions

    @property
    def first_scalar(self) -> int:
        return self.first_of_lines + (0 if self.vectors is None else 3 + self.vectors)

    @property
    def words(self) -> int:
        return self.first_scalar + self.scalars

    def part(self, words: Sequence[Any], sizes: Sequence[tuple[int, int]], begin: int, end: int) -> list[Any]:
        """Elements ``begin`` to ``end`` of an unpacked row, as a row of their own. ``sizes``: of each array and of low,
        how many elements share an entry, and its bytes.
        """
        new = list(words)
        for word, (per, size) in enumerate(sizes):
            new[word] += begin // per * size
        new[self.count], new[self.offset] = end - begin, words[self.offset] + begin
        for word in range(self.first_partials, self.first_of_lines):
            new[word] += 8 * (new[self.offset] // BLOCK - words[self.offset] // BLOCK)
        if self.vectors is not None:
            new[self.first_of_lines] += begin
        return new

    @cached_property
    def format(self) -> struct.Struct:
        """Packs a row."""
        return struct.Struct(f"={self.first_scalar}q{self.scalars}d")


def layout_of(phase: Phase, binding: Binding) -> RowLayout:
    """The row of a phase."""
    body = phase.body
    touched = {str(line.attributes[0]) for line in body.instructions if line.operation == "load"}
    touched |= {name for name, _ in body.stores}
    vectors = len(phase.vectors) if phase.has_lines else None
    return RowLayout(binding.arrays(touched), len(phase.sums), len(phase.scalars), vectors)


def cuts(count: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """A run in pieces of at most ``length`` elements (at least a block) that end where blocks of the grid end."""
    begin = 0
    while begin < count:
        end = min((offset + begin + length) // BLOCK * BLOCK - offset, count)
        yield begin, end
        begin = end
