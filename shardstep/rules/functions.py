"""The functions of the language, for editors, type checkers and linters: rules know them without importing them.

A rule's body is read, not run, so none of these is ever called by a rule; called outside of one, they say so. What
they mean is in `rules.ir`; ``abs`` and ``sum`` are Python's own names.
"""

from typing import Any, NoReturn

from shardstep.errors import RuleError


def _outside(name: str) -> NoReturn:
    raise RuleError(
        f"expected {name}() inside a function under @rule or @inline, whose text is compiled; got a call by Python"
    )


def sqrt(x: Any) -> Any:
    """The square root, correctly rounded."""
    _outside("sqrt")


def rsqrt(x: Any) -> Any:
    """1 / sqrt(x), rounded twice."""
    _outside("rsqrt")


def exp(x: Any) -> Any:
    """The exponential, within one unit in the last place."""
    _outside("exp")


def log(x: Any) -> Any:
    """The natural logarithm, within one unit in the last place."""
    _outside("log")


def tanh(x: Any) -> Any:
    """The hyperbolic tangent, within two units in the last place."""
    _outside("tanh")


def bfloat16(x: Any) -> Any:
    """x rounded to bfloat16, to nearest even. ``bfloat16(x @ y)`` of two such values is one product in bfloat16."""
    _outside("bfloat16")


def sign(x: Any) -> Any:
    """-1, 0 or 1; 0 for NaN."""
    _outside("sign")


def minimum(x: Any, y: Any) -> Any:
    """The smaller of two; NaN if either is NaN; a zero result is +0."""
    _outside("minimum")


def maximum(x: Any, y: Any) -> Any:
    """The larger of two; NaN if either is NaN; a zero result is +0."""
    _outside("maximum")


def clip(x: Any, low: Any, high: Any) -> Any:
    """minimum(maximum(x, low), high)."""
    _outside("clip")


def lerp(start: Any, end: Any, weight: Any) -> Any:
    """fma(weight, end - start, start)."""
    _outside("lerp")


def fma(x: Any, y: Any, z: Any) -> Any:
    """x · y + z, rounded once."""
    _outside("fma")


def where(condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, else y, for each element."""
    _outside("where")


def mean(x: Any) -> Any:
    """The mean over the tensor."""
    _outside("mean")


def norm(x: Any) -> Any:
    """The root of the sum of squares over the tensor."""
    _outside("norm")


def max_abs(x: Any) -> Any:
    """The largest absolute value in the tensor."""
    _outside("max_abs")


def row_mean(x: Any) -> Any:
    """The mean of each row."""
    _outside("row_mean")


def col_mean(x: Any) -> Any:
    """The mean of each column."""
    _outside("col_mean")


def identity(x: Any) -> Any:
    """The identity matrix of the size of the square matrix x."""
    _outside("identity")
