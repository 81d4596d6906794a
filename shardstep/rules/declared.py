"""States as a rule declares them: what they start from, what they are stored in, and what they have values for.

Looks at the defaults of a rule's arguments only, and says what is wrong with them. It never sees a tensor.
"""

import inspect
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Self

from shardstep.rules.diagnostics import RuleErrors, diagnose
from shardstep.rules.ir import Shape, State
from shardstep.rules.source import argument_span

_LARGEST_FLOAT32: Final = 3.4028234663852886e38
_LARGEST: Final = {
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    **dict.fromkeys(("float32", "dynamic8", "dynamic8_unsigned"), _LARGEST_FLOAT32),
}
_SMALLEST: Final = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
    **dict.fromkeys(("float32", "dynamic8", "dynamic8_unsigned"), 2.0**-149),
}
_CODED: Final = frozenset({"dynamic8", "dynamic8_unsigned"})
_SHAPES: Final[Mapping[str, Shape]] = types.MappingProxyType(
    {
        "element": "element",
        "row": "row",
        "column": "column",
        "row_pair": "rr",
        "column_pair": "cc",
        "tensor": "tensor",
    }
)
"""What a state may have one value for each of, and what programs call it."""

_SHAPE_WORDS: Final = {shape: word for word, shape in _SHAPES.items()}


@dataclass(frozen=True)
class Start:
    """How a state begins and is stored, written as the default of its argument."""

    start: float | str = 0.0
    dtype: str | None = None
    shape: str = "element"

    @classmethod
    def of(cls, state: State, dtype: str | None) -> Self:
        """As ``state`` was declared, but stored in another dtype."""
        return cls(state.start, dtype, _SHAPE_WORDS[state.shape])


def state(start: float | str = 0.0, *, dtype: str | None = None, shape: str = "element") -> Any:
    """The default of a state: what it starts from (a number, or "param": a copy of the parameter), the dtype it is
    stored in ("bfloat16", "float16", "float32"; by default what the rule computes in), and what it has one value for
    each of ("element", "row", "column", "tensor", and in rules with matrix products "row_pair" and "column_pair":
    square matrices like x @ x.T and x.T @ x).

    "dynamic8" and, for what is never negative, "dynamic8_unsigned" store an element in 8 bits, with a float32 scale for
    each 256 elements of a tensor (Dettmers et al. 2022).
    """
    return Start(start, dtype, shape)


zeros: Final[Any] = state()
"""The default of a state that starts as zeros."""


def check_state(function: types.FunctionType, argument: inspect.Parameter) -> None:
    name = argument.name
    if not isinstance(argument.default, Start):
        text = f"expected the state {name!r} to start from zeros or state(...), got {argument}"
        hint = f"write {name}=zeros, or put it after * if it is a hyper-parameter"
        refuse(function, name, "E27", text, hint)


def declared_all(function: types.FunctionType, starts: Mapping[str, Start]) -> tuple[State, ...]:
    declared = tuple(_declared(function, name, given) for name, given in starts.items())
    for state in declared:
        if (scale := f"{state.name}_scale") in starts and state.dtype in _CODED:
            text = f"the state {scale!r} has the name of what belongs to {state.name!r}, which is stored in 8 bits"
            refuse(function, scale, "E28", text, "give it another name")
    return declared


def _declared(function: types.FunctionType, name: str, given: Start) -> State:
    if not _is_one_of(_SHAPES, given.shape):
        text = f"expected the state {name!r} to be one of {tuple(_SHAPES)}, got shape={given.shape!r}"
        refuse(function, name, "E20", text, "say what it has one value for each of")
    if given.dtype is not None and not _is_one_of(_LARGEST, given.dtype):
        text = f"expected the state {name!r} stored as one of {tuple(_LARGEST)}, got dtype={given.dtype!r}"
        refuse(function, name, "E09", text, "a rule computes with real numbers and never truncates them")
    if given.dtype in _CODED and given.shape != "element":
        text = f"expected the state {name!r}, stored in 8 bits, to have a value for each element, got {given.shape!r}"
        refuse(function, name, "E20", text, "store it in another dtype: it is small")
    _check_start(function, name, given)
    start = given.start if isinstance(given.start, str) else float(given.start)
    return State(name, _SHAPES[given.shape], start, given.dtype)


def _check_start(function: types.FunctionType, name: str, given: Start) -> None:
    start, dtype = given.start, given.dtype or "float32"
    if _is_one_of(("param",), start) and given.shape == "element":
        return
    if not is_number(start) or start != start:
        text = f"expected the state {name!r} to start from a number, or from 'param' for each element, got {start!r}"
        refuse(function, name, "E15", text, "start from zeros and write the first step with: if step == 1")
    if _LARGEST[dtype] < abs(float(start)) < math.inf:
        text = f"the state {name!r} starts from {start}, which overflows {dtype}"
        refuse(function, name, "E11", text, "start from a smaller number, or store it in another dtype")
    if dtype in _CODED and abs(float(start)) == math.inf:
        text = f"the state {name!r} starts from {start}, which {dtype} does not have"
        refuse(function, name, "E11", text, "store it in another dtype")
    if dtype == "dynamic8_unsigned" and float(start) < 0:
        text = f"the state {name!r} starts from {start}, which is zero in {dtype}"
        refuse(function, name, "E12", text, "store it in dynamic8, which has both signs")
    if 0 < abs(float(start)) < _SMALLEST[dtype]:
        text = f"the state {name!r} starts from {start}, which is zero in {dtype}"
        refuse(function, name, "E12", text, "start from a larger number, or store it in another dtype")


def is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**1000


def _is_one_of(words: Iterable[str], value: object) -> bool:
    return isinstance(value, str) and value in words


def refuse(function: types.FunctionType, argument: str, code: str, message: str, hint: str) -> NoReturn:
    raise RuleErrors(function.__name__, [diagnose(code, argument_span(function, argument), message, hint)])
