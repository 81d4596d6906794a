"""Reductions over whole tensors from those over their parts, wherever these were computed.

A shard is whole blocks of the layout, so each rank has every block sum of what it owns complete, and the sums of a
tensor are those of the ranks one after another: the same list for every world size. What rows and columns have on
each rank is put together in any order (see `rules.backends.blocks`). What is made of it is the rule's business.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from shardstep.collectives import Group
from shardstep.layout import Slot
from shardstep.rules.backends.blocks import join_lines, no_lines
from shardstep.rules.ir import Shape
from shardstep.rules.view import view_of
from shardstep.sharding.space import Space
from shardstep.sharding.tensor_states import part
from shardstep.types import BLOCK_NUMEL

Key = tuple[int, int] | None
"""Group and step count of a parameter that is updated; None for one that is not."""

Reductions = list[tuple[str, ...]]


class Combination:
    """Gathers what ranks have of one space's tensors; called by all ranks equally often."""

    def __init__(self, space: Space, keys: list[Key], group: Group, step: int) -> None:
        self._space, self._group, self._step = space, group, step
        self._slots = [slot for slot, key in zip(space.layout.slots, keys, strict=True) if key is not None]

    def __call__(self, partials: list[list[Tensor]], reductions: Reductions) -> list[list[Tensor]]:
        """For each segment of this rank its reductions, as the whole tensors' (see `shardstep.types.Batch`)."""
        if not self._space.stage.shard_state or self._group.size == 1:
            return partials
        lengths = [sum(length for _, _, length in self._parts(rank, reductions)) for rank in range(self._group.size)]
        own = torch.zeros(max(lengths), dtype=torch.float64, device=self._space.shard.device)
        if values := [found.to(own.device) for segment in partials for found in segment]:
            own[: lengths[self._group.rank]] = torch.cat(values)
        label = f"gather of the sums over tensors of {self._space.where} in step {self._step}"
        rows = self._group.all_gather_small(own, label=label).cpu()
        return self._whole(rows, reductions)

    def _owned(self, rank: int) -> slice:
        return slice(rank * self._space.shard_numel, (rank + 1) * self._space.shard_numel)

    def _parts(self, rank: int, reductions: Reductions) -> Iterator[tuple[int, int, int]]:
        """(tensor, which of its reductions, length) of what a rank has, in the order in which it sends it."""
        for tensor, slot in enumerate(self._slots):
            start, stop = part(slot, self._owned(rank))
            for number, operation in enumerate(reductions[tensor] if start < stop else ()):
                cut = _cut(slot, operation, start, stop)
                yield tensor, number, cut.stop - cut.start

    def _whole(self, rows: Tensor, reductions: Reductions) -> list[list[Tensor]]:
        """The reductions of the tensors that this rank has a part of, of what all ranks have sent."""
        mine = [index for index, slot in enumerate(self._slots) if part(slot, self._owned(self._group.rank)) != (0, 0)]
        whole = {index: [_nothing(self._slots[index], operation) for operation in reductions[index]] for index in mine}
        for rank, row in enumerate(rows):
            at = 0
            for index, number, length in self._parts(rank, reductions):
                if index in whole:
                    self._join(whole[index][number], row[at : at + length], rank, index, reductions[index][number])
                at += length
        return [whole[index] for index in mine]

    def _join(self, whole: Tensor, sent: Tensor, rank: int, index: int, operation: str) -> None:
        slot = self._slots[index]
        own = whole[_cut(slot, operation, *part(slot, self._owned(rank)))]
        if _line(operation) is None:
            own.copy_(sent)
        else:
            join_lines(operation, own.numpy(), sent.numpy())


def _line(operation: str) -> Shape | None:
    """What a reduction gives one value for each of; None for blocks."""
    return "row" if operation.startswith("row") else "column" if operation.startswith("column") else None


def _cut(slot: Slot, operation: str, start: int, stop: int) -> slice:
    """The blocks, rows or columns that elements [start, stop) of a tensor have a part in."""
    if (line := _line(operation)) is not None:
        return view_of(slot.shape).touched(line, start, stop)
    first = slot.offset // BLOCK_NUMEL
    return slice((slot.offset + start) // BLOCK_NUMEL - first, -(-(slot.offset + stop) // BLOCK_NUMEL) - first)


def _nothing(slot: Slot, operation: str) -> Tensor:
    line = _line(operation)
    count = _cut(slot, operation, 0, slot.numel).stop if line is None else view_of(slot.shape).lines(line)
    return torch.from_numpy(no_lines(operation, count))
