"""Tiles of rows and columns, in the text of a Triton kernel.

A program takes 128 rows by 128 columns of one matrix, 16 rows at a time. What a row or column gets from a program is
added to its number in memory by one atomic operation, in whatever order: such sums are exact. Maxima are taken of the
bits as integers, ordered as the numbers are, with NaN above all.
"""

from typing import Final

from shardstep.errors import RuleError
from shardstep.rules.ir import Instruction, Phase

ROWS_AT_ONCE: Final = 16
STEPS: Final = 8
COLUMNS: Final = 128
SHAPE: Final = f"[{ROWS_AT_ONCE}, {COLUMNS}]"

BEGIN: Final = f"""\
    tiles = (rows + {ROWS_AT_ONCE * STEPS - 1}) // {ROWS_AT_ONCE * STEPS}
    matrix = place // (rows * columns) + tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles).to(tl.int64) * {ROWS_AT_ONCE * STEPS}
    across = tl.program_id(1).to(tl.int64) * {COLUMNS} + tl.arange(0, {COLUMNS})
    one_column = matrix * columns + across"""

ROWS: Final = f"""\
    for step in range({STEPS}):
        down = first + step * {ROWS_AT_ONCE} + tl.arange(0, {ROWS_AT_ONCE})
        one_row = matrix * rows + down
        i = (one_row * columns)[:, None] + across[None, :] - place
        inside = (i >= 0) & (i < n) & (down < rows)[:, None] & (across < columns)[None, :]
        row = tl.broadcast_to(one_row[:, None], {SHAPE})
        column = tl.broadcast_to(one_column[None, :], {SHAPE})"""

WHERE: Final = (
    "row = (place + i) // columns",
    "column = row // rows * columns + (place + i) - row * columns",
)
"""Where an element is whose program takes none of them."""


def accumulators(phase: Phase) -> list[str]:
    """What columns have so far."""
    pairs = zip((number for number, _ in phase.sums), phase.reductions, strict=True)
    return [
        f"    held{number} = tl.full({SHAPE}, {_least(line)})" for number, line in pairs if line.type.shape == "column"
    ]


def _is_max(line: Instruction) -> bool:
    return line.operation.endswith("max")


def _least(line: Instruction) -> str:
    return f"{-(2**63)}, tl.int64" if _is_max(line) else "0.0, tl.float64"


def accumulate(line: Instruction, number: int) -> str:
    """What a step adds. A total is of terms that are rounded to the grid by their anchors."""
    if line.operation in ("row_sum", "column_sum"):
        raise RuleError(f"expected totals in a Triton kernel, got {line.operation}; run the pass 'exact' first")
    value, *anchor = (f"v{argument}" for argument in line.arguments)
    if _is_max(line):
        term = f"tl.where(inside, order({value}.to(tl.float64)), {-(2**63)})"
    else:
        term = f"tl.where(inside, ({value}.to(tl.float64) + {anchor[0]}) - {anchor[0]}, 0.0)"
    if line.type.shape == "column":
        joined = f"tl.maximum(held{number}, {term})" if _is_max(line) else f"held{number} + {term}"
        return f"held{number} = {joined}"
    return _atomic(number, line, term, axis=1, where="one_row", mask="down < rows")


def ends(phase: Phase) -> list[str]:
    """What columns have becomes a part of their numbers."""
    pairs = zip((number for number, _ in phase.sums), phase.reductions, strict=True)
    return [
        "    " + _atomic(number, line, f"held{number}", axis=0, where="one_column", mask="across < columns")
        for number, line in pairs
        if line.type.shape == "column"
    ]


def _atomic(number: int, line: Instruction, values: str, *, axis: int, where: str, mask: str) -> str:
    """Lines that the run has no part in lie outside what there is room for."""
    first = f"first_{line.type.shape}"
    what = "max" if _is_max(line) else "sum"
    operation = "atomic_max" if what == "max" else "atomic_add"
    room = f"({mask}) & ({where} >= {first}) & ({where} < {first} + count_{line.type.shape})"
    return f"tl.{operation}(partials{number} + {where} - {first}, tl.{what}({values}, axis={axis}), mask={room})"
