"""Which modules of a model are running, and which units backward is done with.

[Note: when backward is done with a unit] Of the operations that are ready, autograd runs the one recorded last. So when
it reaches an output of some call, everything that was recorded after that call has run: a unit whose calls all began
later is not needed any more, whether its parameters are trained, frozen or unused. Backward passes inside backward
passes (reentrant checkpoints) are numbered upwards by autograd, so those with a higher number are over.

Nothing here gathers or frees.
"""

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(slots=True)
class Pass:
    """One outermost call with all calls inside it. ``first``: when each unit was used first, by the clock;
    ``recorded``: whether it is more than an evaluation without gradients.
    """

    recorded: bool
    first: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Call:
    """A call of a module: of the unit ``order``, or of a part of the root unit. It lasted from ``start`` to ``end``."""

    order: int
    module: nn.Module
    start: int
    within: Pass
    enters: bool
    """Whether the user calls it; not a module around it, nor a checkpoint in a backward pass."""
    end: int = 0
    reached_by: int = -1
    """The last backward pass that has come to one of its outputs."""


class _Uses:
    """The units that were used since the last backward pass, and those that were so more than once."""

    def __init__(self) -> None:
        self.again: set[int] = set()
        self._seen: set[tuple[int, int]] = set()

    def count(self, order: int, user: Call) -> None:
        use = (order, id(user.module))
        if user.order != order or use in self._seen:
            self.again.add(order)
        self._seen.add(use)

    def clear(self) -> None:
        self.again.clear()
        self._seen.clear()


class Calls:
    """The calls that are running, the outermost first; and which units use parameters of other units."""

    def __init__(self, units: int) -> None:
        self.running: list[Call] = []
        self.needs: list[set[int]] = [set() for _ in range(units)]
        """For each unit the others whose parameters its own forward uses, as found so far."""
        self._entrances: set[int] = set()
        self._clock = 0
        self._all, self._recorded = _Uses(), _Uses()

    def enter(self, order: int, module: nn.Module, *, repeats: bool) -> Call:
        """``repeats``: in a backward pass, where only modules that were called by themselves are entered again."""
        if not (self.running or repeats):
            self._entrances.add(id(module))
        within = self.running[-1].within if self.running else Pass(torch.is_grad_enabled())
        self._clock += 1
        call = Call(order, module, self._clock, within, not self.running and id(module) in self._entrances)
        self.running.append(call)
        for used in (order, *self.needs[order]):
            within.first.setdefault(used, call.start)
            if not repeats:
                self._count_use(used, call)
        return call

    def leave(self, module: nn.Module) -> Call | None:
        """The call of ``module`` that ends; None if it was not the last to begin."""
        if not self.running or self.running[-1].module is not module:
            return None
        call = self.running.pop()
        self._clock += 1
        call.end = self._clock
        return call

    def note_use(self, order: int) -> None:
        """The unit that runs uses parameters of unit ``order``."""
        user = self.running[-1]
        if user.order != order:
            self.needs[user.order].add(order)
            user.within.first.setdefault(order, user.start)
            self._count_use(order, user)

    def are_several(self, order: int) -> bool:
        """Whether a parameter may have been used in several checkpoints: by several modules, or in several calls."""
        return order == 0 or order in self._all.again

    @property
    def repeated(self) -> set[int]:
        """The units that were used more than once since the last backward pass; evaluations do not count."""
        return self._recorded.again

    def end_backward(self) -> None:
        """Count the uses anew."""
        self._all.clear()
        self._recorded.clear()

    def _count_use(self, order: int, user: Call) -> None:
        self._all.count(order, user)
        if user.within.recorded:
            self._recorded.count(order, user)

    def busy(self) -> set[int]:
        """The units that running calls need."""
        orders = {call.order for call in self.running}
        return orders.union(*(self.needs[order] for order in orders))


class Live:
    """The units that may be whole during a backward pass, and the earliest use of each that it has reached."""

    def __init__(self) -> None:
        self._begun: dict[int, tuple[float, int]] = {}

    def begin_pass(self, whole: list[int]) -> None:
        self._begun = dict.fromkeys(whole, _NOT_REACHED)

    def add(self, orders: list[int]) -> None:
        """These are gathered too."""
        for order in orders:
            self._begun.setdefault(order, _NOT_REACHED)

    def reached(self, order: int, start: float, task: int) -> None:
        """The pass numbered ``task`` needs the unit for a call that began at ``start``."""
        earliest, first_task = self._begun.get(order, _NOT_REACHED)
        self._begun[order] = min(earliest, start), min(first_task, task)

    def take_done(self, call: Call | None, task: int, still_needed: set[int]) -> list[int]:
        """The units but the root that the pass ``task``, now at ``call``, is done with; they are live no more."""
        done = [
            order
            for order, (start, begun) in self._begun.items()
            if order not in still_needed
            and order
            and (task < begun < _NEVER or (call and _is_later(call, order, start)))
        ]
        for order in done:
            del self._begun[order]
        return done


def _is_later(call: Call, order: int, start: float) -> bool:
    """Whether every use of a unit, the earliest that was reached being at ``start``, was later than ``call``."""
    return start > call.end and call.within.first.get(order, start) > call.end


_NEVER = 1 << 62
_NOT_REACHED = (float("inf"), _NEVER)
