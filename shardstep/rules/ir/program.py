"""A rule as a list of typed instructions. Pure data, and the builder that makes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import is_

from shardstep.rules.ir.operations import OPERATIONS, Kind, Shape, Type, result_type

Attribute = float | int | bool | str


@dataclass(frozen=True)
class Place:
    """Where in the source text, counted from 1 (lines) and 0 (columns)."""

    line: int
    column: int


@dataclass(frozen=True)
class State:
    """A state array: ``start`` is a number or "param"; ``dtype`` names what it is stored in (None: compute dtype)."""

    name: str
    shape: Shape = "element"
    start: float | str = 0.0
    dtype: str | None = None


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter, or ``step``; ``count`` is the number of its entries if it is a tuple.

    In a phase it may be one number for each row or column.
    """

    name: str
    count: int | None = None
    shape: Shape = "uniform"


@dataclass(frozen=True)
class Instruction:
    """``arguments`` number earlier instructions. ``place`` tells where it came from and has no meaning."""

    operation: str
    attributes: tuple[Attribute, ...]
    arguments: tuple[int, ...]
    type: Type
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Program:
    """``stores``: (array, number of its new value), ``param`` and states; an array without one stays as it is."""

    name: str
    states: tuple[State, ...]
    hypers: tuple[Hyper, ...]
    instructions: tuple[Instruction, ...]
    stores: tuple[tuple[str, int], ...]

    def with_instructions(self, instructions: Sequence[Instruction], stores: Sequence[tuple[str, int]]) -> "Program":
        """The program with these in place of its own; itself if they are its own."""
        lines, written = tuple(instructions), tuple(stores)
        same = len(lines) == len(self.instructions) and all(map(is_, lines, self.instructions))  # 0.0 == -0.0
        return self if same and written == self.stores else replace(self, instructions=lines, stores=written)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each array that can be loaded or stored."""
        return {"param": "element", "grad": "element", **{state.name: state.shape for state in self.states}}


class Builder:
    """Appends instructions and infers their types. For the front end and for passes that rewrite."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.instructions: list[Instruction] = []
        self._shapes = shapes

    def constant(self, value: float | bool | int, kind: Kind = "real", place: Place | None = None) -> int:
        """A number, a truth value or a word."""
        return self._append("const", (value,), (), Type(kind, "uniform"), place)

    def load(self, name: str, place: Place | None = None) -> int:
        return self._append("load", (name,), (), Type("real", self._shapes[name]), place)

    def hyper(
        self,
        name: str,
        index: int | None = None,
        kind: Kind = "real",
        place: Place | None = None,
        shape: Shape = "uniform",
    ) -> int:
        attributes = (name,) if index is None else (name, index)
        return self._append("hyper", attributes, (), Type(kind, shape), place)

    def emit(
        self, operation: str, *arguments: int, attributes: tuple[Attribute, ...] = (), place: Place | None = None
    ) -> int:
        """One instruction of the table; raises TypeError if it cannot take these arguments."""
        return self._append(operation, attributes, arguments, self._type(operation, arguments), place)

    def copy(self, instruction: Instruction, arguments: tuple[int, ...]) -> int:
        """The same operation on other arguments, with its type inferred anew; itself if nothing is new."""
        operation, type_ = instruction.operation, instruction.type
        if OPERATIONS[operation].family != "source":
            type_ = self._type(operation, arguments)
        if arguments == instruction.arguments and type_ == instruction.type:
            self.instructions.append(instruction)
            return len(self.instructions) - 1
        return self._append(operation, instruction.attributes, arguments, type_, instruction.place)

    def type_of(self, value: int) -> Type:
        return self.instructions[value].type

    def _type(self, operation: str, arguments: tuple[int, ...]) -> Type:
        types = tuple([self.instructions[argument].type for argument in arguments])
        type_ = result_type(operation, types)
        if type_ is None:
            raise TypeError(f"{operation} cannot take ({', '.join(map(str, types))})")
        return type_

    def _append(
        self,
        operation: str,
        attributes: tuple[Attribute, ...],
        arguments: tuple[int, ...],
        type_: Type,
        place: Place | None,
    ) -> int:
        self.instructions.append(Instruction(operation, attributes, arguments, type_, place))
        return len(self.instructions) - 1
