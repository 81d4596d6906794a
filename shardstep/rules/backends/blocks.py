"""Reductions with an order that is part of their meaning, so that no bit depends on where an array was cut.

A sum: in each block of 1,024 global positions, 16 float64 lanes (position mod 16) add in ascending order from +0;
lanes 8 apart are added, then 4, 2 and 1. The blocks' partials are joined by a fixed binary tree. A maximum needs no
order; NaN wins, and zeros give +0. Everything is float64 here; who asks rounds.

The sum of a row or column needs no order, so its parts may be added anywhere and put together by adding: each term,
as float64, is first rounded to a multiple of one number, the *grid*, which is so coarse that every sum of such terms
is exact. With m the largest magnitude, 2^(e-1) <= m < 2^e, and n terms, 2^(l-1) < n <= 2^l, the grid is 2^(e+l-53):
no sum of n such multiples has more than 53 bits. A term is off by half a grid at most, the sum by n/2 grids: for
float32 terms far less than their own rounding. (x + M) - M rounds to the grid, where M is 1.5 * 2^(e+l-1), the
*anchor*. A sum over an infinity or a NaN is NaN, and so is one of float64 whose anchor would be above 2^1023.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardstep.types import BLOCK_NUMEL as BLOCK

Array = NDArray[Any]

LANES: Final = 16
"""Accumulators of a block: a place's is its position mod 16."""

_LEAST_POWER, _GREATEST_POWER = -1022, 1022
"""Of two, in anchors: the grid of the least is the least denormal; above the greatest, sums may overflow."""


def blocks_touched(count: int, offset: int) -> int:
    """How many blocks of the global grid a run has elements in."""
    return (offset + count - 1) // BLOCK - offset // BLOCK + 1 if count else 0


def partials(operation: str, values: Array, offset: int) -> Array:
    """One float64 for each block that the flat ``values`` touch; the first of them is at position ``offset``."""
    before = offset % BLOCK
    blocks = blocks_touched(values.size, offset)
    # The filler changes no result: a lane is never -0.
    flat = np.full(blocks * BLOCK, -np.inf if operation == "max" else 0.0)
    flat[before : before + values.size] = values
    grid = flat.reshape(blocks, BLOCK)
    return np.asarray(grid.max(axis=1, initial=-np.inf) + 0.0) if operation == "max" else _block_sums(grid)


def _block_sums(grid: Array) -> Array:
    """The sum of each row, which is one block."""
    lanes = np.zeros((len(grid), LANES))
    for start in range(0, BLOCK, LANES):
        lanes += grid[:, start : start + LANES]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[:, :width] + lanes[:, width:]
    return np.asarray(lanes[:, 0])


def combine(operation: str, parts: Array) -> Array:
    """The partials along the first axis as one: a sum's by the tree, an odd last one moving up unchanged."""
    if operation == "max":
        return np.asarray(parts.max(axis=0, initial=-np.inf))
    if not len(parts):
        return np.zeros(parts.shape[1:])
    with np.errstate(all="ignore"):
        while len(parts) > 1:
            even = len(parts) // 2 * 2
            parts = np.concatenate([parts[0:even:2] + parts[1:even:2], parts[even:]])
    return np.asarray(parts[0])


def reduce(operation: str, values: Array, offset: int = 0) -> Array:
    """The whole reduction of flat values."""
    return combine(operation, partials(operation, values, offset))


def line_max(values: Array, axis: int) -> Array:
    """The largest of each row (axis -1) or column (axis -2) of matrices."""
    return np.asarray(values.max(axis=axis, keepdims=True, initial=-np.inf) + values.dtype.type(0))


def line_sum(values: Array, largest: Array, axis: int) -> Array:
    """The sum of each, in float64; ``largest``: the largest magnitude in each."""
    anchor = anchors(largest, values.shape[axis])
    return np.asarray(((values.astype(np.float64) + anchor) - anchor).sum(axis=axis, keepdims=True))


def anchors(largest: Array, terms: int) -> Array:
    """For sums of ``terms`` numbers of at most these magnitudes: M, so that sums of (x + M) - M are exact.

    With ``largest`` < 2^e and ``terms`` <= 2^l, M is 1.5 * 2^k for k = e + l - 1, or e + 1 if that is more.
    """
    largest = np.asarray(largest, np.float64)
    bits = max(terms - 1, 0).bit_length()
    power = np.maximum(np.frexp(largest)[1] + max(bits - 1, 1), _LEAST_POWER)  # any will do where all terms are zero
    known = (largest < np.inf) & (power <= _GREATEST_POWER)
    return np.where(known, np.ldexp(1.5, power), np.nan)


def no_lines(operation: str, count: int) -> Array:
    """What rows or columns have of no element."""
    return np.full(count, -np.inf if operation.endswith("max") else 0.0)


def join_lines(operation: str, into: Array, others: Array) -> None:
    """Put what lines have of other elements into what they have: in any order."""
    (np.maximum if operation.endswith("max") else np.add)(into, others, out=into)
