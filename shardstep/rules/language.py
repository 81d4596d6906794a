"""What a rule may say: the ``rule`` and ``inline`` decorators, how states start, and the functions that rules know.

A rule is a pure function over elements::

    @rule
    def momentum(param, grad, buffer=zeros, *, lr=1e-3, momentum=0.9):
        buffer = momentum * buffer + grad
        return param - lr * buffer, buffer

This room looks at signatures only; it never reads a body, never runs a rule and never sees a tensor.
"""

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, NoReturn, Self, TypeAlias

from shardstep.errors import RuleError
from shardstep.rules.diagnostics import RuleErrors, diagnose
from shardstep.rules.ir import Shape, State
from shardstep.rules.source import argument_span

Elements: TypeAlias = Any
"""Annotation for what stands for an array in a rule: one value per element."""

Hyperparameters: TypeAlias = Mapping[str, float | tuple[float, ...] | None]

_PUT_IN: Final = frozenset({"grad_scale", "rounding_key"})
"""Hyper-parameters that the compiler adds: what the gradient is multiplied by, and the key of stochastic rounding."""

GIVEN: Final = ("step", "ndim", "machine_eps", "rows", "columns")
"""Hyper-parameters that are there by themselves: the count of updates from 1, the param's number of dimensions, what 1
and the next larger number that the rule computes with differ by, and the rows and columns of the param as a matrix."""

RESERVED: Final = _PUT_IN | frozenset(GIVEN)
"""Names with a meaning of their own."""

_OF_GROUPS: Final = frozenset({"params", "param_names"})
"""What torch keeps in a parameter group beside the hyper-parameters."""

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
class _Start:
    """How a state begins and is stored, written as the default of its argument."""

    start: float | str = 0.0
    dtype: str | None = None
    shape: str = "element"


def state(start: float | str = 0.0, *, dtype: str | None = None, shape: str = "element") -> Any:
    """The default of a state: what it starts from (a number, or "param": a copy of the parameter), the dtype it is
    stored in ("bfloat16", "float16", "float32"; by default what the rule computes in), and what it has one value for
    each of ("element", "row", "column", "tensor", and in rules with matrix products "row_pair" and "column_pair":
    square matrices like x @ x.T and x.T @ x).

    "dynamic8" and, for what is never negative, "dynamic8_unsigned" store an element in 8 bits, with a float32 scale for
    each 256 elements of a tensor (Dettmers et al. 2022).
    """
    return _Start(start, dtype, shape)


zeros: Final[Any] = state()
"""The default of a state that starts as zeros."""


@dataclass(frozen=True, eq=False)
class Rule:
    """The equations of one update step.

    ``declared``: the state arrays, in order; ``states``: their names. ``hyperparameters``: name to default, None where
    the caller must give one; those of `GIVEN` are not among them.
    """

    name: str
    function: types.FunctionType
    declared: tuple[State, ...]
    hyperparameters: Hyperparameters

    @property
    def states(self) -> tuple[str, ...]:
        return tuple(declared.name for declared in self.declared)

    @cached_property
    def tensor_states(self) -> frozenset[str]:
        """The names of those that have not one value for each element."""
        return frozenset(declared.name for declared in self.declared if declared.shape != "element")

    @property
    def place(self) -> str:
        """``file:line`` of the definition."""
        return _place(self.function)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """For type checkers: rules may call it. Raises RuleError, since only rules may."""
        _refuse_call(self.name)

    def stored(self, **dtypes: str) -> Self:
        """The same rule, with the states of these names stored in these dtypes (see `state`).

        ``adamw.stored(exp_avg="dynamic8", exp_avg_sq="dynamic8_unsigned")``. Raises RuleError for the name of no state,
        RuleErrors for a dtype that does not suit.
        """
        if unknown := dtypes.keys() - set(self.states):
            raise RuleError(
                f"expected states of the rule {self.name!r} ({', '.join(self.states) or 'it has none'}), got "
                f"{', '.join(sorted(unknown))}; correct the name"
            )
        starts = {
            state.name: _Start(state.start, dtypes.get(state.name, state.dtype), _SHAPE_WORDS[state.shape])
            for state in self.declared
        }
        return replace(self, declared=_declared_all(self.function, starts))


@dataclass(frozen=True, eq=False)
class Inline:
    """A function that rules may call: its equations are written out where it is called."""

    name: str
    function: types.FunctionType

    @property
    def place(self) -> str:
        """``file:line`` of the definition."""
        return _place(self.function)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """For type checkers: rules may call it. Raises RuleError, since only rules may."""
        _refuse_call(self.name)


