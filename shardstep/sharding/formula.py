"""The bytes of a step on one rank, by arithmetic: the formula that the engine's buffers are held to.

Persistent bytes follow from the stages alone. What is in flight follows from the order of events: gathers run
`prefetch` units ahead of the declared order; leaves complete from the last unit to the first, the root's
last; the exchanges of one unit are on their way at a time. Exact when every parameter gets a gradient, each unit's
leaf is complete before the unit before it begins, a unit of several spaces gets its gradients in the reverse of the
order in which its parameters are registered, and under the schedule per step the last micro-batch is known
(`micro_batches` and `expect` say so; another loop sends everything in `step()`, as any does without
`overlap_grad_reduce`). With updates in backward, each unit is used once in the last micro-batch. Nothing here
allocates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardstep.config import Precision, Schedule, Stage
from shardstep.layout import Layout
from shardstep.rules.binding import stored_arrays
from shardstep.sharding.hooks import begins_backward
from shardstep.sharding.memory import Bytes, Ledger
from shardstep.sharding.ownership import Place, moving_bytes, places_by_rule
from shardstep.sharding.reduce import Home, Partial, Tree
from shardstep.sharding.tensor_states import States, dtype_of, in_all, in_some, kept_numel


@dataclass(frozen=True)
class SpaceSize:
    """What the formula needs to know of a space. ``rule``: the number of its rule; ``moved``: for one with matrix
    products, the bytes of an element of each tensor that go to its owner and that come back; ``order``: the places of
    its parameters among the model's, of which backward reaches the last ones first; ``elementwise``: whether its rule
    sees single elements only; ``averages``: how many are kept of it.
    """

    layout: Layout
    precision: Precision
    trained: bool
    stage: Stage
    states: States
    rule: int = 0
    moved: tuple[tuple[int, int], ...] = ()
    order: tuple[int, ...] = ()
    elementwise: bool = False
    averages: int = 0


@dataclass(frozen=True)
class Formula:
    """``units`` holds the spaces of each unit in declared order, the root first. ``in_backward``: whether spaces are
    updated there where they can be.
    """

    units: list[list[SpaceSize]]
    world_size: int
    own_leaves: int
    prefetch: int
    schedule: Schedule
    rank: int
    overlap_grad_reduce: bool = True
    in_backward: bool = False

    def unsharded(self) -> "Formula":
        """The same training on one rank, at stage 0."""
        units = [[replace(space, stage=Stage(False, False, False)) for space in unit] for unit in self.units]
        return replace(self, units=units, world_size=1, rank=0, own_leaves=self.own_leaves * self.world_size)

    def peak(self) -> Bytes:
        """Peak bytes on one rank while training with ``own_leaves`` micro-batches a step."""
        return Bytes(self._parameters(), self._gradients(), self._state())

    def traffic(self) -> int:
        """Bytes that one rank sends in a step to gather, exchange and publish (norms and control left out)."""
        return sum(sent for _, sent in self._moving().values()) + sum(
            self._sent(space, 1 if begins_backward(order, len(self.units), self.prefetch) else 2)
            for order, unit in enumerate(self.units)
            for space in unit
        )

    # - the terms

    def _spaces(self) -> Iterator[SpaceSize]:
        return (space for unit in self.units for space in unit)

    def _trained(self) -> list[SpaceSize]:
        return [space for space in self._spaces() if space.trained]

    def _padded(self, space: SpaceSize) -> int:
        return space.layout.padded_numel(self.world_size)

    def _shard(self, space: SpaceSize) -> int:
        return space.layout.shard_numel(self.world_size)

    def _owned(self, space: SpaceSize) -> int:
        return self._shard(space) if space.stage.shard_state else self._padded(space)

    def _parameters(self) -> int:
        """Shards or whole spaces, and the most that is gathered at once: the root and a window of units."""
        held = sum(
            (self._shard(space) if space.stage.shard_params else self._padded(space)) * space.precision.params.itemsize
            for space in self._spaces()
        )
        gathered = [
            sum(self._padded(s) * s.precision.params.itemsize for s in unit if s.stage.shard_params)
            for unit in self.units
        ]
        root, rest = gathered[0], gathered[1:]
        windows = [sum(rest[start : start + 1 + self.prefetch]) for start in range(len(rest))]
        return held + root + max(windows, default=0)

    def _state(self) -> int:
        """The rule's states, the averages and, for low-precision parameters, the master."""
        return sum(self._state_bytes(space, there) for space, there in self._places())

    def _places(self) -> list[tuple[SpaceSize, list[Place]]]:
        """Where the tensors of each trained space would be put together."""
        trained = self._trained()
        described = [(space.rule, space.layout, space.stage) for space in trained]
        return list(zip(trained, places_by_rule(described, self.world_size), strict=True))

    def _state_bytes(self, space: SpaceSize, there: list[Place]) -> int:
        precision, owned = space.precision, self._owned(space)
        kept = owned * space.averages * precision.compute.itemsize
        kept += owned * precision.master.itemsize if precision.master != precision.params else 0
        arrays = [(declared, array) for declared in in_all(space.states) for array in stored_arrays(declared)]
        kept += sum(
            owned // a.per * (a.dtype or dtype_of(declared, precision.compute)).itemsize for declared, a in arrays
        )
        first = self.rank * owned if space.stage.shard_state else 0
        by_tensor = sum(
            kept_numel(declared, slot, slice(first, first + owned), place.owner == self.rank)
            * dtype_of(declared, precision.compute).itemsize
            for declared in in_some(space.states)
            for slot, states, place in zip(space.layout.slots, space.states, there, strict=True)
            if declared in states
        )
        return kept + by_tensor

    def _gradients(self) -> int:
        """Kept leaves, partial sums, and what is in flight, followed through the events of one step."""
        ledger = Ledger(torch.device("meta"))
        spaces = [[_Leaves(space, self, ledger) for space in unit if space.trained] for unit in self.units]
        root, rest = spaces[0], [unit[::-1] for unit in spaces[1:] if unit]
        for leaf in range(self.own_leaves):
            last = leaf == self.own_leaves - 1
            sends = self.schedule == "per leaf" or (self.overlap_grad_reduce and last)
            flying: list[_Leaves] = []
            for unit in [*reversed(rest), root]:
                updates = self.in_backward and last and unit is not root
                landing, flying = flying, []
                if updates and self.world_size == 1:  # when backward reaches this unit; else when their sums are here
                    for leaves in landing:
                        leaves.update()
                for leaves in root:
                    leaves.open()
                for leaves in _completed(unit) if unit is not root else _closed(root):
                    if sends:
                        while landing:
                            landing[0].land()
                            if updates:
                                landing[0].update()
                            landing.pop(0)
                        flying.append(leaves)
                        leaves.launch()
                flying = landing + flying
            for leaves in flying:
                leaves.land()
            ledger.drop_spare()
        if not self.overlap_grad_reduce:
            _send_at_once([*reversed(rest), root])
            ledger.drop_spare()
        for unit in spaces:
            for leaves in unit:
                if len(leaves.tree):
                    leaves.tree.total()
        sums = [(leaves.whole_sum(), leaves.moves_with) for unit in spaces for leaves in unit]
        single = [bytes_ for bytes_, rule in sums if rule is None]
        pairs = [sum(single[start : start + 2]) for start in range(len(single))]
        together = [
            sum(bytes_ for bytes_, own in sums if own == rule) + held for rule, (held, _) in self._moving().items()
        ]
        ledger.count("gradients", max([*pairs, *together], default=0))
        return ledger.peak.gradients

    def _moving(self) -> dict[int, tuple[int, int]]:
        """For each rule with matrix products, which are updated one after the other: the bytes that owners of whole
        tensors need at most, and those that this rank sends for them.
        """
        moving = [(space, there) for space, there in self._places() if space.moved]
        found = {}
        for rule in {space.rule for space, _ in moving} if self.world_size > 1 else ():
            own = [(space, there) for space, there in moving if space.rule == rule]
            moved = [bytes_ for space, _ in own for bytes_ in space.moved]
            found[rule] = moving_bytes([place for _, there in own for place in there], moved, self.rank)
        return found

    def _sent(self, space: SpaceSize, gathers: int) -> int:
        """Every run goes to every peer: one copy of a shard for each of the others.

        ``gathers``: how often a micro-batch gathers the parameters, once if they stay whole over the turn.
        """
        one_gather = self._shard(space) * (self.world_size - 1)
        params, reduce = space.precision.params.itemsize, space.precision.reduce.itemsize
        sent = gathers * self.own_leaves * one_gather * params if space.stage.shard_params else 0
        if not space.trained:
            return sent
        if self.schedule == "per leaf" or self.own_leaves == 1:
            sent += self.own_leaves * one_gather * reduce
        else:
            sent += one_gather * space.precision.sums.itemsize
        if not space.stage.shard_state:
            return sent + one_gather * space.precision.sums.itemsize
        return sent if space.stage.shard_params else sent + one_gather * params


