"""Whole tensors at their owners: how values of sharded tensors come together for matrix products, and go back.

Where parameters, gradients and state lie never changes. Each tensor has one owner among the ranks, found once: the
costliest first, each to the rank with the least so far, over all units, so that no rank waits long for the others. In a
step every rank sends its pieces of the values that products are made of to the owners, in one message to each, and
gets its pieces of what comes of them in the same way. Where every rank has all of a tensor (stage 0) nothing needs to
go in: the owner computes for all and sends the result to all, since products cost far more than the bytes. States of
square matrices are at the owner only.
Nothing here knows what the values mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from shardstep.collectives import Group
from shardstep.config import Stage
from shardstep.layout import Layout
from shardstep.rules.view import view_of
from shardstep.sharding.memory import Ledger
from shardstep.types import Whole

Dtypes = Sequence[Sequence[torch.dtype]]


@dataclass(frozen=True)
class Place:
    """Where one tensor is: its owner, and the elements (start, stop) that each rank has. ``cut``: each its own."""

    numel: int
    owner: int
    spans: tuple[tuple[int, int], ...]
    cut: bool

    def held(self, rank: int) -> int:
        """Elements that a rank has."""
        return self.spans[rank][1] - self.spans[rank][0]

    def goes_in(self, rank: int) -> bool:
        """Whether a rank sends its piece to the owner."""
        return self.cut and rank != self.owner and self.held(rank) > 0

    def comes_back(self, rank: int) -> bool:
        """Whether the owner sends a rank its piece."""
        return rank != self.owner and self.held(rank) > 0


def places(spaces: Sequence[tuple[Layout, Stage]], world_size: int) -> list[list[Place]]:
    """The place of each tensor of each space."""
    shapes = [slot.shape for layout, _ in spaces for slot in layout.slots]
    owner = iter(owners([_cost(shape) for shape in shapes], world_size))
    return [
        [_place(layout, stage, i, next(owner), world_size) for i in range(len(layout.slots))]
        for layout, stage in spaces
    ]


def places_by_rule(spaces: Sequence[tuple[int, Layout, Stage]], world_size: int) -> list[list[Place]]:
    """Those of spaces with the numbers of their rules: each rule's tensors are balanced by themselves, since they are
    updated together.
    """
    found: list[list[Place]] = [[] for _ in spaces]
    for rule in {rule for rule, _, _ in spaces}:
        own = [index for index, space in enumerate(spaces) if space[0] == rule]
        for index, there in zip(own, places([spaces[i][1:] for i in own], world_size), strict=True):
            found[index] = there
    return found


def owners(costs: Sequence[int], world_size: int) -> list[int]:
    """The rank that each tensor is given to."""
    loads, found = [0] * world_size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = min(range(world_size), key=lambda rank: (loads[rank], rank))
        loads[rank] += costs[index]
        found[index] = rank
    return found


def _cost(shape: tuple[int, ...]) -> int:
    """What the products of a matrix take, in some unit."""
    batch, rows, columns = view_of(shape)
    return batch * rows * columns * min(rows, columns)


def _place(layout: Layout, stage: Stage, index: int, owner: int, world_size: int) -> Place:
    slot, shard = layout.slots[index], layout.shard_numel(world_size)
    if not stage.shard_state:
        return Place(slot.numel, owner, ((0, slot.numel),) * world_size, cut=False)
    bounds = [min(max(rank * shard - slot.offset, 0), slot.numel) for rank in range(world_size + 1)]
    return Place(slot.numel, owner, tuple(pairwise(bounds)), cut=True)


class Gathering:
    """The `Owners` of one step. ``tags``: of its messages in and back. ``release`` gives its memory back."""

    def __init__(
        self,
        tensors: Sequence[Whole],
        at: Sequence[Place],
        group: Group,
        ledger: Ledger,
        tags: tuple[int, int],
        step: int,
    ) -> None:
        self.tensors: Sequence[Whole] = tensors
        self.owned: Sequence[int] = [index for index, place in enumerate(at) if place.owner == group.rank]
        self._at, self._group, self._ledger, self._tags, self._step = at, group, ledger, tags, step
        self._held = [index for index, place in enumerate(at) if place.held(group.rank)]
        self._taken: list[Tensor] = []

    def gather(self, pieces: Sequence[Sequence[Tensor]], dtypes: Dtypes) -> list[list[Tensor]]:
        mine = dict(zip(self._held, pieces, strict=True))
        sent = [self._message(self._going(self._group.rank, owner), self._group.rank, dtypes) for owner in self._ranks]
        received = [self._message(self._going(rank, self._group.rank), rank, dtypes) for rank in self._ranks]
        for message in sent:
            for (index, value), part in message.parts.items():
                part.copy_(mine[index][value])
        self._deal(sent, received, self._tags[0], "gather at the owners of matrices")
        wholes = {index: [self._take(self._at[index].numel, dtype) for dtype in dtypes[index]] for index in self.owned}
        for index in self.owned:
            if self._at[index].held(self._group.rank):
                self._put(wholes[index], index, self._group.rank, mine[index])
        for rank, message in enumerate(received):
            for (index, value), part in message.parts.items():
                self._put(wholes[index][value : value + 1], index, rank, [part])
        self._give(sent, received)
        return list(wholes.values())

    def scatter(self, wholes: Sequence[Sequence[Tensor]], dtypes: Dtypes) -> list[list[Tensor]]:
        results = dict(zip(self.owned, wholes, strict=True))
        made = [values for whole in wholes for values in whole]
        self._ledger.count("gradients", sum(values.nbytes for values in made))
        self.release()
        self._taken += made
        sent = [self._message(self._coming(rank, self._group.rank), rank, dtypes) for rank in self._ranks]
        received = [
            self._message(self._coming(self._group.rank, owner), self._group.rank, dtypes) for owner in self._ranks
        ]
        for rank, message in enumerate(sent):
            for (index, value), part in message.parts.items():
                start, stop = self._at[index].spans[rank]
                part.copy_(results[index][value][start:stop])
        self._deal(sent, received, self._tags[1], "return from the owners of matrices")
        self._give(sent)
        self._taken += [message.buffer for message in received]
        found = {key: part for message in received for key, part in message.parts.items()}
        return [
            [found[index, v] for v in range(len(dtypes[index]))]
            if index not in results
            else self._own(index, results[index])
            for index in self._held
        ]

    def release(self) -> None:
        """Give back what is kept for the update."""
        for buffer in self._taken:
            self._ledger.give("gradients", buffer)
        self._taken.clear()

    @property
    def _ranks(self) -> range:
        return range(self._group.size)

    def _going(self, rank: int, owner: int) -> list[int]:
        """The tensors of which ``rank`` sends its piece to ``owner``."""
        return [i for i, place in enumerate(self._at) if place.owner == owner and place.goes_in(rank)]

    def _coming(self, rank: int, owner: int) -> list[int]:
        """The tensors of which ``owner`` sends its piece to ``rank``."""
        return [i for i, place in enumerate(self._at) if place.owner == owner and place.comes_back(rank)]

    def _own(self, index: int, values: Sequence[Tensor]) -> list[Tensor]:
        start, stop = self._at[index].spans[self._group.rank]
        return [whole[start:stop] for whole in values]

    def _put(self, wholes: Sequence[Tensor], index: int, rank: int, pieces: Sequence[Tensor]) -> None:
        start, stop = self._at[index].spans[rank]
        for whole, piece in zip(wholes, pieces, strict=True):
            whole[start:stop].copy_(piece)

    def _message(self, indices: list[int], rank: int, dtypes: Dtypes) -> "_Message":
        """The pieces of ``rank`` of some tensors."""
        sizes = [(i, v, self._at[i].held(rank), dtype) for i in indices for v, dtype in enumerate(dtypes[i])]
        sizes.sort(key=lambda size: -size[3].itemsize)
        buffer = self._ledger.take(
            "gradients", sum(numel * dtype.itemsize for _, _, numel, dtype in sizes), torch.uint8
        )
        return _Message(buffer, dict(_cut(buffer, sizes)))

    def _deal(self, sent: list["_Message"], received: list["_Message"], tag: int, what: str) -> None:
        label = f"{what} in step {self._step}"
        outgoing, incoming = ([message.buffer for message in side] for side in (sent, received))
        self._group.deal(outgoing, incoming, tag=tag, label=label).wait()

    def _take(self, numel: int, dtype: torch.dtype) -> Tensor:
        buffer = self._ledger.take("gradients", numel, dtype)
        self._taken.append(buffer)
        return buffer

    def _give(self, *sides: list["_Message"]) -> None:
        for side in sides:
            for message in side:
                self._ledger.give("gradients", message.buffer)


@dataclass(frozen=True)
class _Message:
    """Bytes between two ranks, and the pieces in them by (tensor, value): wide ones first, so that all are aligned."""

    buffer: Tensor
    parts: dict[tuple[int, int], Tensor]


def _cut(buffer: Tensor, sizes: list[tuple[int, int, int, torch.dtype]]) -> Iterator[tuple[tuple[int, int], Tensor]]:
    at = 0
    for index, value, numel, dtype in sizes:
        end = at + numel * dtype.itemsize
        yield (index, value), buffer[at:end].view(dtype)
        at = end


def moving_bytes(at: Sequence[Place], moved: Sequence[tuple[int, int]], rank: int) -> tuple[int, int]:
    """(the most that a rank holds of what travels, what it sends); ``moved``: bytes of an element in and back."""
    out = sum(p.held(rank) * into for p, (into, _) in zip(at, moved, strict=True) if p.goes_in(rank))
    come = sum(
        (p.numel - p.held(rank)) * into for p, (into, _) in zip(at, moved, strict=True) if p.cut and p.owner == rank
    )
    owned = [(p, into, back) for p, (into, back) in zip(at, moved, strict=True) if p.owner == rank]
    wholes, results = sum(p.numel * into for p, into, _ in owned), sum(p.numel * back for p, _, back in owned)
    returned = sum(p.held(r) * back for p, _, back in owned for r in range(len(p.spans)) if p.comes_back(r))
    got = sum(p.held(rank) * back for p, (_, back) in zip(at, moved, strict=True) if p.comes_back(rank))
    return max(out + come + wholes, wholes + results, results + returned + got), out + returned
