"""Programs worked out in numpy, straight from the table of operations: float32 elements, float64 uniform values.

A second opinion for the tests of the passes: it shares no code with shardstep but the program itself. Its arrays are of
one row, so a row is one number for all, and a column is one element.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from shardstep.rules.ir import Phases, Program
from shardstep.rules.scalars import compile_scalars

Arrays = Mapping[str, np.ndarray]


def run(program: Program, arrays: Arrays, hypers: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[Any]]:
    """(the new arrays, every value). Raises ArithmeticError or ValueError where Python's math does."""
    values: list[Any] = []
    with np.errstate(all="ignore"):
        for line in program.instructions:
            arguments = [values[argument] for argument in line.arguments]
            values.append(_value(line.operation, line.attributes, arguments, arrays, hypers))
        stored = {name: np.broadcast_to(np.float32(values[v]), arrays[name].size) for name, v in program.stores}
    return {name: stored.get(name, array) for name, array in arrays.items()}, values


def run_phases(phases: Phases, arrays: Arrays, hypers: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The same by way of phases and the host's scalars."""
    after, whole = run(phases.program, arrays, hypers)
    lines = enumerate(phases.program.instructions)
    known = {i: float(whole[i]) for i, line in lines if line.operation in ("numel", "rows", "columns", "sum", "max")}
    for phase in phases.phases:
        scalars = compile_scalars(phases.program, phase.scalars)(hypers, known)
        given = {f"s{i}": value for i, value in enumerate(scalars)}
        new, values = run(phase.body, arrays, given | {f"v{i}": whole[v.number] for i, v in enumerate(phase.vectors)})
        assert all(np.array_equal(values[own], whole[number], equal_nan=True) for own, number in phase.sums)
    return {name: new[name] if phases.program.shapes[name] == "element" else after[name] for name in new}


def _value(operation: str, attributes: tuple[Any, ...], arguments: list[Any], arrays: Arrays, hypers: Any) -> Any:
    match operation:
        case "const":
            value = attributes[0]
            return np.uint32(value) if type(value) is int else value
        case "hyper":
            given = hypers[attributes[0]]
            return given[attributes[1]] if len(attributes) > 1 else given
        case "load":
            return arrays[attributes[0]]
        case "numel" | "columns":
            return float(arrays["param"].size)
        case "rows":
            return 1.0
        case "index":
            return np.arange(arrays["param"].size, dtype=np.uint32)
        case "choose":
            return arguments[1] if arguments[0] else arguments[2]
        case "word_shl" | "word_shr":
            return _SHIFTS[operation](arguments[0], np.uint32(attributes[0]))
        case "sum":
            return _sum(arguments[0])
        case "max":
            return float(np.max(arguments[0]))
        case "row_sum" | "row_total":
            return _sum_of_row(arguments[0])
        case "row_max":
            return np.max(arguments[0], keepdims=True)
        case "column_max":
            return arguments[0]
        case "column_sum" | "column_total":
            return np.where(np.isfinite(arguments[0]), arguments[0] + np.float32(0), np.float32(np.nan))
    arguments = [a if isinstance(a, np.ndarray) else _scalar(a, arguments) for a in arguments]
    if operation in _HOST and not any(isinstance(a, np.ndarray) for a in arguments):
        return _HOST[operation](*map(float, arguments))
    return _POINTWISE[operation](*arguments)


def _scalar(value: Any, arguments: list[Any]) -> Any:
    """Rounded once where it meets elements; a float64 of numpy's among its like, for IEEE's divisions."""
    if isinstance(value, bool | np.bool_ | np.uint32):
        return value
    return np.float32(value) if any(isinstance(a, np.ndarray) for a in arguments) else np.float64(value)


def _sum_of_row(x: np.ndarray) -> np.ndarray:
    """Of multiples of one power of two, as whole numbers."""
    if not np.isfinite(x).all():
        return np.float32([np.nan])
    grid = 2.0 ** (math.frexp(float(np.abs(x).max()))[1] + (x.size - 1).bit_length() - 53)
    return np.float32([sum(round(float(value) / grid) for value in x) * grid])


def _sum(x: np.ndarray) -> float:
    partials = [_block(x[start : start + 1024].astype(np.float64)) for start in range(0, x.size, 1024)]
    while len(partials) > 1:
        pairs = [a + b for a, b in zip(partials[::2], partials[1::2], strict=False)]
        partials = pairs + (partials[-1:] if len(partials) % 2 else [])
    return float(partials[0])


def _block(x: np.ndarray) -> float:
    lanes = np.zeros(16)
    for position, value in enumerate(x):
        lanes[position % 16] += value
    for half in (8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half : 2 * half]
    return lanes[0]


def _fma(a: Any, b: Any, c: Any) -> Any:
    """By rounding to odd in float64: the product of two float32 numbers is exact there."""
    a, b, c = np.broadcast_arrays(*(np.float64(x) for x in (a, b, c)))
    product = a * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    inexact = (error != 0) & (total.view(np.uint64) & np.uint64(1) == 0) & np.isfinite(total)
    return np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total).astype(np.float32)


def bfloat16(x: Any) -> Any:
    """To nearest even, by scaling: exact in float64 for float32 and float64 values."""
    wide = np.float64(x)
    scale = np.maximum(np.frexp(np.where(np.isfinite(wide), wide, 1.0))[1], -125) - 8
    near = np.ldexp(np.rint(np.ldexp(wide, -scale)), scale)
    return np.where(np.abs(near) >= 2.0**128, np.copysign(np.inf, near), near).astype(x.dtype)[()]


_SHIFTS = {"word_shl": operator.lshift, "word_shr": operator.rshift}
_HOST: dict[str, Callable[..., float]] = {
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "pow": math.pow,
    "rsqrt": lambda x: 1.0 / math.sqrt(x),
}
_POINTWISE: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "abs": np.abs,
    "sign": lambda x: np.where(x > 0, x.dtype.type(1), np.where(x < 0, x.dtype.type(-1), x.dtype.type(0)))[()],
    "sqrt": np.sqrt,
    "bfloat16": bfloat16,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "minimum": lambda a, b: np.minimum(a, b) + a.dtype.type(0),
    "maximum": lambda a, b: np.maximum(a, b) + a.dtype.type(0),
    "fma": _fma,
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "where": lambda c, a, b: np.where(c, a, b)[()],
    "bits": lambda x: np.float32(x).view(np.uint32),
    "from_bits": lambda x: x.view(np.float32),
    "word_add": operator.add,
    "word_sub": operator.sub,
    "word_mul": operator.mul,
    "word_and": operator.and_,
    "word_or": operator.or_,
    "word_xor": operator.xor,
}
