"""Reductions with an order that is part of their meaning, so that no bit depends on where an array was cut.

A sum: in each block of 1,024 global positions, 16 float64 lanes (position mod 16) add in ascending order from +0;
lanes 8 apart are added, then 4, 2 and 1. The blocks' partials are joined by a fixed binary tree. A maximum needs no
order; NaN wins, and zeros give +0. Everything is float64 here; who asks rounds.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardstep.types import BLOCK_NUMEL as BLOCK

Array = NDArray[Any]

LANES: Final = 16
"""Accumulators of a block: a place's is its position mod 16."""

_ROW_SCRATCH: Final = 2**20
"""Elements: so many rows are summed together as fit."""


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


def row_sums(matrix: Array, offset: int) -> Array:
    """Each row's sum, in a column: a row is a run of global positions of its own."""
    rows, columns = matrix.shape
    before = (offset + columns * np.arange(rows)) % BLOCK
    blocks = -(-(BLOCK - 1 + columns) // BLOCK)
    together = max(1, _ROW_SCRATCH // (blocks * BLOCK))
    sums = np.zeros((rows, 1))
    for start in range(0, rows, together):
        part = matrix[start : start + together]
        grid = np.zeros((len(part), blocks * BLOCK))
        places = before[start : start + together, None] + np.arange(columns)
        np.put_along_axis(grid, places, part, axis=1)
        # A block that a row does not touch adds +0 at the end of the tree, which changes nothing.
        parts = _block_sums(grid.reshape(-1, BLOCK)).reshape(len(part), blocks)
        sums[start : start + together, 0] = combine("sum", parts.T)
    return sums


def column_sums(matrix: Array) -> Array:
    """Each column's sum, in a row: by the tree over the row index."""
    return combine("sum", matrix.astype(np.float64)).reshape(1, -1)
