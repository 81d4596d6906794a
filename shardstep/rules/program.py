"""What a traced rule is: a short list of element instructions, and the host scalars that they use. Pure data.

Values are numbered: 0 is ``param``, 1 is ``grad``, then come the states in order, then one per instruction.
Every instruction is one exactly rounded IEEE operation, so that no back end has a choice about its bits.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """A number written in the rule."""

    value: float

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Hyperparameter:
    """``step`` or a keyword argument of the rule, or one entry of it where that is a tuple."""

    name: str
    index: int | None = None

    def __str__(self) -> str:
        return self.name if self.index is None else f"{self.name}[{self.index}]"


@dataclass(frozen=True)
class HostOperation:
    """An operation on scalars only."""

    operation: str
    arguments: "tuple[HostExpression, ...]"

    def __str__(self) -> str:
        return f"{self.operation}({', '.join(map(str, self.arguments))})"


HostExpression = Constant | Hyperparameter | HostOperation


@dataclass(frozen=True)
class Value:
    """An operand that differs from element to element, by its number."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class Uniform:
    """An operand that is the same for all elements: an index into ``Program.uniforms``."""

    index: int

    def __str__(self) -> str:
        return f"${self.index}"


Operand = Value | Uniform


@dataclass(frozen=True)
class Instruction:
    """One element operation: ``add sub mul div neg sqrt abs sign minimum maximum``."""

    operation: str
    arguments: tuple[Operand, ...]

    def __str__(self) -> str:
        return f"{self.operation} {', '.join(map(str, self.arguments))}"


@dataclass(frozen=True)
class Program:
    """A rule after tracing. ``outputs`` numbers the new param and the new states, in order."""

    name: str
    states: tuple[str, ...]
    uniforms: tuple[HostExpression, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """How many values there are before the first instruction."""
        return 2 + len(self.states)

    def __str__(self) -> str:
        arrays = ("param", "grad", *self.states)
        lines = [f"{self.name} {' '.join(f'%{i}={array}' for i, array in enumerate(arrays))}"]
        lines += [f"  ${i} = {uniform}" for i, uniform in enumerate(self.uniforms)]
        lines += [f"  %{i} = {line}" for i, line in enumerate(self.instructions, self.inputs)]
        return "\n".join([*lines, f"  return {', '.join(f'%{i}' for i in self.outputs)}"])
