"""What a phase computes that is the same for all elements of a row: written once, before the loops.

Uniform and tensor reals are float64, as they are everywhere, and are rounded here for the elements that meet them.
"""

from functools import cached_property

import torch

from shardstep.errors import RuleError
from shardstep.rules.backends.llvm.code import REAL, WORD, Code, can_write, hexadecimal, real_literal
from shardstep.rules.ir import Instruction, Kind, Program


class Shared:
    """``constants`` and ``names``: numbers of instructions to what elements use, of the type of their kind."""

    def __init__(self, program: Program, compute: torch.dtype) -> None:
        self._program, self._compute = program, compute
        self._code = Code(1, "shared")
        self._values: dict[int, str] = {}
        self.constants: dict[int, str] = {}
        self.names: dict[int, str] = {}
        for number, line in enumerate(program.instructions):
            if line.operation == "const":
                self._constant(number, line)
            elif line.operation == "hyper" and line.type.is_single:
                self._keep(number, "real", f"%exact.{line.attributes[0]}")
            elif line.type.is_single and line.operation not in ("sum", "max"):
                self._keep(number, line.type.kind, self._operation(line))

    @cached_property
    def lines(self) -> list[str]:
        return self._code.lines

    def type(self, kind: Kind) -> str:
        """Of what elements use."""
        return {"real": REAL[self._compute], "word": WORD[self._compute], "bool": "i1"}[kind]

    def _constant(self, number: int, line: Instruction) -> None:
        value = line.attributes[0]
        if line.type.kind == "real":
            self._values[number] = hexadecimal(float(value))
            self.constants[number] = real_literal(float(value), self._compute)
            return
        bits = 8 * self._compute.itemsize
        literal = str(int(value) % 2**bits) if line.type.kind == "word" else str(bool(value)).lower()
        self._values[number] = self.constants[number] = literal

    def _keep(self, number: int, kind: Kind, value: str) -> None:
        self._values[number] = value
        self.names[number] = self._rounded(value) if kind == "real" else value

    def _rounded(self, value: str) -> str:
        return value if self._compute == torch.float64 else self._code.let(f"fptrunc double {value} to float")

    def _operation(self, line: Instruction) -> str:
        if not can_write(line.operation):
            raise refusal(self._program, line)
        code, arguments = self._code, [self._values[argument] for argument in line.arguments]
        if line.operation == "bits":
            return code.operation("bits", self._compute, [self._rounded(arguments[0])])
        if line.operation == "from_bits":
            value = code.operation("from_bits", self._compute, arguments)
            return value if self._compute == torch.float64 else code.let(f"fpext float {value} to double")
        of_words = line.operation.startswith("word_")
        return code.operation(line.operation, self._compute if of_words else torch.float64, arguments, *line.attributes)


def refusal(program: Program, line: Instruction) -> RuleError:
    """For what this back end cannot write."""
    return RuleError(
        f"rule {program.name!r}: expected a phase of operations on elements whose bits are fixed, got "
        f"{line.operation} : {line.type}; let the passes replace it before this back end"
    )
