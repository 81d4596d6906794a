"""What the host works out of one tensor between phases: rows and columns, what is made of them, and states of those.

A plan is made once for each kind of tensor: which values are computed before which phase. Values of rows and columns
are numpy arrays in the compute dtype; what is one number stays with `scalars`. It takes time for each row and column,
never for each element. Nothing here runs a phase, and nothing is stored before all is known. Whoever calls this is in
`evaluation.exactly`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardstep.rules.backends import blocks
from shardstep.rules.backends.elements import constant, evaluate
from shardstep.rules.backends.evaluation import reduce
from shardstep.rules.backends.rounding import NUMPY, read, write
from shardstep.rules.ir import OPERATIONS, Phases, Vector
from shardstep.rules.passes.split import hosted_values, is_swept
from shardstep.rules.scalars import Scalars, compile_scalars
from shardstep.rules.view import View

Array = NDArray[np.generic]


class HostPlan:
    """``steps[i]``: the numbers of what is computed before phase i, in order; the last entry, before the stores."""

    def __init__(self, phases: Phases, compute: torch.dtype) -> None:
        self.program, self.compute = phases.program, compute
        self.hosted = hosted_values(self.program)
        self.stores = tuple((name, n) for name, n in self.program.stores if self.program.shapes[name] != "element")
        self.scalars: dict[int, Scalars] = {}
        self.steps: list[list[int]] = []
        seen = set[int]()
        wanted = [[*phase.scalars, *(vector.number for vector in phase.vectors)] for phase in phases.phases]
        for numbers in (*wanted, [number for _, number in self.stores]):
            self.steps.append(self._steps(numbers, seen))
        for _, number in self.stores:
            self._scalar(number)

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to do that is not one number for all."""
        lines = any(line.type.shape in ("row", "column") for line in self.program.instructions)
        return lines or bool(self.stores) or any(self.steps)

    def _steps(self, wanted: Sequence[int], seen: set[int]) -> list[int]:
        """Which of ``wanted``, and of what they are made of, were not ``seen`` before and are worked out here."""
        new, stack = set[int](), list(wanted)
        while stack:
            number = stack.pop()
            if number in seen:
                continue
            seen.add(number)
            line = self.program.instructions[number]
            if is_swept(self.program, number):
                continue
            stack += line.arguments
            if not line.type.is_single:
                new.add(number)
                for argument in line.arguments:
                    self._scalar(argument)
            elif line.operation == "load" or OPERATIONS[line.operation].family == "reduction":
                new.add(number)
        return sorted(new)

    def _scalar(self, number: int) -> None:
        line = self.program.instructions[number]
        if line.type.is_single and self.hosted[number] and number not in self.scalars:
            self.scalars[number] = compile_scalars(self.program, (number,))


class HostValues:
    """Those of one tensor. ``known``: its numbers so far, and those to come: of reductions and states, by number."""

    def __init__(
        self,
        plan: HostPlan,
        view: View,
        hypers: Mapping[str, object],
        states: Mapping[str, Tensor],
        known: dict[int, float],
    ) -> None:
        self._plan, self._view, self._hypers, self._states, self._known = plan, view, hypers, states, known
        self._values: dict[int, Array] = {}

    def take(self, number: int, whole: Tensor) -> None:
        """Note a reduction that a phase has made: the block sums of the tensor, or what all of its lines have."""
        line, found = self._plan.program.instructions[number], whole.cpu().numpy()
        if line.type.shape == "tensor":
            self._known[number] = float(blocks.combine(line.operation, found))
            return
        self._values[number] = found.astype(NUMPY[self._plan.compute]).reshape(self._view.extent(line.type.shape))

    def advance(self, stage: int) -> None:
        """Work out what comes before a phase. Raises RuleError if a per-step scalar has no value."""
        for number in self._plan.steps[stage]:
            value = self._value(number)
            if self._plan.program.instructions[number].type.is_single:
                self._known[number] = float(value)
            else:
                self._values[number] = value

    def vectors(self, wanted: Sequence[Vector]) -> tuple[Tensor, ...]:
        """As a kernel takes them."""
        return tuple(map(self._vector, wanted))

    def store(self) -> list[tuple[Tensor, Array]]:
        """The states of rows, columns and the tensor, with what is to be written to each."""
        return [(self._states[name], self._stored(name, number)) for name, number in self._plan.stores]

    def _vector(self, vector: Vector) -> Tensor:
        values, view = self._values[vector.number], self._view
        if vector.anchors:
            values = blocks.anchors(values, view.terms(vector.shape))
        if values.shape != view.extent(vector.shape):
            values = np.broadcast_to(values, view.extent(vector.shape))
        return torch.from_numpy(np.array(values).reshape(-1))

    def _stored(self, name: str, number: int) -> Array:
        value = self._array(number)
        if extent := self._view.extent(self._plan.program.shapes[name]):
            value = np.broadcast_to(value.astype(NUMPY[self._plan.compute], copy=False), extent)
        return np.array(value).reshape(tuple(self._states[name].shape))

    def _value(self, number: int) -> Array:
        line, compute = self._plan.program.instructions[number], self._plan.compute
        if line.operation == "load":
            state = self._states[str(line.attributes[0])]
            extent = self._view.extent(line.type.shape)
            return read(state, compute).reshape(extent) if extent else np.asarray(state.item())
        arguments = [self._array(argument) for argument in line.arguments]
        if OPERATIONS[line.operation].family == "reduction":
            return reduce(line, arguments, compute, 0)
        return evaluate(line, arguments, compute)

    def _array(self, number: int) -> Array:
        """The value of what an instruction takes: one that was worked out, one number, or words of one number."""
        if number in self._values:
            return self._values[number]
        line = self._plan.program.instructions[number]
        if line.operation == "const":
            return constant(line, self._plan.compute)
        if number in self._plan.scalars:
            return np.asarray(self._plan.scalars[number](self._hypers, self._known)[0])
        return evaluate(line, [self._array(argument) for argument in line.arguments], self._plan.compute)


def write_states(stores: Sequence[tuple[Tensor, Array]]) -> None:
    """Do what `HostValues.store` has asked for."""
    for state, values in stores:
        write(values, state)
