"""How rules see a tensor: as a batch of matrices, its columns the last dimension and its rows the one before.

A tensor of fewer dimensions than two is one row. A *line* is a row or a column: rows are numbered through all
matrices, and so are columns. Plain arithmetic on shapes; nothing here sees a number of a tensor.
"""

from math import prod
from typing import NamedTuple

from shardstep.rules.ir import SQUARE, Shape


class View(NamedTuple):
    """``rows`` and ``columns`` are those of one matrix."""

    batch: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.batch * self.rows * self.columns

    def extent(self, shape: Shape) -> tuple[int, ...]:
        """Of an array of values of a shape, so that numpy joins them; () for what is one number."""
        batch, rows, columns = self
        extents: dict[Shape, tuple[int, int, int]] = {
            "element": (batch, rows, columns),
            "row": (batch, rows, 1),
            "column": (batch, 1, columns),
            "rr": (batch, rows, rows),
            "cc": (batch, columns, columns),
            "cr": (batch, columns, rows),
        }
        return extents.get(shape, ())

    def lines(self, shape: Shape) -> int:
        """How many rows or columns there are."""
        return self.batch * (self.rows if shape == "row" else self.columns)

    def terms(self, shape: Shape) -> int:
        """How many elements a row or a column has."""
        return self.columns if shape == "row" else self.rows

    def touched(self, shape: Shape, start: int, stop: int) -> slice:
        """The rows that elements ``start`` to ``stop`` lie in, or the columns of the matrices that they lie in."""
        if start >= stop:
            return slice(0, 0)
        size = self.columns if shape == "row" else self.rows * self.columns
        first, last = start // size, (stop - 1) // size
        return slice(first, last + 1) if shape == "row" else slice(first * self.columns, (last + 1) * self.columns)


def view_of(shape: tuple[int, ...]) -> View:
    """How a tensor of this shape is seen."""
    matrix = (1, 1, *shape)[-2:] if len(shape) < 2 else shape[-2:]
    return View(prod(shape[:-2]), *matrix)


def state_shape(shape: Shape, param: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a state that has one value for each element, row, column, pair of rows or pair of columns of a
    param, or for all of it. Squares are matrices even where the param is not.
    """
    if shape in SQUARE:
        return (*param[:-2], *view_of(param).extent(shape)[1:])
    if shape == "row":
        return (*param[:-1], 1) if param else ()
    if shape == "column":
        return (*param[:-2], 1, param[-1]) if len(param) > 1 else param
    return param if shape == "element" else ()
