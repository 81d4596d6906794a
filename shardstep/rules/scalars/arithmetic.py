"""What each operation gives on Python's floats, by IEEE's rules: none of these functions raises.

``fault`` tells which of those results a *uniform* value may not have: a hyper-parameter is then out of its range.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Final


def divide(a: float, b: float) -> float:
    if b != 0.0:
        return a / b
    if a == 0.0 or math.isnan(a):
        return math.nan
    return math.copysign(math.inf, a) * math.copysign(1.0, b)


def modulo(a: float, b: float) -> float:
    """Python's remainder: it has the sign of b."""
    return a % b if b != 0.0 else math.nan


def square_root(x: float) -> float:
    return math.nan if x < 0.0 else math.sqrt(x)


def exponential(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def logarithm(x: float) -> float:
    if x == 0.0:
        return -math.inf
    return math.nan if x < 0.0 else math.log(x)


def power(a: float, b: float) -> float:
    try:
        return math.pow(a, b)
    except OverflowError:
        return -math.inf if a < 0.0 and b % 2.0 == 1.0 else math.inf
    except ValueError:  # 0 ** negative, or a negative number to a fractional power
        return math.copysign(math.inf, a if b % 2.0 == 1.0 else 1.0) if a == 0.0 else math.nan


def fused(a: float, b: float, c: float) -> float:
    """a * b + c, rounded once."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b + c
    if not math.isfinite(c):
        return c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c if a == 0.0 or b == 0.0 else 0.0
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def smaller(a: float, b: float) -> float:
    if a != a or b != b:
        return math.nan
    return (a if a < b else b) + 0.0  # + 0.0 makes +0 of -0


def larger(a: float, b: float) -> float:
    if a != a or b != b:
        return math.nan
    return (a if a > b else b) + 0.0


def sign(x: float) -> float:
    return 1.0 if x > 0.0 else -1.0 if x < 0.0 else 0.0


def to_bfloat16(x: float) -> float:
    """The nearest bfloat16, ties to even."""
    if x == 0.0 or not math.isfinite(x):
        return x
    exponent = max(math.frexp(x)[1], -125)
    rounded = math.ldexp(round(math.ldexp(x, 8 - exponent)), exponent - 8)
    return math.copysign(math.inf if abs(rounded) >= 2.0**128 else rounded, x)


ARITHMETIC: Final[Mapping[str, Callable[..., float]]] = {
    "neg": lambda x: -x,
    "abs": abs,
    "sign": sign,
    "sqrt": square_root,
    "rsqrt": lambda x: divide(1.0, square_root(x)),
    "exp": exponential,
    "log": logarithm,
    "tanh": math.tanh,
    "bfloat16": to_bfloat16,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": divide,
    "mod": modulo,
    "minimum": smaller,
    "maximum": larger,
    "pow": power,
    "fma": fused,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a: not a,
    "where": lambda c, a, b: a if c else b,
    "choose": lambda c, a, b: a if c else b,
}


def fault(operation: str, arguments: Sequence[float], value: float) -> str | None:
    """What is wrong with a uniform ``value``: NaN made of numbers, or an infinity of finite ones; None if nothing."""
    if operation in ("div", "mod") and arguments[1] == 0.0:
        return "a division by zero"
    if math.isfinite(value) or operation in ("where", "choose"):
        return None
    if math.isnan(value):
        return None if any(map(math.isnan, arguments)) else _NOT_A_NUMBER.get(operation, "no number (NaN)")
    if not all(map(math.isfinite, arguments)):
        return None
    return _NO_FINITE_VALUE.get((operation, arguments[0] == 0.0), "a number too large for float64")


_NOT_A_NUMBER: Final[Mapping[str, str]] = {
    "sqrt": "the square root of a negative number",
    "rsqrt": "the square root of a negative number",
    "log": "the logarithm of a negative number",
    "pow": "a fractional power of a negative number",
}
_NO_FINITE_VALUE: Final[Mapping[tuple[str, bool], str]] = {
    ("rsqrt", True): "a division by zero",
    ("log", True): "the logarithm of zero",
    ("pow", True): "a negative power of zero",
}
