"""The reference back end: programs in numpy. It says what every other back end must give, bit for bit.

`run_whole` evaluates a whole program, of any shapes, on one tensor. `compile_phase` makes a kernel of one pass over
flat arrays, for machines that have no other back end: in tiles and in place, on any device by way of the CPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardstep.rules import ir
from shardstep.rules.backends import blocks
from shardstep.rules.backends.dynamic8 import MAPS
from shardstep.rules.backends.elements import constant, evaluate
from shardstep.rules.backends.evaluation import Evaluation, exactly, last_uses, positions
from shardstep.rules.backends.rounding import NUMPY, raw_view, read, write
from shardstep.rules.binding import CODED, Binding, Lines, PhaseKernel, cut_states, scale_name

Array = NDArray[Any]

TILE: Final = 65_536
"""Elements per tile of a phase, on the grid of global positions: a handful of arrays stay in the cache."""


def run_whole(
    program: ir.Program,
    arrays: Mapping[str, Tensor],
    hypers: Mapping[str, object],
    *,
    compute: torch.dtype,
    offset: int = 0,
) -> dict[str, Tensor]:
    """The new values of the arrays that ``program`` stores, each in the shape, dtype and device of its old one.

    ``arrays``: param, grad and the states: of param's shape, or one number for each row, for each column (see `view`)
    or for the tensor. ``hypers``: numbers or tuples of them by name, with ``step``. ``offset``: the global position of
    element 0. Raises RuleError where a per-step scalar has no value.
    """
    with exactly():
        whole = Evaluation(program, arrays, hypers, compute, offset)
        values = whole.run(keep_all=False)
        whole.refuse_scalars_without_value(values)
        return {name: whole.stored(name, values[value]) for name, value in program.stores}


def compile_phase(phase: ir.Phase, binding: Binding) -> PhaseKernel:
    """The reference kernel of ``phase``: any device, any dtypes of the binding."""
    return _Kernel(phase, binding)


class _Kernel:
    def __init__(self, phase: ir.Phase, binding: Binding) -> None:
        self._body, self._sums, self._binding = phase.body, [number for number, _ in phase.sums], binding
        self._last = last_uses(phase.body)

    def __call__(
        self,
        arrays: Mapping[str, Tensor],
        scalars: Sequence[float],
        *,
        offset: int = 0,
        low: Tensor | None = None,
        lines: Lines | None = None,
    ) -> tuple[Tensor, ...]:
        numel = next(iter(arrays.values())).numel()
        flat_low = None if low is None else low.view(-1)
        found: dict[int, list[Array]] = {number: [] for number in self._sums}
        with exactly():
            shared = self._shared(scalars)
            for start, stop in _tiles(offset, numel):
                tile = cut_states(arrays, start, stop)
                values = self._run(tile, shared, offset + start, lines and replace(lines, start=lines.start + start))
                for number, parts in found.items():
                    parts.append(values[number])
                self._store(values, tile, None if flat_low is None else flat_low[start:stop])
            return tuple(torch.from_numpy(self._joined(n, parts, lines, numel)) for n, parts in found.items())

    def _joined(self, number: int, parts: list[Array], lines: Lines | None, numel: int) -> Array:
        """What a reduction has of all tiles. A tile's part of lines is (the first of them, values)."""
        line = self._body.instructions[number]
        if line.type.shape == "tensor" or lines is None:
            return np.concatenate([np.empty(0), *parts])
        touched = lines.touched(line.type.shape, numel)
        joined = blocks.no_lines(line.operation, touched.stop - touched.start)
        for first, values in parts:
            own = joined[first - touched.start : first - touched.start + len(values)]
            blocks.join_lines(line.operation, own, values)
        return joined

    def _shared(self, scalars: Sequence[float]) -> dict[int, Array]:
        """What is the same for all elements: the scalars, the constants, and what is made of them."""
        values: dict[int, Array] = {}
        for number, line in enumerate(self._body.instructions):
            if not line.type.is_single or number in self._sums:
                continue
            if line.operation == "hyper":
                values[number] = np.asarray(float(scalars[int(str(line.attributes[0])[1:])]))
            elif line.operation == "const":
                values[number] = constant(line, self._binding.compute)
            else:
                values[number] = evaluate(line, [values[a] for a in line.arguments], self._binding.compute)
        return values

    def _run(
        self, tile: Mapping[str, Tensor], shared: Mapping[int, Array], position: int, lines: Lines | None
    ) -> list[Any]:
        values: list[Any] = []
        numel = next(iter(tile.values())).numel()
        for number, line in enumerate(self._body.instructions):
            if number in shared:
                values.append(shared[number])
                continue
            arguments = [values[a] for a in line.arguments]
            if line.operation == "load":
                values.append(_read(tile, str(line.attributes[0]), self._binding.compute))
            elif line.operation == "index":
                values.append(positions(position, numel, self._binding.compute))
            elif line.operation == "hyper" and lines is not None:
                vector = lines.vectors[int(str(line.attributes[0])[1:])].numpy()
                values.append(vector[_lines(lines, line.type.shape, numel)])
            elif number in self._sums and line.type.shape == "tensor":
                values.append(blocks.partials(line.operation, np.broadcast_to(arguments[0], (numel,)), position))
            elif number in self._sums and lines is not None:
                values.append(_reduced(line, arguments, _lines(lines, line.type.shape, numel)))
            else:
                values.append(evaluate(line, arguments, self._binding.compute))
            for argument in line.arguments:
                if self._last[argument] == number:
                    values[argument] = None
        return values

    def _store(self, values: Sequence[Array], tile: Mapping[str, Tensor], low: Tensor | None) -> None:
        dtype = NUMPY[self._binding.compute]
        # A view may be of an array that is about to be overwritten.
        new = {
            name: values[value].astype(dtype, copy=values[value].base is not None) for name, value in self._body.stores
        }
        for name, rounded in new.items():
            _write(rounded, tile, name)
            if name == "param" and low is not None:
                write(rounded, low)


