"""What a rule may say: the ``rule`` and ``inline`` decorators, how states start, and the functions that rules know.

A rule is a pure function over elements::

    @rule
    def momentum(param, grad, buffer=zeros, *, lr=1e-3, momentum=0.9):
        buffer = momentum * buffer + grad
        return param - lr * buffer, buffer

This room looks at signatures only; it never reads a body, never runs a rule and never sees a tensor.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, NoReturn, Self, TypeAlias

from shardstep.errors import RuleError
from shardstep.rules.declared import Start, check_state, declared_all, is_number, refuse
from shardstep.rules.declared import state as state
from shardstep.rules.declared import zeros as zeros
from shardstep.rules.ir import State

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
        starts = {state.name: Start.of(state, dtypes.get(state.name, state.dtype)) for state in self.declared}
        return replace(self, declared=declared_all(self.function, starts))


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
        refuse(function, "", "E27", "expected a function with a name, got a lambda", "write it with def")
    if function.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        refuse(function, "", "E27", "expected a plain function, got an async one or a generator", "return the values")
    for argument in inspect.signature(function).parameters.values():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            text = f"expected every argument by name, got {argument}"
            refuse(function, argument.name, "E27", text, "list the arguments")
        is_state = decorator == "rule" and argument.kind is not argument.KEYWORD_ONLY
        if (argument.name in WORDS and not is_state) or argument.name in _PUT_IN:
            text = f"the argument {argument.name!r} has the name of what the language has already"
            refuse(function, argument.name, "E28", text, "give it another name")
    return function


def _states(function: types.FunctionType, arrays: list[inspect.Parameter]) -> tuple[State, ...]:
    inputs, states = arrays[:2], arrays[2:]
    if [a.name for a in inputs] != ["param", "grad"] or any(a.default is not a.empty for a in inputs):
        got = ", ".join(map(str, arrays))
        text = f"expected the first two arguments to be param and grad without defaults, got ({got})"
        refuse(function, "", "E27", text, "name them so")
    for argument in states:
        name = argument.name
        if name in RESERVED:
            refuse(function, name, "E28", f"expected {name!r} after *, got it as a state", "it is given by itself")
        check_state(function, argument)
    return declared_all(function, {argument.name: argument.default for argument in states})


def _defaults(
    function: types.FunctionType, scalars: list[inspect.Parameter]
) -> dict[str, float | tuple[float, ...] | None]:
    defaults: dict[str, float | tuple[float, ...] | None] = {}
    for scalar in scalars:
        if scalar.name in _OF_GROUPS:
            text = f"expected a hyper-parameter, got {scalar.name!r}, where a parameter group keeps its parameters"
            refuse(function, scalar.name, "E28", text, "give it another name")
        if scalar.name not in GIVEN:
            defaults[scalar.name] = None if scalar.default is scalar.empty else _default(function, scalar)
        elif scalar.default is not scalar.empty:
            text = f"expected {scalar.name!r} without a default, got {scalar}"
            refuse(function, scalar.name, "E28", text, "it is always given")
    return defaults


def _default(function: types.FunctionType, scalar: inspect.Parameter) -> float | tuple[float, ...]:
    default = scalar.default
    entries = default if isinstance(default, tuple) else (default,)
    if isinstance(default, list | dict | set):
        text = f"the hyper-parameter {scalar.name!r} has the mutable default {default!r}"
        refuse(function, scalar.name, "E27", text, "write a tuple")
    flag = isinstance(default, bool)
    if not flag and (not entries or not all(is_number(entry) and entry == entry for entry in entries)):
        expected = f"expected {scalar.name!r} to default to a number, a tuple of numbers, True or False"
        hint = "text and objects have no meaning in equations"
        refuse(function, scalar.name, "E30", f"{expected}, got {default!r}", hint)
    return default  # type: ignore[no-any-return]


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
