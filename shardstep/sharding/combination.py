"""Sums over whole tensors from the sums over their blocks, wherever these were computed.

A shard is whole blocks of the layout, so each rank has every block sum of what it owns complete, and the sums of a
tensor are those of the ranks one after another: the same list for every world size. What is made of the list is
the rule's business.
"""

import torch
from torch import Tensor

from shardstep.collectives import Group
from shardstep.layout import BLOCK_NUMEL
from shardstep.sharding.space import Space

Key = tuple[int, int] | None
"""Group and step count of a parameter that is updated; None for one that is not."""


class Combination:
    """Gathers the block sums of one space's tensors; called by all ranks equally often."""

    def __init__(self, space: Space, keys: list[Key], group: Group, step: int) -> None:
        self._space, self._group, self._step = space, group, step
        self._slots = [slot for slot, key in zip(space.layout.slots, keys, strict=True) if key is not None]

    def __call__(self, partials: list[list[Tensor]]) -> list[list[Tensor]]:
        """For each segment of this rank its sums, as the whole tensors' (see `shardstep.types.Batch`)."""
        if not self._space.stage.shard_state or self._group.size == 1:
            return partials
        blocks = [self._blocks(rank) for rank in range(self._group.size)]
        sums = self._agreed_sums(partials)
        own = torch.zeros(sums * max(map(sum, blocks)), dtype=torch.float64, device=self._space.shard.device)
        if partials:
            mine = torch.cat([values for segment in partials for values in segment])
            own[: mine.numel()] = mine
        label = f"gather of the sums over tensors of {self._space.where} in step {self._step}"
        rows = self._group.all_gather_small(own, label=label)
        whole = self._by_tensor(rows, blocks, sums)
        return [tensor for tensor, count in zip(whole, blocks[self._group.rank], strict=True) if count]

    def _blocks(self, rank: int) -> list[int]:
        """How many blocks of each tensor a rank has a part of."""
        first, last = rank * self._space.shard_numel, (rank + 1) * self._space.shard_numel
        counts = []
        for slot in self._slots:
            start, stop = max(slot.offset, first), min(slot.end, last)
            counts.append(max(0, -(-stop // BLOCK_NUMEL) - start // BLOCK_NUMEL) if start < stop else 0)
        return counts

    def _agreed_sums(self, partials: list[list[Tensor]]) -> int:
        """How many sums the rule makes of a tensor: a rank that owns none of these tensors does not know it."""
        own = torch.tensor([len(partials[0]) if partials else 0], device=self._space.shard.device)
        label = f"count of the sums over tensors of {self._space.where} in step {self._step}"
        return int(self._group.all_gather_small(own, label=label).max())

    def _by_tensor(self, rows: Tensor, blocks: list[list[int]], sums: int) -> list[list[Tensor]]:
        whole: list[list[list[Tensor]]] = [[[] for _ in range(sums)] for _ in self._slots]
        for row, counts in zip(rows, blocks, strict=True):
            at = 0
            for tensor, count in zip(whole, counts, strict=True):
                for parts in tensor:
                    parts.append(row[at : at + count])
                    at += count
        return [[torch.cat(parts) for parts in tensor] for tensor in whole]
