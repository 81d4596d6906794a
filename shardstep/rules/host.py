"""Per-step scalars: host expressions evaluated in Python's float64, once per kernel call, for every back end.

Rounding to the compute dtype is the back end's, once, where a scalar meets an element.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

from shardstep.errors import RuleError
from shardstep.rules.language import host_sign
from shardstep.rules.program import Constant, HostExpression, Hyperparameter

_OPERATIONS: Final[Mapping[str, Callable[..., float]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": math.pow,
    "neg": operator.neg,
    "sqrt": math.sqrt,
    "abs": abs,
    "sign": host_sign,
    "minimum": min,
    "maximum": max,
}


def evaluate(expression: HostExpression, scalars: Mapping[str, object]) -> float:
    """The value of ``expression``; ``scalars``: numbers, one-element tensors, or tuples of them, by name.

    Raises RuleError where the mathematics has no value (a division by zero, the root of a negative number).
    """
    try:
        return _value(expression, scalars)
    except (ArithmeticError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in scalars.items())
        raise RuleError(
            f"expected the per-step scalar {expression} to have a value, got {error} with {given}; "
            f"change the hyper-parameters"
        ) from error


def _value(expression: HostExpression, scalars: Mapping[str, object]) -> float:
    if isinstance(expression, Constant):
        return expression.value
    if isinstance(expression, Hyperparameter):
        given: Any = scalars[expression.name]
        return float(given if expression.index is None else given[expression.index])
    return _OPERATIONS[expression.operation](*(_value(argument, scalars) for argument in expression.arguments))
