"""How a program may be sharded: which part of a tensor its result at one element depends on, and why."""

from collections.abc import Set
from typing import Final, Literal, TypeAlias

from shardstep.rules.ir import SQUARE, Instruction, Program

Locality: TypeAlias = Literal["elementwise", "reduced", "factored", "matrix"]

_OF_SHAPE: Final = frozenset({"numel", "rows", "columns"})

_ORDER: Final[tuple[Locality, ...]] = ("elementwise", "reduced", "factored", "matrix")
_NEEDS: Final[dict[Locality, str]] = {
    "reduced": "needs all elements of the tensor",
    "factored": "needs whole rows and columns of the tensor",
    "matrix": "needs the whole matrix in one place",
}


def locality(program: Program) -> tuple[Locality, str]:
    """The weakest way of sharding that the program allows, and the operation, with its line, that allows no better.

    elementwise: any flat range · reduced: a sum over each tensor · factored: sums over its rows and columns · matrix:
    whole tensors only. What no store depends on does not count.
    """
    found: Locality = "elementwise"
    reason = "every operation is on one element at a time"
    for line in _needed(program):
        demanded = _demanded(program, line)
        if _ORDER.index(demanded) > _ORDER.index(found):
            where = f" in line {line.place.line}" if line.place else ""
            found, reason = demanded, f"{_named(line)}{where} {_NEEDS[demanded]}"
    squares = [name for name, _ in program.stores if program.shapes[name] in SQUARE]
    if squares and found != "matrix":
        return "matrix", f"store {squares[0]} {_NEEDS['matrix']}"
    return found, reason


def is_by_tensor(program: Program) -> bool:
    """Whether elements of several tensors may not be updated in one run."""
    shaped = any(line.operation in _OF_SHAPE or line.attributes == ("ndim",) for line in program.instructions)
    return shaped or locality(program)[0] != "elementwise" or any(s.shape != "element" for s in program.states)


def is_by_tensor_in(program: Program, values: Set[int]) -> bool:
    """The same where of a program with states of elements only these values are used."""
    lines = [program.instructions[number] for number in values]
    return any(line.operation in _OF_SHAPE or _demanded(program, line) != "elementwise" for line in lines)


def runs_in_steps(program: Program) -> bool:
    """Whether it has matrix products and is cut into steps: it has no row and column values, and no states of them or
    of tensors.
    """
    made = {line.type.shape for line in _needed(program)}
    of_matrices = set(program.shapes.values()) <= {"element", *SQUARE}
    return locality(program)[0] == "matrix" and of_matrices and not made & {"row", "column"}


def _needed(program: Program) -> list[Instruction]:
    wanted = {value for _, value in program.stores}
    for index in range(len(program.instructions) - 1, -1, -1):
        if index in wanted:
            wanted.update(program.instructions[index].arguments)
    return [program.instructions[index] for index in sorted(wanted)]


def _demanded(program: Program, line: Instruction) -> Locality:
    match line.operation:
        case "matmul" | "transpose" | "identity":
            return "matrix"
        case "hyper" if line.attributes[0] in ("rows", "columns"):
            return "matrix"
        case "row_sum" | "column_sum":
            return "factored"
        case "sum" | "max":
            return "reduced"
        case "load" if line.type.shape in SQUARE:
            return "matrix"
        case "load" if line.type.shape in ("row", "column"):
            return "factored"
    return "elementwise"


def _named(line: Instruction) -> str:
    return f"{line.operation} {line.attributes[0]}" if line.operation == "load" else line.operation