def _place(function: types.FunctionType) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def _refuse_call(name: str) -> NoReturn:
    raise RuleError(
        f"expected {name}() inside a function under @rule or @inline, whose text is compiled; got a call by Python"
    )


def rule(function: Callable[..., Any]) -> Rule:
    """Make a rule of a pure function ``(param, grad, state=zeros, ..., *, step, hyper=default, ...)``.

    It returns the new param and the new states in order. A hyper-parameter is a number, a tuple of numbers, or a truth
    value: a flag. Raises RuleErrors for a signature of another form. The body is read when the rule is first used.
    """
    plain = _plain(function, "rule")
    arguments = inspect.signature(plain).parameters.values()
    arrays = [a for a in arguments if a.kind is not a.KEYWORD_ONLY]
    scalars = [a for a in arguments if a.kind is a.KEYWORD_ONLY]
    return Rule(plain.__name__, plain, _states(plain, arrays), types.MappingProxyType(_defaults(plain, scalars)))


def inline(function: Callable[..., Any]) -> Inline:
    """Make a function that rules may call of a pure function of values; it returns one value or several.

    Raises RuleErrors for a signature of another form. The body is read when a rule that calls it is first used.
    """
    plain = _plain(function, "inline")
    return Inline(plain.__name__, plain)


def _plain(function: Callable[..., Any], decorator: str) -> types.FunctionType:
    """The function, if its definition is one that can be read as equations."""
    if not isinstance(function, types.FunctionType):
        raise RuleError(f"E27 expected @{decorator} right above a plain function, got {function!r}; write it with def")
    if function.__name__ == "<lambda>":
        _refuse(function, "", "E27", "expected a function with a name, got a lambda", "write it with def")
    if function.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        _refuse(function, "", "E27", "expected a plain function, got an async one or a generator", "return the values")
    for argument in inspect.signature(function).parameters.values():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            text = f"expected every argument by name, got {argument}"
            _refuse(function, argument.name, "E27", text, "list the arguments")
        is_state = decorator == "rule" and argument.kind is not argument.KEYWORD_ONLY
        if (argument.name in WORDS and not is_state) or argument.name in _PUT_IN:
            text = f"the argument {argument.name!r} has the name of what the language has already"
            _refuse(function, argument.name, "E28", text, "give it another name")
    return function


def _states(function: types.FunctionType, arrays: list[inspect.Parameter]) -> tuple[State, ...]:
    inputs, states = arrays[:2], arrays[2:]
    if [a.name for a in inputs] != ["param", "grad"] or any(a.default is not a.empty for a in inputs):
        got = ", ".join(map(str, arrays))
        text = f"expected the first two arguments to be param and grad without defaults, got ({got})"
        _refuse(function, "", "E27", text, "name them so")
    for argument in states:
        _check_state(function, argument)
    return _declared_all(function, {argument.name: argument.default for argument in states})


def _check_state(function: types.FunctionType, argument: inspect.Parameter) -> None:
    name = argument.name
    if name in RESERVED:
        _refuse(function, name, "E28", f"expected {name!r} after *, got it as a state", "it is given by itself")
    if not isinstance(argument.default, _Start):
        text = f"expected the state {name!r} to start from zeros or state(...), got {argument}"
        hint = f"write {name}=zeros, or put it after * if it is a hyper-parameter"
        _refuse(function, name, "E27", text, hint)


def _declared_all(function: types.FunctionType, starts: Mapping[str, _Start]) -> tuple[State, ...]:
    declared = tuple(_declared(function, name, given) for name, given in starts.items())
    for state in declared:
        if (scale := f"{state.name}_scale") in starts and state.dtype in _CODED:
            text = f"the state {scale!r} has the name of what belongs to {state.name!r}, which is stored in 8 bits"
            _refuse(function, scale, "E28", text, "give it another name")
    return declared


def _declared(function: types.FunctionType, name: str, given: _Start) -> State:
    if not _is_one_of(_SHAPES, given.shape):
        text = f"expected the state {name!r} to be one of {tuple(_SHAPES)}, got shape={given.shape!r}"
        _refuse(function, name, "E20", text, "say what it has one value for each of")
    if given.dtype is not None and not _is_one_of(_LARGEST, given.dtype):
        text = f"expected the state {name!r} stored as one of {tuple(_LARGEST)}, got dtype={given.dtype!r}"
        _refuse(function, name, "E09", text, "a rule computes with real numbers and never truncates them")
    if given.dtype in _CODED and given.shape != "element":
        text = f"expected the state {name!r}, stored in 8 bits, to have a value for each element, got {given.shape!r}"
        _refuse(function, name, "E20", text, "store it in another dtype: it is small")
    _check_start(function, name, given)
    start = given.start if isinstance(given.start, str) else float(given.start)
    return State(name, _SHAPES[given.shape], start, given.dtype)