class _Leaves:
    """The gradient buffers of one space, counted without memory."""

    def __init__(self, space: SpaceSize, formula: Formula, ledger: Ledger) -> None:
        self._space, self._ledger = space, ledger
        self._updates = space.elementwise and (space.stage.shard_state or formula.world_size == 1)
        self._world_size, self._rank = formula.world_size, formula.rank
        self._padded = space.layout.padded_numel(formula.world_size)
        self._shard = space.layout.shard_numel(formula.world_size)
        self.tree, self._local = (Tree(ledger, space.precision.sums) for _ in range(2))
        self._kept = None if space.stage.shard_grads else self._take(self._padded, space.precision.reduce)
        self._leaf: Tensor | None = None
        self._sent: Partial | None = None
        self._received: list[Tensor] = []
        self.order = space.order or tuple(range(len(space.layout.slots)))

    def is_complete(self, place: int) -> bool:
        """Whether all gradients are there when that of the parameter at ``place`` has arrived."""
        return place <= min(self.order)

    def open(self) -> None:
        if self._leaf is None and self._kept is not None:
            self.tree.settle()
            self._local.settle()
            self._leaf = self._kept
        elif self._leaf is None:
            self._leaf = self._take(self._padded, self._space.precision.reduce)

    def close(self) -> None:
        assert self._leaf is not None
        self._local.push(self._leaf, home="tree" if self._kept is None else "kept")
        self._leaf = None

    def launch(self) -> None:
        sent = self._local.hand_over()
        if self._world_size == 1:
            self.tree.push(sent.values, home=sent.home, level=sent.level)
            return
        self._sent = sent
        self._received = [self._take(self._shard, sent.values.dtype) for _ in range(self._world_size - 1)]

    def land(self) -> None:
        sent, self._sent = self._sent, None
        if sent is None:
            return
        own: Home = "kept" if sent.home == "kept" else "passing"
        for values in self._received[: self._rank]:
            self.tree.push(values, home="tree", level=sent.level)
        self.tree.push(sent.values[: self._shard], home=own, level=sent.level)
        for values in self._received[self._rank :]:
            self.tree.push(values, home="tree", level=sent.level)
        if sent.home == "tree":
            self.tree.settle()
            self._ledger.spare(sent.values)

    def update(self) -> None:
        """The sum is used up in backward, if it can be."""
        if self._updates and len(self.tree):
            self.tree.total()
            self.tree.clear()

    @property
    def moves_with(self) -> int | None:
        """The rule whose tensors are updated whole, all spaces at once, if it has that one."""
        return self._space.rule if self._space.moved else None

    def whole_sum(self) -> int:
        """Bytes of the gathered sum that stage 0 needs besides its kept leaf."""
        if self._space.stage.shard_state or self._world_size == 1:
            return 0
        total = self.tree.total().values
        if total.dtype == self._space.precision.reduce:
            return 0
        return self._padded * total.dtype.itemsize

    def _take(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._ledger.take("gradients", numel, dtype)


def _send_at_once(units: list[list[_Leaves]]) -> None:
    """What the step sends, unit by unit; each when the one before it has landed."""
    flying: list[_Leaves] = []
    for unit in units:
        for leaves in flying:
            leaves.land()
        for leaves in unit:
            leaves.launch()
        flying = unit
    for leaves in flying:
        leaves.land()


def _closed(root: list[_Leaves]) -> Iterator[_Leaves]:
    """The root's leaves, which are open all the time, when their turn comes."""
    for leaves in root:
        leaves.close()
        yield leaves


def _completed(unit: list[_Leaves]) -> Iterator[_Leaves]:
    """Open and close the leaves of a unit as gradients arrive, the last parameter's first; each when its turn comes."""
    arriving = sorted(((place, leaves) for leaves in unit for place in leaves.order), key=lambda pair: -pair[0])
    turns = list(unit)
    for place, leaves in arriving:
        leaves.open()
        if leaves.is_complete(place):
            leaves.close()
        while turns and turns[0].is_complete(place):
            yield turns.pop(0)
