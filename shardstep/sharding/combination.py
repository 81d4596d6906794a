"""Sums over whole tensors from the sums over their blocks, wherever these were computed.

A shard is whole blocks of the layout, so each rank has every block sum of what it owns complete, and the sums of a
tensor are those of the ranks one after another: the same list for every world size. What is made of the list is
the rule's business.
"""

import torch
from torch import Tensor

from shardstep.collectives import Group
from shardstep.sharding.space import Space
from shardstep.types import BLOCK_NUMEL

Key = tuple[int, int] | None
"""Group and step count of a parameter that is updated; None for one that is not."""


class Combination:
    """Gathers the block sums of one space's tensors; called by all ranks equally often."""

    def __init__(self, space: Space, keys: list[Key], group: Group, step: int) -> None:
        self._space, self._group, self._step = space, group, step
        self._slots = [slot for slot, key in zip(space.layout.slots, keys, strict=True) if key is not None]

    def __call__(self, partials: list[list[Tensor]], count: int) -> list[list[Tensor]]:
        """For each segment of this rank its ``count`` sums, as the whole tensors' (see `shardstep.types.Batch`)."""
        if not self._space.stage.shard_state or self._group.size == 1:
            return partials
        blocks = [self._blocks(rank) for rank in range(self._group.size)]
        own = torch.zeros(count * max(map(sum, blocks)), dtype=torch.float64, device=self._space.shard.device)
        at = 0
        for sums, length in zip(partials, filter(None, blocks[self._group.rank]), strict=True):
            for values in sums:
                own[at : at + length] = values
                at += length
            at += (count - len(sums)) * length
        label = f"gather of the sums over tensors of {self._space.where} in step {self._step}"
        whole = _by_tensor(self._group.all_gather_small(own, label=label), blocks, count)
        return [tensor for tensor, length in zip(whole, blocks[self._group.rank], strict=True) if length]

    def _blocks(self, rank: int) -> list[int]:
        """How many blocks of each tensor a rank has a part of."""
        first, last = rank * self._space.shard_numel, (rank + 1) * self._space.shard_numel
        counts = []
        for slot in self._slots:
            start, stop = max(slot.offset, first), min(slot.end, last)
            counts.append(-(-stop // BLOCK_NUMEL) - start // BLOCK_NUMEL if start < stop else 0)
        return counts


def _by_tensor(rows: Tensor, blocks: list[list[int]], count: int) -> list[list[Tensor]]:
    """The ranks' rows, cut into ``count`` sums for each tensor and joined; ``blocks`` of each rank and tensor."""
    whole: list[list[list[Tensor]]] = [[[] for _ in range(count)] for _ in blocks[0]]
    for row, lengths in zip(rows, blocks, strict=True):
        at = 0
        for tensor, length in zip(whole, lengths, strict=True):
            for parts in tensor:
                parts.append(row[at : at + length])
                at += length
    return [[torch.cat(parts) for parts in tensor] for tensor in whole]
