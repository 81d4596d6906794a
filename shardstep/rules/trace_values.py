"""The debugger's core: a program on one element, line by line, and where the first infinity or NaN came from.

It computes with the reference back end, so it shows what every back end computes. It formats nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from shardstep.errors import ConfigError
from shardstep.rules import ir
from shardstep.rules.backends.evaluation import Evaluation, exactly
from shardstep.rules.binding import CODED, stored_arrays

Number = float | bool | int

_INPUTS: Final = ("load", "hyper")


@dataclass(frozen=True)
class Line:
    """One instruction and the value it gave. ``arguments`` are positions in the list of lines.

    ``name``: the array or hyper-parameter that is read, or the array that is stored (its value is the stored one,
    rounded to the dtype that the state is kept in); empty for the others.
    """

    operation: str
    name: str
    arguments: tuple[int, ...]
    value: Number
    type: ir.Type
    place: ir.Place | None = None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value)


def trace_values(
    program: ir.Program, values: Mapping[str, float], hypers: Mapping[str, object], compute: torch.dtype
) -> list[Line]:
    """Every instruction with its value for one element, which is a tensor by itself: inputs first, stores last.

    ``values``: param, grad and the states by name; ``hypers`` as for a step. Raises ConfigError if one is missing.
    """
    order = sorted(range(len(program.instructions)), key=lambda i: program.instructions[i].operation not in _INPUTS)
    _check_given(program, {"load": values, "hyper": hypers})
    arrays = {name: _array(program, name, values.get(name, 0.0), compute) for name in program.shapes}
    with exactly():
        evaluation = Evaluation(program, arrays, hypers, compute)
        found = evaluation.run(keep_all=True)
        stored = {name: evaluation.stored(name, found[value]).item() for name, value in program.stores}
    position = {number: place for place, number in enumerate(order)}
    lines = [_line(program.instructions[number], position, found[number].item()) for number in order]
    for name, value in program.stores:
        kind = ir.Type("real", program.shapes[name])
        lines.append(Line("store", name, (position[value],), stored[name], kind, program.instructions[value].place))
    return lines


def first_non_finite(lines: Sequence[Line]) -> Line | None:
    """The line that made the first infinity or NaN, out of finite arguments; an input that already was one.

    Infinities that are written in the rule count as finite: they are meant.
    """
    for line in lines:
        arguments = [lines[a] for a in line.arguments]
        meant = line.operation == "const"
        if not meant and not line.is_finite and all(a.is_finite or a.operation == "const" for a in arguments):
            return line
    return None


def _check_given(program: ir.Program, given: Mapping[str, Mapping[str, object]]) -> None:
    for line in program.instructions:
        name = str(line.attributes[0]) if line.operation in _INPUTS else ""
        if name and name not in given[line.operation]:
            raise ConfigError(
                f"rule {program.name!r}: expected a value for {name}, got values for "
                f"{', '.join(given[line.operation]) or 'nothing'}; give it one"
            )


def _array(program: ir.Program, name: str, value: float, compute: torch.dtype) -> Tensor:
    # What 8 bits keep of an element depends on 255 others: it is shown as it was before.
    dtypes = [stored_arrays(state)[0].dtype for state in program.states if state.name == name]
    stored = next((dtype for dtype in dtypes if dtype not in CODED), None)
    return torch.tensor([[value]], dtype=stored or compute)


def _line(line: ir.Instruction, position: Mapping[int, int], value: Number) -> Line:
    name = str(line.attributes[0]) if line.operation in _INPUTS else ""
    if len(line.attributes) > 1:
        name += f"[{line.attributes[1]}]"
    return Line(line.operation, name, tuple(position[a] for a in line.arguments), value, line.type, line.place)
