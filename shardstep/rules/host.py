"""What the host works out between phases: of rows and columns, what is made of them, and states of those.

A plan is made once for each kind of tensor: which values are computed before which phase. Tensors that are updated
alike, and have one shape, go through it together, since models have many of them: their values of rows and columns are
numpy arrays in the compute dtype, with one axis more for the tensors. It takes time for each row and column, never for
each element. Nothing here runs a phase, and nothing is stored before all is known. Whoever calls this is in
`evaluation.exactly`.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardstep.rules.backends import blocks
from shardstep.rules.backends.elements import constant, evaluate
from shardstep.rules.backends.evaluation import reduce
from shardstep.rules.backends.rounding import NUMPY, read, write
from shardstep.rules.ir import OPERATIONS, Phases, Program, Vector
from shardstep.rules.passes.elementary import ELEMENTARY
from shardstep.rules.passes.split import hosted_values, is_swept
from shardstep.rules.scalars import Scalars, compile_scalars
from shardstep.rules.view import View

Array = NDArray[np.generic]


class HostPlan:
    """``steps[i]``: the numbers of what is computed before phase i, in order; the last entry, before the stores."""

    def __init__(self, phases: Phases, compute: torch.dtype) -> None:
        self.program, self.compute = phases.program, compute
        self.hosted = hosted_values(self.program)
        self.varying = _varying(self.program)
        """Which values differ between tensors that are updated alike."""
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


class HostTable:
    """The values of tensors that are updated alike: of one plan, view and hyper-parameters.

    Those that are one number for each tensor have the shape (tensors, 1, 1, 1), or () where all have the same; the
    others have the view's extent for each tensor.
    """

    def __init__(self, plan: HostPlan, view: View, hypers: Mapping[str, object]) -> None:
        self._plan, self._view, self._hypers = plan, view, hypers
        self._states: list[Mapping[str, Tensor]] = []
        self._known: list[dict[int, float]] = []
        self._taken: dict[int, dict[int, Array]] = {}
        self._values: dict[int, Array] = {}
        self._vectors: dict[Vector, tuple[Tensor, ...]] = {}
        self._stage = 0

    def add(self, states: Mapping[str, Tensor], known: dict[int, float]) -> int:
        """One more tensor; its place. ``known``: its numbers so far, and those to come, by number."""
        self._states.append(states)
        self._known.append(known)
        return len(self._known) - 1

    def take(self, place: int, number: int, whole: Tensor) -> None:
        """Note a reduction that a phase has made: the block sums of the tensor, or what all of its lines have."""
        self._taken.setdefault(number, {})[place] = whole.cpu().numpy()

    def advance(self, stage: int) -> None:
        """Work out what comes before a phase, if that is not done. All that earlier phases have made was taken.

        Raises RuleError if a per-step scalar has no value.
        """
        while self._stage <= stage:
            for number, found in self._taken.items():
                self._join(number, [found[place] for place in range(len(self._known))])
            self._taken.clear()
            for number in self._plan.steps[self._stage]:
                self._keep(number, self._value(number))
            self._stage += 1

    def vectors(self, place: int, wanted: Sequence[Vector]) -> tuple[Tensor, ...]:
        """Those of one tensor, as a kernel takes them."""
        return tuple(self._vector(vector)[place] for vector in wanted)

    def store(self) -> list[tuple[list[Tensor], Array]]:
        """The states of rows, columns and tensors, with what is to be written to those of all tensors."""
        return [([own[name] for own in self._states], self._stored(name, n)) for name, n in self._plan.stores]

    def _join(self, number: int, found: list[Array]) -> None:
        line = self._plan.program.instructions[number]
        if line.type.shape == "tensor":
            self._keep(number, np.asarray(_combined(line.operation, found)))
        else:
            lines = np.stack(found).astype(NUMPY[self._plan.compute])
            self._values[number] = lines.reshape(len(found), *self._view.extent(line.type.shape))

    def _keep(self, number: int, value: Array) -> None:
        if self._plan.program.instructions[number].type.is_single:
            value = value.reshape(-1, 1, 1, 1)
            for known, own in zip(self._known, value.reshape(-1), strict=True):
                known[number] = float(own)
        self._values[number] = value

    def _vector(self, vector: Vector) -> tuple[Tensor, ...]:
        if vector not in self._vectors:
            values = self._array(vector.number)
            if vector.anchors:
                values = blocks.anchors(values, self._view.terms(vector.shape))
            whole = np.array(np.broadcast_to(values, (len(self._known), *self._view.extent(vector.shape))))
            self._vectors[vector] = torch.from_numpy(whole.reshape(len(whole), -1)).unbind()
        return self._vectors[vector]

    def _stored(self, name: str, number: int) -> Array:
        value, extent = self._array(number), self._view.extent(self._plan.program.shapes[name])
        if extent:
            value = value.astype(NUMPY[self._plan.compute], copy=False)
        return np.broadcast_to(value, (len(self._known), *(extent or (1, 1, 1))))

    def _value(self, number: int) -> Array:
        """Of a state, a reduction of lines, or what is made of lines."""
        line, compute = self._plan.program.instructions[number], self._plan.compute
        if line.operation == "load":
            states = torch.stack([own[str(line.attributes[0])] for own in self._states])
            extent = self._view.extent(line.type.shape)
            values = read(states, compute) if extent else states.double().numpy()
            return values.reshape(len(states), *extent)
        arguments = [self._array(argument) for argument in line.arguments]
        if OPERATIONS[line.operation].family == "reduction" and line.type.shape != "tensor":
            return reduce(line, arguments, compute, 0)
        if line.type.shape == "tensor" or line.operation in ELEMENTARY:
            return self._one_by_one(number, arguments)
        return evaluate(line, arguments, compute)

    def _one_by_one(self, number: int, arguments: list[Array]) -> Array:
        """What must not see several tensors at once."""
        line, compute, made = self._plan.program.instructions[number], self._plan.compute, list[Array]()
        single = [self._plan.program.instructions[argument].type.is_single for argument in line.arguments]
        for place in range(len(self._known)):
            own = [value[place] if value.ndim else value for value in arguments]
            own = [value.reshape(()) if alone else value for value, alone in zip(own, single, strict=True)]
            reduces = OPERATIONS[line.operation].family == "reduction"
            made.append(reduce(line, own, compute, 0) if reduces else evaluate(line, own, compute))
        return np.stack(made)

    def _array(self, number: int) -> Array:
        """The value of what an instruction takes: one that was worked out, one number, or words of one number."""
        if number not in self._values:
            self._values[number] = self._made(number)
        return self._values[number]

    def _made(self, number: int) -> Array:
        plan, line = self._plan, self._plan.program.instructions[number]
        if line.operation == "const":
            return constant(line, plan.compute)
        if number not in plan.scalars:
            return evaluate(line, [self._array(argument) for argument in line.arguments], plan.compute)
        if number not in plan.varying:
            return np.asarray(plan.scalars[number](self._hypers, self._known[0])[0])
        found = [plan.scalars[number](self._hypers, known)[0] for known in self._known]
        return np.asarray(found).reshape(-1, 1, 1, 1)


def write_states(stores: Iterable[tuple[list[Tensor], Array]]) -> None:
    """Do what `HostTable.store` has asked for."""
    for states, values in stores:
        rounded = torch.empty(values.shape, dtype=states[0].dtype)
        write(values, rounded)
        pairs = zip(rounded.to(states[0].device), states, strict=True)
        torch._foreach_copy_(states, [own.view(state.shape) for own, state in pairs])


def _varying(program: Program) -> frozenset[int]:
    """What is made of a tensor's states and sums."""
    found = set[int]()
    for number, line in enumerate(program.instructions):
        own = line.operation == "load" or OPERATIONS[line.operation].family == "reduction"
        if own or not found.isdisjoint(line.arguments):
            found.add(number)
    return frozenset(found)


def _combined(operation: str, found: Sequence[Array]) -> list[float]:
    """Of each tensor, its block sums as one; those of equally many blocks together."""
    made = [0.0] * len(found)
    by_length: dict[int, list[int]] = {}
    for place, parts in enumerate(found):
        by_length.setdefault(len(parts), []).append(place)
    for places in by_length.values():
        for place, value in zip(
            places, blocks.combine(operation, np.stack([found[p] for p in places], axis=1)), strict=True
        ):
            made[place] = float(value)
    return made