def _check_start(function: types.FunctionType, name: str, given: _Start) -> None:
    start, dtype = given.start, given.dtype or "float32"
    if _is_one_of(("param",), start) and given.shape == "element":
        return
    if not _is_number(start) or start != start:
        text = f"expected the state {name!r} to start from a number, or from 'param' for each element, got {start!r}"
        _refuse(function, name, "E15", text, "start from zeros and write the first step with: if step == 1")
    if _LARGEST[dtype] < abs(float(start)) < math.inf:
        text = f"the state {name!r} starts from {start}, which overflows {dtype}"
        _refuse(function, name, "E11", text, "start from a smaller number, or store it in another dtype")
    if dtype in _CODED and abs(float(start)) == math.inf:
        text = f"the state {name!r} starts from {start}, which {dtype} does not have"
        _refuse(function, name, "E11", text, "store it in another dtype")
    if dtype == "dynamic8_unsigned" and float(start) < 0:
        text = f"the state {name!r} starts from {start}, which is zero in {dtype}"
        _refuse(function, name, "E12", text, "store it in dynamic8, which has both signs")
    if 0 < abs(float(start)) < _SMALLEST[dtype]:
        text = f"the state {name!r} starts from {start}, which is zero in {dtype}"
        _refuse(function, name, "E12", text, "start from a larger number, or store it in another dtype")


def _defaults(
    function: types.FunctionType, scalars: list[inspect.Parameter]
) -> dict[str, float | tuple[float, ...] | None]:
    defaults: dict[str, float | tuple[float, ...] | None] = {}
    for scalar in scalars:
        if scalar.name in _OF_GROUPS:
            text = f"expected a hyper-parameter, got {scalar.name!r}, where a parameter group keeps its parameters"
            _refuse(function, scalar.name, "E28", text, "give it another name")
        if scalar.name not in GIVEN:
            defaults[scalar.name] = None if scalar.default is scalar.empty else _default(function, scalar)
        elif scalar.default is not scalar.empty:
            text = f"expected {scalar.name!r} without a default, got {scalar}"
            _refuse(function, scalar.name, "E28", text, "it is always given")
    return defaults


def _default(function: types.FunctionType, scalar: inspect.Parameter) -> float | tuple[float, ...]:
    default = scalar.default
    entries = default if isinstance(default, tuple) else (default,)
    if isinstance(default, list | dict | set):
        text = f"the hyper-parameter {scalar.name!r} has the mutable default {default!r}"
        _refuse(function, scalar.name, "E27", text, "write a tuple")
    flag = isinstance(default, bool)
    if not flag and (not entries or not all(_is_number(entry) and entry == entry for entry in entries)):
        expected = f"expected {scalar.name!r} to default to a number, a tuple of numbers, True or False"
        hint = "text and objects have no meaning in equations"
        _refuse(function, scalar.name, "E30", f"{expected}, got {default!r}", hint)
    return default  # type: ignore[no-any-return]


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**1000


def _is_one_of(words: Iterable[str], value: object) -> bool:
    return isinstance(value, str) and value in words


def _refuse(function: types.FunctionType, argument: str, code: str, message: str, hint: str) -> NoReturn:
    raise RuleErrors(function.__name__, [diagnose(code, argument_span(function, argument), message, hint)])


WORDS: Final[Mapping[str, tuple[str, ...]]] = types.MappingProxyType(
    {
        **dict.fromkeys("sqrt rsqrt exp log tanh abs sign bfloat16".split(), ("x",)),
        **dict.fromkeys("minimum maximum".split(), ("x", "y")),
        "clip": ("x", "low", "high"),
        "lerp": ("start", "end", "weight"),
        "fma": ("x", "y", "z"),
        "where": ("condition", "x", "y"),
        **dict.fromkeys("sum mean norm max_abs row_mean col_mean identity".split(), ("x",)),
    }
)
"""The functions that a rule knows without importing them, and their arguments. They win over all other names, but for
states: the ``sum`` of Adagrad is a state, and in a call still the function.

``rsqrt(x)`` is 1 / sqrt(x); ``clip`` is minimum(maximum(x, low), high); ``lerp`` is fma(weight, end - start, start);
``fma`` is x · y + z rounded once; ``where`` chooses for each element. ``sum mean norm max_abs`` give one number for
each tensor (norm: the root of the sum of squares), ``row_mean`` one for each row, ``col_mean`` one for each column.
``identity(x)`` is the identity matrix of the size of the square matrix x.
"""
