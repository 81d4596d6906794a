"""A whole program evaluated in numpy on one tensor, one instruction after another. It is what programs mean.

Every shape of the language is known here. It is slow, and the same on every machine; arrays of other devices come to
the CPU. Matrix products are taken in float64 on aligned copies and rounded once, so that float32 results hardly ever
show in which order a library sums.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardstep.rules import ir, scalars
from shardstep.rules.backends import blocks
from shardstep.rules.backends.elements import WORD, constant, evaluate
from shardstep.rules.backends.rounding import NUMPY, read, write
from shardstep.rules.scalars.arithmetic import ARITHMETIC, fault
from shardstep.rules.scalars.evaluate import no_value
from shardstep.rules.view import view_of

Array = NDArray[Any]

_UNIFORM: Final = ir.Type("real", "uniform")


@contextmanager
def exactly() -> Iterator[None]:
    """Denormals are kept, whatever this thread was told; and NaN and inf come silently."""
    flushes = np.float64(1e-40).astype(np.float32) == 0
    if flushes:
        torch.set_flush_denormal(False)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        if flushes:
            torch.set_flush_denormal(True)


class Evaluation:
    """One program on one tensor, which is seen as a batch of matrices: see `view`.

    Uniform and tensor values are arrays without dimensions.
    """

    def __init__(
        self,
        program: ir.Program,
        arrays: Mapping[str, Tensor],
        hypers: Mapping[str, object],
        compute: torch.dtype,
        offset: int = 0,
    ) -> None:
        self._program, self._arrays, self._hypers = program, arrays, hypers
        self._compute, self._offset = compute, offset
        self._view = view_of(tuple(arrays["param"].shape))

    def run(self, *, keep_all: bool) -> list[Array]:
        """The value of every instruction. Unless ``keep_all``, those that no later one needs are let go."""
        values: list[Any] = []
        last = last_uses(self._program)
        for number, line in enumerate(self._program.instructions):
            values.append(self._value(number, line, [values[a] for a in line.arguments]))
            for argument in line.arguments if not keep_all else ():
                if last[argument] == number and not self._program.instructions[argument].type.is_single:
                    values[argument] = None
        return values

    def stored(self, name: str, value: Array) -> Tensor:
        """What the array becomes if it is given ``value``."""
        old = self._arrays[name].detach()
        new = torch.empty_like(old, memory_format=torch.contiguous_format)
        if extent := self._view.extent(self._program.shapes[name]):
            value = value.astype(NUMPY[self._compute], copy=False)
        write(np.broadcast_to(value, extent).reshape(old.shape), new)
        return new

    def refuse_scalars_without_value(self, values: Sequence[Array]) -> None:
        """Raise RuleError for the first uniform value that has none (see `scalars.arithmetic.fault`).

        Only what the stores need counts: a branch that was not chosen may divide by zero.
        """
        for number in sorted(self._needed(values)):
            line = self._program.instructions[number]
            if line.type == _UNIFORM and line.operation in ARITHMETIC:
                given = [float(values[a]) for a in line.arguments]
                if (wrong := fault(line.operation, given, float(values[number]))) is not None:
                    raise no_value(self._program, number, wrong, self._hypers)

    def _needed(self, values: Sequence[Array]) -> set[int]:
        needed, waiting = set[int](), [value for _, value in self._program.stores]
        while waiting:
            number = waiting.pop()
            if number not in needed:
                needed.add(number)
                line = self._program.instructions[number]
                arguments = line.arguments
                if line.operation == "choose" or (line.operation == "where" and line.type.is_single):
                    arguments = (arguments[0], arguments[1] if values[arguments[0]] else arguments[2])
                waiting.extend(arguments)
        return needed

    def _value(self, number: int, line: ir.Instruction, arguments: list[Array]) -> Array:
        match ir.OPERATIONS[line.operation].family:
            case "source":
                return self._source(number, line)
            case "pointwise" | "host":
                return evaluate(line, arguments, self._compute)
            case "reduction":
                by_place = self._program.instructions[line.arguments[0]].type.shape == "element"
                return reduce(line, arguments, self._compute, self._offset if by_place else 0)
        if line.operation == "transpose":
            return np.ascontiguousarray(arguments[0].swapaxes(-1, -2))
        if line.operation == "identity":
            return np.broadcast_to(np.eye(arguments[0].shape[-1], dtype=NUMPY[self._compute]), arguments[0].shape)
        # torch allots aligned memory, so the library's choice of kernel does not depend on the addresses.
        left, right = (torch.tensor(a, dtype=torch.float64) for a in arguments)
        return np.asarray((left @ right).numpy()).astype(NUMPY[self._compute])

    def _source(self, number: int, line: ir.Instruction) -> Array:
        match line.operation:
            case "const":
                return constant(line, self._compute)
            case "load":
                name = str(line.attributes[0])
                values = read(self._arrays[name], self._compute)
                return values.reshape(self._view.extent(self._program.shapes[name]))
            case "hyper":
                return np.asarray(scalars.evaluate(self._program, (number,), self._hypers, {})[0])
            case "index":
                found = positions(self._offset, self._view.numel, self._compute)
                return found.reshape(self._view.extent("element"))
        return np.asarray(float(getattr(self._view, line.operation)))


def reduce(line: ir.Instruction, arguments: Sequence[Array], compute: torch.dtype, offset: int) -> Array:
    """A reduction. What is one number for a tensor is float64; ``offset``: the global position of its first element.

    Lines are rounded here.
    """
    if line.type.shape == "tensor":
        return blocks.reduce(line.operation, arguments[0].reshape(-1), offset)
    values, axis = arguments[0], -1 if line.type.shape == "row" else -2
    if line.operation.endswith("max"):
        return blocks.line_max(values, axis)
    largest = arguments[1] if line.operation.endswith("total") else blocks.line_max(np.abs(values), axis)
    return blocks.line_sum(values, largest, axis).astype(NUMPY[compute])


def positions(first: int, numel: int, compute: torch.dtype) -> Array:
    """The low words of the global positions."""
    return np.arange(first, first + numel, dtype=np.uint64).astype(WORD[NUMPY[compute]])


def last_uses(program: ir.Program) -> dict[int, float]:
    """For each value that is used the last instruction that reads it; infinity for what is stored."""
    last: dict[int, float] = {a: number for number, line in enumerate(program.instructions) for a in line.arguments}
    return last | {value: math.inf for _, value in program.stores}
