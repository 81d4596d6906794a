"""Leaves summed in the order of a fixed binary tree over their index.

The tree is a binary counter: leaf k is merged with the partial sums that its trailing one-bits name, so the
order of additions depends on the number of leaves alone, never on how many ranks computed them. At most
log2(leaves) + 1 partial sums live at once. Nothing here communicates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shardstep.sharding.memory import Ledger

_TILE_NUMEL = 65_536
"""Elements widened at a time: the scratch stays in the cache."""


Home = Literal["tree", "kept", "passing"]
"""Whose memory holds a partial sum: the tree's own buffer of the ledger, which it gives back; a buffer that is kept
between steps, lent until ``settle`` or ``clear`` and free to be written; or one that may only be read until then."""


@dataclass
class Partial:
    """The sum of a complete subtree of 2**level leaves."""

    level: int
    values: Tensor
    home: Home


class Tree:
    """The partial sums of one flat run, in index order.

    Leaves are pushed in index order. Those of a narrower dtype than ``dtype`` are widened as they are added.
    """

    def __init__(self, ledger: Ledger, dtype: torch.dtype) -> None:
        self._ledger = ledger
        self._dtype = dtype
        self._partials: list[Partial] = []

    def __len__(self) -> int:
        return len(self._partials)

    def push(self, values: Tensor, *, home: Home, level: int = 0) -> None:
        """Add the next subtree."""
        later = Partial(level, values, home)
        while self._partials and self._partials[-1].level == later.level:
            later = self._add(self._partials.pop(), later, later.level + 1)
        self._partials.append(later)

    def settle(self) -> None:
        """Copy every partial that lies in lent memory into a buffer of its own."""
        for partial in self._partials:
            if partial.home != "tree":
                copy = self._ledger.take("gradients", partial.values.numel(), partial.values.dtype)
                partial.values = copy.copy_(partial.values)
                partial.home = "tree"

    def total(self) -> Partial:
        """The sum of all leaves so far, in place of the partial sums."""
        later = self._partials.pop()
        while self._partials:
            earlier = self._partials.pop()
            later = self._add(earlier, later, earlier.level)
        self._partials.append(later)
        return later

    def hand_over(self) -> Partial:
        """The total, which passes to the caller; the tree is empty afterwards."""
        total = self.total()
        self._partials.clear()
        return total

    def clear(self) -> None:
        """Give back what the tree owns."""
        for partial in self._partials:
            self._release(partial)
        self._partials.clear()

    def _add(self, earlier: Partial, later: Partial, level: int) -> Partial:
        """earlier + later, in a kept buffer if one of them has it, else in the tree's own or a new one."""
        writable = [p for p in (earlier, later) if p.home != "passing" and p.values.dtype == self._dtype]
        if writable:
            into = next((partial for partial in writable if partial.home == "kept"), writable[0])
        else:
            into = Partial(level, self._ledger.take("gradients", later.values.numel(), self._dtype), "tree")
        _sum_into(into.values, earlier.values, later.values)
        for partial in (earlier, later):
            if partial is not into:
                self._release(partial)
        return Partial(level, into.values, into.home)

    def _release(self, partial: Partial) -> None:
        if partial.home == "tree":
            self._ledger.give("gradients", partial.values)


def _sum_into(out: Tensor, first: Tensor, second: Tensor) -> None:
    """out = first + second with one rounding, in ``out``'s dtype; ``out`` may be one of the two."""
    if first.dtype == second.dtype == out.dtype:
        torch.add(first, second, out=out)
        return
    if out is second:
        first, second = second, first
    scratch = torch.empty(min(_TILE_NUMEL, out.numel()), dtype=out.dtype, device=out.device)
    for tile in _tiles(out.numel()):
        if out is not first:
            out[tile].copy_(first[tile])
        widened = scratch[: tile.stop - tile.start].copy_(second[tile])
        out[tile].add_(widened)


def _tiles(numel: int) -> Iterator[slice]:
    for start in range(0, numel, _TILE_NUMEL):
        yield slice(start, min(start + _TILE_NUMEL, numel))
