"""Leaves summed in the order of a fixed binary tree over their index.

The tree is a binary counter: leaf k is merged with the partial sums that its trailing one-bits name, so the
order of additions depends on the number of leaves alone, never on how many ranks computed them. At most
log2(leaves) + 1 partial sums live at once. Nothing here communicates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardstep.sharding.memory import Ledger

_TILE_NUMEL = 65_536
"""Elements widened at a time: the scratch stays in the cache."""


@dataclass
class Partial:
    """The sum of a complete subtree of 2**level leaves."""

    level: int
    values: Tensor
    owned: bool
    """Whether ``values`` is a whole buffer of the ledger, to be added into and given back."""


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

    def push(self, values: Tensor, *, owned: bool, level: int = 0) -> None:
        """Add the next subtree. An ``owned`` buffer passes to the tree; another must stay as it is until settled."""
        later = Partial(level, values, owned)
        while self._partials and self._partials[-1].level == later.level:
            later = self._add(self._partials.pop(), later, later.level + 1)
        self._partials.append(later)

    def settle(self) -> None:
        """Copy every partial that lies in somebody else's memory into a buffer of its own."""
        for partial in self._partials:
            if not partial.owned:
                copy = self._ledger.take("gradients", partial.values.numel(), partial.values.dtype)
                partial.values = copy.copy_(partial.values)
                partial.owned = True

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
        """earlier + later, in whichever of the two buffers may hold it."""
        reusable = [p for p in (earlier, later) if p.owned and p.values.dtype == self._dtype]
        values = reusable[0].values if reusable else self._ledger.take("gradients", later.values.numel(), self._dtype)
        _sum_into(values, earlier.values, later.values)
        for partial in (earlier, later):
            if partial.values is not values:
                self._release(partial)
        return Partial(level, values, owned=True)

    def _release(self, partial: Partial) -> None:
        if partial.owned:
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
