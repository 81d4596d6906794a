"""What each pointwise operation of the intermediate form computes, in numpy: one function an operation.

Never numpy's or torch's own exp, log, tanh or power on arrays: their bits differ between machines, and with the place
in an array. Values that the host computes (uniform and tensor ones) are float64 and go through the same functions;
only there are `exp log tanh pow` those of the math module, and is there `mod`.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from shardstep.rules import ir
from shardstep.rules.backends.rounding import NUMPY, fma32, fma64, to_low, widen
from shardstep.rules.passes.elementary import ELEMENTARY, expand
from shardstep.rules.scalars.arithmetic import modulo

Array = NDArray[Any]

WORD: Final[dict[np.dtype[Any], np.dtype[Any]]] = {
    np.dtype(np.float32): np.dtype(np.uint32),
    np.dtype(np.float64): np.dtype(np.uint64),
}
"""The words of each compute dtype."""


def constant(line: ir.Instruction, compute: torch.dtype) -> Array:
    """The value of a ``const``."""
    kinds = {"real": np.dtype(np.float64), "bool": np.dtype(np.bool_), "word": WORD[NUMPY[compute]]}
    return np.asarray(line.attributes[0], kinds[line.type.kind])


def evaluate(line: ir.Instruction, arguments: Sequence[Array], compute: torch.dtype) -> Array:
    """One pointwise instruction; reals that the host computed are rounded here, where they meet others."""
    if line.operation in ELEMENTARY and not line.type.is_single:
        return _elementary(line, arguments, compute)
    real = np.dtype(np.float64) if line.type.is_single else NUMPY[compute]
    if line.operation in ("bits", "from_bits"):
        return _reinterpret(line, np.asarray(arguments[0]), real, NUMPY[compute])
    kinds = ir.OPERATIONS[line.operation].takes
    operands = [np.asarray(a, real if kind == "real" else None) for a, kind in zip(arguments, kinds, strict=True)]
    if line.attributes:
        return np.asarray(_FUNCTIONS[line.operation](operands[0], operands[0].dtype.type(line.attributes[0])))
    return np.asarray(_FUNCTIONS[line.operation](*operands))


def _reinterpret(line: ir.Instruction, value: Array, real: np.dtype[Any], compute: np.dtype[Any]) -> Array:
    """A host value has the bits of what it is rounded to."""
    if line.operation == "bits":
        return value.astype(compute, copy=False).view(WORD[compute])
    return value.view(compute).astype(real, copy=False)


def _elementary(line: ir.Instruction, arguments: Sequence[Array], compute: torch.dtype) -> Array:
    shapes = tuple("uniform" if a.ndim == 0 else "element" for a in arguments)
    program = _expansion(line.operation, shapes, compute)
    values: list[Array] = []
    for inner in program.instructions:
        if inner.operation in ("load", "hyper"):
            values.append(arguments[int(str(inner.attributes[0])[1:])])
        elif inner.operation == "const":
            values.append(constant(inner, compute))
        else:
            values.append(evaluate(inner, [values[a] for a in inner.arguments], compute))
    return values[program.stores[0][1]]


@cache
def _expansion(operation: str, shapes: tuple[str, ...], compute: torch.dtype) -> ir.Program:
    """``operation`` alone, in basic operations. Its operands are called x0 and x1."""
    names = [f"x{i}" for i in range(len(shapes))]
    states = tuple(ir.State(n) for n, shape in zip(names, shapes, strict=True) if shape == "element")
    hypers = tuple(ir.Hyper(n) for n, shape in zip(names, shapes, strict=True) if shape == "uniform")
    program = ir.Program(operation, states, hypers, (), ())
    build = ir.Builder(program.shapes)
    operands = [build.load(n) if s == "element" else build.hyper(n) for n, s in zip(names, shapes, strict=True)]
    result = build.emit(operation, *operands)
    return expand(program.with_instructions(build.instructions, [("param", result)]), compute)


def _sign(a: Array) -> Array:
    return np.asarray((a > 0).astype(a.dtype) - (a < 0).astype(a.dtype))


def _minimum(a: Array, b: Array) -> Array:
    # Which of two zeros numpy returns is up to the place in the array; adding +0 settles it.
    return np.asarray(np.minimum(a, b) + a.dtype.type(0))


def _maximum(a: Array, b: Array) -> Array:
    return np.asarray(np.maximum(a, b) + a.dtype.type(0))


def _fma(a: Array, b: Array, c: Array) -> Array:
    return fma32(a, b, c) if a.dtype == np.float32 else fma64(a, b, c)


def _bfloat16(a: Array) -> Array:
    return widen(to_low(a, torch.bfloat16), torch.bfloat16).astype(a.dtype)


def _rsqrt(a: Array) -> Array:
    return np.asarray(a.dtype.type(1) / np.sqrt(a))


def _on_host(function: Callable[..., float], exceptional: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the math module; numpy's gives the value of IEEE-754 where Python raises instead."""

    def wrapped(*values: Array) -> Any:
        try:
            return np.float64(function(*map(float, values)))
        except (OverflowError, ValueError):
            return exceptional(*values)

    return wrapped


_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "mod": _on_host(modulo, np.remainder),
    "fma": _fma,
    "neg": np.negative,
    "abs": np.abs,
    "sign": _sign,
    "sqrt": np.sqrt,
    "rsqrt": _rsqrt,
    "bfloat16": _bfloat16,
    "exp": _on_host(math.exp, np.exp),
    "log": _on_host(math.log, np.log),
    "tanh": _on_host(math.tanh, np.tanh),
    "pow": _on_host(math.pow, np.power),
    "minimum": _minimum,
    "maximum": _maximum,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "where": np.where,
    "choose": np.where,
    "word_add": np.add,
    "word_sub": np.subtract,
    "word_mul": np.multiply,
    "word_and": np.bitwise_and,
    "word_or": np.bitwise_or,
    "word_xor": np.bitwise_xor,
    "word_shl": np.left_shift,
    "word_shr": np.right_shift,
}
