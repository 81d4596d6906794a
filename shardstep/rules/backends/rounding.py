"""Exactly rounded conversions and fused multiply-adds on numpy arrays, made of operations that IEEE-754 fixes.

No libm and no conversion instruction that flushes denormals. The callers silence numpy's warnings and see to it that
the thread keeps denormals. Two tools do the work: the error of a sum or product as a number of its own (Knuth,
Dekker), and rounding to odd, after which a second rounding to fewer bits is as good as a single one (Boldo, Melquiond).
"""

import math
from fractions import Fraction
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

NUMPY: Final[dict[torch.dtype, np.dtype[Any]]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
"""The dtypes that numpy knows as they are; the low ones are read and written as 16-bit words."""

LOW_NAN: Final = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
"""The low dtypes, and the quiet NaN that every NaN becomes."""

_SPLITTER: Final = 2.0**27 + 1.0


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 values, rounded once: the product is exact in float64, the sum is rounded to odd."""
    product = np.multiply(a, b, dtype=np.float64)
    total, error = _two_sum(product, np.asarray(c, np.float64))
    return _to_odd(total, error).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float64 values, rounded once."""
    a, b, c = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in (a, b, c)))
    plain = np.asarray(a * b)
    size, summand = np.abs(plain), np.abs(c)
    factors = np.isfinite(a) & np.isfinite(b)
    # Two plain operations will do where a factor or the summand is zero or not finite, and where the product is too
    # small to move the summand. But it must not overflow beside an infinite summand, nor lend a zero its sign.
    simple = (a == 0) | (b == 0) | (c == 0) | ~(factors & np.isfinite(c))
    simple |= (size < 2.0**-960) & (summand > 2.0**-850)
    result = np.where((c == 0) & (a != 0) & (b != 0), plain, np.where(factors & ~np.isfinite(c), c, plain + c))
    tame = (size >= 2.0**-960) & (size <= 2.0**1020) & (summand <= 2.0**1020)
    tame &= (np.abs(a) <= 2.0**990) & (np.abs(b) <= 2.0**990) & ~simple
    np.copyto(result, _fma64_without_extremes(a, b, c), where=tame)
    for place in map(tuple, np.argwhere(~(tame | simple))):
        result[place] = _fma_by_fractions(float(a[place]), float(b[place]), float(c[place]))
    return result


def _fma64_without_extremes(a: Array, b: Array, c: Array) -> Array:
    product, low = _two_product(a, b)
    middle, tail = _two_sum(c, low)
    total, rest = _two_sum(product, middle)
    return np.asarray(total + _to_odd(*_two_sum(tail, rest)))


def _fma_by_fractions(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        size = float(abs(exact))
    except OverflowError:
        size = math.inf
    return -size if exact < 0 else size


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its error, which is exact."""
    total = np.asarray(a + b)
    shadow = total - a
    return total, np.asarray((a - (total - shadow)) + (b - shadow))


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded product and its error, exact if nothing over- or underflows."""
    product = np.asarray(a * b)
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(value: Array) -> tuple[Array, Array]:
    scaled = value * _SPLITTER
    high = scaled - (scaled - value)
    return high, value - high


def _to_odd(total: Array, error: Array) -> Array:
    """The sum of both, rounded to odd: an inexact one takes the neighbour, of the two, whose last bit is set."""
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
    # The bits of a float count its magnitude.
    outwards = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    return np.asarray(np.where(inexact, bits + outwards, bits)).view(np.float64)


def to_low(values: Array, dtype: torch.dtype) -> Array:
    """float32 or float64 as the 16-bit words of bfloat16 or float16, rounded once, to nearest even."""
    values = np.asarray(values)
    words = _to_bfloat16(values) if dtype == torch.bfloat16 else values.astype(np.float16).view(np.uint16)
    return np.asarray(np.where(np.isnan(values), np.uint16(LOW_NAN[dtype]), words))


def _to_bfloat16(values: Array) -> Array:
    bits = (values if values.dtype == np.float32 else _to_odd_float32(values)).view(np.uint32)
    tie = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + tie) >> np.uint32(16)).astype(np.uint16)


def _to_odd_float32(values: Array) -> Array:
    nearest = values.astype(np.float32)
    bits, error = nearest.view(np.int32), values - nearest
    inexact = (error != 0) & np.isfinite(values) & ((bits & 1) == 0)
    outwards = np.where(np.abs(values) > np.abs(nearest), np.int32(1), np.int32(-1))
    # From a zero, outwards is towards the value's side; the sign bit of the nearest is already the right one.
    return np.asarray(np.where(inexact, bits + outwards, bits)).view(np.float32)


def widen(words: Array, dtype: torch.dtype) -> Array:
    """The 16-bit words of bfloat16 or float16 as float32, exactly."""
    if dtype == torch.float16:
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def read(tensor: Tensor, compute: torch.dtype) -> Array:
    """The values of a tensor in the compute dtype: a view of its memory where that is possible."""
    raw = raw_view(tensor.detach().cpu())
    values = widen(raw, tensor.dtype) if tensor.dtype in LOW_NAN else raw
    return values.astype(NUMPY[compute], copy=False)


def write(values: Array, tensor: Tensor) -> None:
    """Fill a tensor with values, each rounded once to its dtype."""
    low = tensor.dtype in LOW_NAN
    words = to_low(values, tensor.dtype) if low else np.asarray(values).astype(NUMPY[tensor.dtype], copy=False)
    host = tensor.detach() if tensor.is_cpu else torch.empty_like(tensor, device="cpu")
    raw_view(host)[...] = words
    if not tensor.is_cpu:
        tensor.detach().copy_(host)


def raw_view(tensor: Tensor) -> Array:
    """The memory of a CPU tensor as numpy sees it: low dtypes as words."""
    if tensor.dtype in LOW_NAN:
        return np.asarray(tensor.view(torch.int16).numpy()).view(np.uint16)
    return np.asarray(tensor.numpy())
