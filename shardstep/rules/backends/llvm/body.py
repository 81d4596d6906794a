"""What a phase does to some neighbouring elements: loads, operations, stores, and the lanes of its reductions.

The same function writes the body of the vector loop and that of the scalar ones. Nothing here knows of loops.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from shardstep.rules.backends.blocks import LANES
from shardstep.rules.backends.llvm.code import REAL, WORD, Code, can_write
from shardstep.rules.backends.llvm.conversions import STORED, from_memory, to_memory
from shardstep.rules.backends.llvm.dynamic8 import decoded
from shardstep.rules.backends.llvm.row import RowLayout
from shardstep.rules.backends.llvm.shared import Shared, refusal
from shardstep.rules.binding import CODED, Binding, scale_name
from shardstep.rules.ir import Instruction, Phase
from shardstep.types import SCALED_NUMEL


@dataclass(frozen=True)
class Reduction:
    """``combine``: the operation on two numbers of ``type``; ``start``: what it begins with.

    ``along``: "row" or "column", which one number each comes of; None for blocks.
    """

    number: int
    line: Instruction
    combine: str
    start: str
    type: str
    along: str | None

    @property
    def empty(self) -> float:
        """What ``start`` says."""
        return 0.0 if self.start == "0.0" else -math.inf


@dataclass(frozen=True)
class Job:
    """A phase and how it meets memory."""

    phase: Phase
    binding: Binding
    layout: RowLayout

    @cached_property
    def reductions(self) -> tuple[Reduction, ...]:
        return tuple(self._reduction(number, line) for number, line in enumerate(self.phase.reductions))

    def _reduction(self, number: int, line: Instruction) -> Reduction:
        if line.operation in ("row_sum", "column_sum"):
            raise refusal(self.phase.body, line)
        along = None if line.type.is_single else line.type.shape
        if not line.operation.endswith("max"):
            return Reduction(number, line, "add", "0.0", "double", along)
        least = "0xFFF0000000000000"
        if along is None:
            return Reduction(number, line, "maximum", least, "double", None)
        of_magnitudes = self.phase.body.instructions[line.arguments[0]].operation == "abs"
        real = REAL[self.binding.compute]
        if of_magnitudes:
            return Reduction(number, line, "magnitude", "0.0", real, along)
        return Reduction(number, line, "maximum", least, real, along)

    @property
    def laned(self) -> tuple[Reduction, ...]:
        """Those that are held in lanes: not those of columns, each of which has a number in memory."""
        return tuple(reduction for reduction in self.reductions if reduction.along != "column")

    @property
    def of_blocks(self) -> tuple[Reduction, ...]:
        return tuple(reduction for reduction in self.reductions if reduction.along is None)

    @property
    def of_rows(self) -> tuple[Reduction, ...]:
        return tuple(reduction for reduction in self.reductions if reduction.along == "row")

    @cached_property
    def low(self) -> torch.dtype | None:
        """Of the copy of the new param; None where there is no new one."""
        return self.binding.low if any(name == "param" for name, _ in self.phase.body.stores) else None

    @cached_property
    def full_lines(self) -> bool:
        """Whether vectors are aligned for ``low``: whole cache lines of 16-bit numbers can go around the caches."""
        return self.low is not None and not self.reductions and not self.phase.has_lines

    @cached_property
    def is_scaled(self) -> bool:
        """Whether it meets states in 8 bits."""
        stored = dict(self.binding.stored)
        return any(stored[name] in CODED for name in self.layout.arrays)

    @cached_property
    def encoded(self) -> tuple[tuple[str, torch.dtype], ...]:
        """The states that it stores in 8 bits."""
        stored = dict(self.binding.stored)
        return tuple((name, stored[name]) for name, _ in self.phase.body.stores if stored[name] in CODED)

    def place(self, array: str) -> int:
        """The number of an array in a row."""
        return self.layout.arrays.index(array)

    @property
    def width(self) -> int:
        """Elements of a vector."""
        return 32 if self.full_lines else LANES


def combined(code: Code, reduction: Reduction, one: str, other: str) -> str:
    """Two numbers of a reduction as one. Magnitudes, NaN among them, are ordered as their bits are."""
    if reduction.combine != "magnitude":
        compute = torch.float64 if reduction.type == "double" else torch.float32
        return code.operation(reduction.combine, compute, [one, other])
    real, word = code.type(reduction.type), code.type({"float": "i32", "double": "i64"}[reduction.type])
    bits = [code.let(f"bitcast {real} {value} to {word}") for value in (one, other)]
    more = code.let(f"icmp ugt {word} {bits[0]}, {bits[1]}")
    return code.where(more, real, one, other)


_SIZE: Final = {"float": 4, "double": 8}


class Body:
    """``index`` names the number of the first element. ``accumulators``: the lanes after a vector body, by number."""

    def __init__(self, job: Job, width: int, index: str, shared: Shared) -> None:
        self._job = job
        self._index = index
        self._compute = job.binding.compute
        self._stored = dict(job.binding.stored)
        self._code = Code(width, "v" if width > 1 else "s")
        self._shared = shared
        self._values: dict[int, str] = {}
        self.accumulators: dict[int, str] = {}
        reductions = {number for number, _ in job.phase.sums}
        for number, line in enumerate(job.phase.body.instructions):
            if not line.type.is_single and number not in reductions:
                self._values[number] = self._instruction(line)
        for name, value in job.phase.body.stores:
            self._store(name, self._value(value))
        for reduction in job.reductions:
            self._accumulate(reduction, self._term(reduction))

    @property
    def text(self) -> str:
        return "\n".join(self._code.lines)

    def _instruction(self, line: Instruction) -> str:
        known = line.operation in ("load", "index", "hyper", "bfloat16") or can_write(line.operation)
        if not known or (line.type.shape != "element" and line.operation == "load"):
            raise refusal(self._job.phase.body, line)
        if line.operation == "load":
            return self._load(str(line.attributes[0]))
        if line.operation == "hyper":
            return self._vector(int(str(line.attributes[0])[1:]))
        if line.operation == "index":
            return self._global_index()
        arguments = [self._value(argument) for argument in line.arguments]
        if line.operation == "bfloat16":
            rounded = to_memory(self._code, arguments[0], torch.bfloat16, self._compute)
            return from_memory(self._code, rounded, torch.bfloat16, self._compute)
        return self._code.operation(line.operation, self._compute, arguments, *line.attributes)

    def _value(self, number: int) -> str:
        """An operand. What is shared is spread out where it is first used."""
        if number not in self._values:
            type_ = self._shared.type(self._job.phase.body.instructions[number].type.kind)
            if number in self._shared.constants:
                return self._code.constant(type_, self._shared.constants[number])
            self._values[number] = self._code.splat(type_, self._shared.names[number])
        return self._values[number]

    def _global_index(self) -> str:
        code, word = self._code, WORD[self._compute]
        first = code.let(f"add i64 %offset, {self._index}")
        first = first if word == "i64" else code.let(f"trunc i64 {first} to i32")
        if code.width == 1:
            return first
        steps = ", ".join(f"{word} {lane}" for lane in range(code.width))
        return code.let(f"add {code.type(word)} {code.splat(word, first)}, <{steps}>")

    def _load(self, name: str) -> str:
        stored = self._stored[name]
        address = self._address(self._array(name), stored)
        value = self._code.let(f"load {self._code.type(STORED[stored])}, ptr {address}, align {stored.itemsize}")
        if stored in CODED:
            value = decoded(self._code, stored, value, self._scale(scale_name(name)))
            stored = torch.float32
        return from_memory(self._code, value, stored, self._compute)

    def _scale(self, name: str) -> str:
        """One for all of these elements: a vector never reaches beyond those that share it."""
        entry = self._code.let(f"lshr i64 {self._index}, {SCALED_NUMEL.bit_length() - 1}")
        address = self._code.let(f"getelementptr float, ptr {self._array(name)}, i64 {entry}")
        return self._code.splat("float", self._code.let(f"load float, ptr {address}, align 4"))

    def _store(self, name: str, value: str) -> None:
        if self._stored[name] in CODED:
            self._keep(name, value)
            return
        self._write(self._array(name), value, self._stored[name], around_caches=False)
        if name == "param" and self._job.low is not None:
            around_caches = self._job.full_lines and self._code.width > 1
            self._write("%low", value, self._job.low, around_caches)

    def _array(self, name: str) -> str:
        return f"%array{self._job.place(name)}"

    def _keep(self, name: str, value: str) -> None:
        """In float32 until all that share a scale are there."""
        code = self._code
        if self._compute == torch.float64:
            value = code.let(f"fptrunc {code.type('double')} {value} to {code.type('float')}")
        place = code.let(f"and i64 {self._index}, {SCALED_NUMEL - 1}")
        address = code.let(f"getelementptr float, ptr %new{self._job.place(name)}, i64 {place}")
        code.line(f"store {code.type('float')} {value}, ptr {address}, align 4")

    def _write(self, array: str, value: str, stored: torch.dtype, around_caches: bool) -> None:
        written = to_memory(self._code, value, stored, self._compute)
        how = "align 64, !nontemporal !0" if around_caches else f"align {stored.itemsize}"
        address = self._address(array, stored)
        self._code.line(f"store {self._code.type(STORED[stored])} {written}, ptr {address}, {how}")

    def _address(self, array: str, stored: torch.dtype) -> str:
        return self._code.let(f"getelementptr {STORED[stored]}, ptr {array}, i64 {self._index}")

    def _vector(self, number: int) -> str:
        """What the row has, or the columns have."""
        vector = self._job.phase.vectors[number]
        real = "double" if vector.anchors else REAL[self._compute]
        if vector.shape == "row":
            return self._code.splat(real, f"%of.v{number}")
        address = self._at_column(f"%vector{number}", real)
        return self._code.let(f"load {self._code.type(real)}, ptr {address}, align {_SIZE[real]}")

    def _at_column(self, base: str, real: str) -> str:
        index = self._code.let(f"add i64 {self._index}, %shift")
        return self._code.let(f"getelementptr {real}, ptr {base}, i64 {index}")

    def _term(self, reduction: Reduction) -> str:
        """What an element adds; rounded to the grid, by its anchor, where sums must be exact."""
        code, (number, *anchor) = self._code, reduction.line.arguments
        value = self._value(number)
        if reduction.type == "double" and self._compute == torch.float32:
            value = code.let(f"fpext {code.type('float')} {value} to {code.type('double')}")
        for anchored in anchor:
            at = self._value(anchored)
            value = code.operation("add", torch.float64, [value, at])
            value = code.operation("sub", torch.float64, [value, at])
        return value

    def _accumulate(self, reduction: Reduction, value: str) -> None:
        code, number, real = self._code, reduction.number, reduction.type
        if reduction.along == "column":
            address, type_ = self._at_column(f"%partials{number}", real), code.type(real)
            before = code.let(f"load {type_}, ptr {address}, align {_SIZE[real]}")
            code.line(f"store {type_} {combined(code, reduction, before, value)}, ptr {address}, align {_SIZE[real]}")
            return
        if code.width > 1:
            self.accumulators[number] = combined(code, reduction, f"%held{number}", value)
            return
        position = code.let(f"add i64 %offset, {self._index}")
        lane = code.let(f"and i64 {position}, {LANES - 1}")
        address = code.let(f"getelementptr {real}, ptr %lanes{number}, i64 {lane}")
        total = combined(code, reduction, code.let(f"load {real}, ptr {address}"), value)
        code.line(f"store {real} {total}, ptr {address}")