def _read(tile: Mapping[str, Tensor], name: str, compute: torch.dtype) -> Array:
    if tile[name].dtype not in CODED:
        return read(tile[name], compute)
    codes, scale = (raw_view(tile[array].cpu()) for array in (name, scale_name(name)))
    return MAPS[tile[name].dtype].decoded(codes, scale).astype(NUMPY[compute], copy=False)


def _write(values: Array, tile: Mapping[str, Tensor], name: str) -> None:
    if tile[name].dtype not in CODED:
        write(values, tile[name])
        return
    found = MAPS[tile[name].dtype].encoded(np.broadcast_to(values, tile[name].shape))
    for array, part in zip((name, scale_name(name)), found, strict=True):
        tile[array].copy_(torch.from_numpy(part))


def _lines(lines: Lines, shape: ir.Shape, numel: int) -> Array:
    """The row or the column that each element lies in."""
    places, (_, rows, columns) = np.arange(lines.start, lines.start + numel), lines.view
    return places // columns if shape == "row" else places // (rows * columns) * columns + places % columns


def _reduced(line: ir.Instruction, arguments: Sequence[Array], own: Array) -> tuple[int, Array]:
    """(The first line that is touched, what each from there on has.)"""
    first = int(own.min())
    made = blocks.no_lines(line.operation, int(own.max()) - first + 1)
    terms = arguments[0].astype(np.float64)
    if line.operation.endswith("max"):
        np.maximum.at(made, own - first, terms)
        return first, made + 0.0
    np.add.at(made, own - first, (terms + arguments[1]) - arguments[1])
    return first, made


def _tiles(offset: int, numel: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < numel:
        stop = min(numel, start + TILE - (offset + start) % TILE)
        yield start, stop
        start = stop
