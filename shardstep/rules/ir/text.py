"""Programs as text and back, by the grammar in the package's docstring. Raises VerifyError for other text."""

import math
import re
from typing import cast, get_args

from shardstep.rules.ir.operations import OPERATIONS, Kind, Shape, Type
from shardstep.rules.ir.program import Attribute, Hyper, Instruction, Place, Program, State
from shardstep.rules.ir.verify import VerifyError

_NAME = re.compile(r"[A-Za-z_]\w*")


def to_text(program: Program, *, places: bool = False) -> str:
    """One line an instruction; with ``places``, where in the source each came from."""
    lines = [f"rule {program.name}"]
    lines += [_state(state) for state in program.states]
    lines += [_hyper(hyper) for hyper in program.hypers]
    lines += [_instruction(i, line, places) for i, line in enumerate(program.instructions)]
    lines += [f"store {name} %{value}" for name, value in program.stores]
    return "\n".join(lines) + "\n"


def _hyper(hyper: Hyper) -> str:
    if hyper.shape != "uniform":
        return f"hyper {hyper.name} {hyper.shape}"
    return f"hyper {hyper.name}" + (f" {hyper.count}" if hyper.count is not None else "")


def _state(state: State) -> str:
    start = state.start if isinstance(state.start, str) else _attribute(float(state.start))
    return f"state {state.name} {state.shape} = {start}" + (f" {state.dtype}" if state.dtype else "")


def _instruction(index: int, line: Instruction, places: bool) -> str:
    words = [line.operation, *map(_attribute, line.attributes), *(f"%{a}" for a in line.arguments)]
    place = f" @ {line.place.line}:{line.place.column}" if places and line.place else ""
    return f"%{index} = {' '.join(words)} : {line.type}{place}"


def _attribute(value: Attribute) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else repr(value)


def parse_text(text: str) -> Program:
    """The program that ``to_text`` printed."""
    name, states, hypers = "", list[State](), list[Hyper]()
    instructions, stores = list[Instruction](), list[tuple[str, int]]()
    for number, raw in enumerate(text.splitlines(), 1):
        words = raw.split()
        try:
            match words:
                case []:
                    continue
                case ["rule", name]:
                    pass
                case ["state", state, shape, "=", start, *dtype]:
                    states.append(State(state, _shape(shape), _start(start), *dtype))
                case ["hyper", hyper, ("row" | "column") as shape]:
                    hypers.append(Hyper(hyper, shape=_shape(shape)))
                case ["hyper", hyper]:
                    hypers.append(Hyper(hyper))
                case ["hyper", hyper, count]:
                    hypers.append(Hyper(hyper, int(count)))
                case ["store", array, value]:
                    stores.append((array, _number(value)))
                case [index, "=", *rest] if index == f"%{len(instructions)}":
                    instructions.append(_read_instruction(rest))
                case _:
                    raise ValueError("no line of the grammar")
        except (ValueError, KeyError, TypeError) as error:
            raise VerifyError(f"line {number} of the program, {raw.strip()!r}: {error}") from error
    return Program(name, tuple(states), tuple(hypers), tuple(instructions), tuple(stores))


def _read_instruction(words: list[str]) -> Instruction:
    colon = words.index(":")
    operation, *operands = words[:colon]
    kind, shape, *place = words[colon + 1 :]
    if operation not in OPERATIONS or kind not in get_args(Kind):
        raise ValueError(f"no operation {operation!r} of kind {kind!r}")
    attributes = tuple(_read_attribute(word) for word in operands if not word.startswith("%"))
    arguments = tuple(_number(word) for word in operands if word.startswith("%"))
    return Instruction(operation, attributes, arguments, Type(cast(Kind, kind), _shape(shape)), _place(place))


def _place(words: list[str]) -> Place | None:
    if not words:
        return None
    at, place = words
    if at != "@":
        raise ValueError(f"expected @ before a place, got {at!r}")
    line, column = map(int, place.split(":"))
    return Place(line, column)


def _number(word: str) -> int:
    if not re.fullmatch(r"%\d+", word):
        raise ValueError(f"expected the number of an instruction, got {word!r}")
    return int(word[1:])


def _shape(word: str) -> Shape:
    if word not in get_args(Shape):
        raise ValueError(f"no shape {word!r}")
    return cast(Shape, word)


def _start(word: str) -> float | str:
    return word if word == "param" else float(word)


def _read_attribute(word: str) -> Attribute:
    if word in ("true", "false"):
        return word == "true"
    if word.lstrip("-") in ("nan", "inf"):
        return math.copysign(float(word.lstrip("-")), -1.0 if word.startswith("-") else 1.0)
    if _NAME.fullmatch(word):
        return word
    return int(word) if re.fullmatch(r"-?\d+", word) else float(word)
