"""What a rule may say: the ``rule`` decorator, how states start, and the functions known by their bare names.

A rule is a pure function over elements::

    @rule
    def momentum(param, grad, buffer=zeros, *, lr=1e-3, momentum=0.9):
        buffer = momentum * buffer + grad
        return param - lr * buffer, buffer

This room looks at signatures only; it never runs a rule and never sees a tensor.
"""

import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from shardstep.errors import RuleError
from shardstep.rules.symbols import Symbol, operate

Elements: TypeAlias = Any
"""Annotation for what stands for an array in a rule: one value per element."""

Hyperparameters: TypeAlias = Mapping[str, float | tuple[float, ...] | None]


class _Start:
    """How a state begins, written as the default of its argument."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


zeros: Final[Any] = _Start("zeros")
"""The default of a state that starts as zeros."""


@dataclass(frozen=True, eq=False)
class Rule:
    """The equations of one update step.

    ``states``: names of the state arrays, in order. ``hyperparameters``: name to default, None where the
    caller must give one; ``step``, the count of updates from 1, is not among them.
    """

    name: str
    function: types.FunctionType
    states: tuple[str, ...]
    hyperparameters: Hyperparameters

    @property
    def place(self) -> str:
        """``file:line`` of the definition."""
        code = self.function.__code__
        return f"{code.co_filename}:{code.co_firstlineno}"


def rule(function: Callable[..., Any]) -> Rule:
    """Make a rule of a pure function ``(param, grad, state=zeros, ..., *, step, hyper=default, ...)``.

    It returns the new param and the new states in order. Raises RuleError for a signature of another form.
    """
    if not isinstance(function, types.FunctionType):
        raise RuleError(f"expected @rule above a plain function, got {function!r}; write it with def")
    place = f"rule {function.__name__!r} ({function.__code__.co_filename}:{function.__code__.co_firstlineno})"
    arguments = inspect.signature(function).parameters.values()
    if any(a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
        raise RuleError(f"{place}: expected every argument by name, got *args or **kwargs; list the states")
    arrays = [a for a in arguments if a.kind is not a.KEYWORD_ONLY]
    scalars = [a for a in arguments if a.kind is a.KEYWORD_ONLY]
    return Rule(function.__name__, function, _states(arrays, place), types.MappingProxyType(_defaults(scalars, place)))


def _states(arrays: list[inspect.Parameter], place: str) -> tuple[str, ...]:
    inputs, states = arrays[:2], arrays[2:]
    if [a.name for a in inputs] != ["param", "grad"] or any(a.default is not a.empty for a in inputs):
        raise RuleError(
            f"{place}: expected the first two arguments to be param and grad without defaults, "
            f"got ({', '.join(map(str, arrays))}); name them so"
        )
    for state in states:
        if state.default is not zeros:
            raise RuleError(
                f"{place}: expected the state {state.name!r} to start from zeros, got {state}; write "
                f"{state.name}=zeros, or put it after * if it is a hyper-parameter"
            )
        if state.name == "step":
            raise RuleError(f"{place}: expected 'step' after *, got it as a state; it counts updates by itself")
    return tuple(state.name for state in states)


def _defaults(scalars: list[inspect.Parameter], place: str) -> dict[str, float | tuple[float, ...] | None]:
    defaults: dict[str, float | tuple[float, ...] | None] = {}
    for scalar in scalars:
        if scalar.name == "step":
            if scalar.default is not scalar.empty:
                raise RuleError(f"{place}: expected 'step' without a default, got {scalar}; it is always given")
        else:
            defaults[scalar.name] = None if scalar.default is scalar.empty else _default(scalar, place)
    return defaults


def _default(scalar: inspect.Parameter, place: str) -> float | tuple[float, ...]:
    default = scalar.default
    entries = default if isinstance(default, tuple) else (default,)
    if not entries or any(isinstance(e, bool) or not isinstance(e, int | float) for e in entries):
        raise RuleError(
            f"{place}: expected the hyper-parameter {scalar.name!r} to default to a number or a tuple of "
            f"numbers, got {default!r}; flags and text have no meaning in equations"
        )
    return default  # type: ignore[no-any-return]


def _apply(name: str, on_numbers: Callable[..., float], arguments: tuple[Any, ...]) -> Any:
    if not any(isinstance(argument, Symbol) for argument in arguments):
        return on_numbers(*arguments)
    result = operate(name, *arguments)
    if result is NotImplemented:
        raise RuleError(f"expected numbers or element values in {name}(), got {arguments!r}")
    return result


def host_sign(x: float) -> float:
    """-1, 0 or 1; 0 for NaN, as torch has it."""
    return float((x > 0) - (x < 0))


def sqrt(x: Any) -> Any:
    """The square root, correctly rounded."""
    return _apply("sqrt", math.sqrt, (x,))


def absolute(x: Any) -> Any:
    """The absolute value (``abs`` in a rule)."""
    return _apply("abs", abs, (x,))


def sign(x: Any) -> Any:
    """-1, 0 or 1; 0 for NaN, as torch has it."""
    return _apply("sign", host_sign, (x,))


def minimum(x: Any, y: Any) -> Any:
    """The smaller of two; NaN if either element is NaN; a zero result is +0."""
    return _apply("minimum", min, (x, y))


def maximum(x: Any, y: Any) -> Any:
    """The larger of two; NaN if either element is NaN; a zero result is +0."""
    return _apply("maximum", max, (x, y))


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = types.MappingProxyType(
    {"sqrt": sqrt, "abs": absolute, "sign": sign, "minimum": minimum, "maximum": maximum}
)
"""The functions that a rule knows without importing them. They win over globals of the same name."""
