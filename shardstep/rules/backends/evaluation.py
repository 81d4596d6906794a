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
    """One program on one tensor, which is seen as a matrix: its first dimension by all the others.

    Values of `row` shape have the extent (rows, 1), of `column` shape (1, columns): numpy then joins them. Uniform
    and tensor values are arrays without dimensions.
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
        shape = arrays["param"].shape
        self._rows = shape[0] if shape else 1
        self._columns = math.prod(shape[1:])

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

    def extent(self, name: str) -> tuple[int, ...]:
        """The extent of an array's values."""
        extents = {"element": (self._rows, self._columns), "row": (self._rows, 1), "column": (1, self._columns)}
        return extents.get(self._program.shapes[name], ())

    def stored(self, name: str, value: Array) -> Tensor:
        """What the array becomes if it is given ``value``."""
        old = self._arrays[name].detach()
        new = torch.empty_like(old, memory_format=torch.contiguous_format)
        if extent := self.extent(name):
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
            case "pointwise":
                return evaluate(line, arguments, self._compute)
            case "reduction":
                of = self._program.instructions[line.arguments[0]].type.shape
                return self._reduction(line.operation, arguments[0], of)
        if line.operation == "transpose":
            return np.ascontiguousarray(arguments[0].T)
        # torch allots aligned memory, so the library's choice of kernel does not depend on the addresses.
        left, right = (torch.tensor(a, dtype=torch.float64) for a in arguments)
        return np.asarray((left @ right).numpy()).astype(NUMPY[self._compute])

    def _source(self, number: int, line: ir.Instruction) -> Array:
        counts = {"numel": self._rows * self._columns, "rows": self._rows, "columns": self._columns}
        match line.operation:
            case "const":
                return constant(line, self._compute)
            case "load":
                name = str(line.attributes[0])
                return read(self._arrays[name], self._compute).reshape(self.extent(name))
            case "hyper":
                return np.asarray(scalars.evaluate(self._program, (number,), self._hypers, {})[0])
            case "index":
                found = positions(self._offset, self._rows * self._columns, self._compute)
                return found.reshape(self._rows, self._columns)
        return np.asarray(float(counts[line.operation]))

    def _reduction(self, operation: str, values: Array, of: ir.Shape) -> Array:
        """Elements are summed by their global positions; what has no such positions is counted from 0."""
        if operation == "row_sum":
            return blocks.row_sums(values, self._offset).astype(NUMPY[self._compute])
        if operation == "column_sum":
            return blocks.column_sums(values).astype(NUMPY[self._compute])
        return blocks.reduce(operation, values.reshape(-1), self._offset if of == "element" else 0)


def positions(first: int, numel: int, compute: torch.dtype) -> Array:
    """The low words of the global positions."""
    return np.arange(first, first + numel, dtype=np.uint64).astype(WORD[NUMPY[compute]])


def last_uses(program: ir.Program) -> dict[int, float]:
    """For each value that is used the last instruction that reads it; infinity for what is stored."""
    last: dict[int, float] = {a: number for number, line in enumerate(program.instructions) for a in line.arguments}
    return last | {value: math.inf for _, value in program.stores}
