"""Compiled phases as functions on tensors: they pack addresses into rows and call the code.

Small calls must be cheap, so whatever can be known beforehand is.
"""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from shardstep.errors import ConfigError
from shardstep.rules.backends.blocks import blocks_touched, join_lines, no_lines
from shardstep.rules.backends.llvm.body import Job, Reduction
from shardstep.rules.backends.llvm.row import cuts
from shardstep.rules.backends.llvm.threads import Call, run_all
from shardstep.rules.binding import CODED, Lines, arrays_of, cut_states, scale_name
from shardstep.types import BLOCK_NUMEL as BLOCK
from shardstep.types import SCALED_NUMEL, Segment, Stack

if TYPE_CHECKING:
    from shardstep.rules.backends.llvm.compiler import Loaded

WORTH_THREADS: Final = 524_288
"""Elements of a call from which on a second thread gains more than the hand-over costs."""

CHUNK: Final = 1_048_576
"""Elements that a thread takes at once: many enough to hide the Python between, few enough to balance."""

_address = Tensor.data_ptr


class Row(NamedTuple):
    """One tensor's run of a phase; the arguments of a call of the kernel."""

    arrays: Mapping[str, Tensor]
    scalars: Sequence[float]
    offset: int = 0
    low: Tensor | None = None
    lines: Lines | None = None


class LlvmKernel:
    """See `PhaseKernel`. ``loaded`` is code in memory that is kept as long as this."""

    def __init__(self, job: Job, loaded: "Loaded") -> None:
        self._loaded = loaded
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(loaded.address)
        stored, layout = dict(job.binding.stored), job.layout
        self._names = layout.arrays
        scales = {scale_name(name) for name in layout.arrays if stored[name] in CODED}
        # Elements of an entry, and its bytes, of each array and of low.
        self._sizes = [(SCALED_NUMEL if name in scales else 1, stored[name].itemsize) for name in layout.arrays]
        self._sizes.append((1, job.low.itemsize if job.low else 0))
        self._low, self._writes_low = job.binding.low, job.low is not None
        self._reductions, self._lines = job.reductions, job.phase.has_lines
        names = [name for name, _ in job.binding.stored]
        self._places = [names.index(name) for name in layout.arrays]
        self._takes_all = self._places == [*range(len(names))]
        self._layout, self._pack, self._unpack = layout, layout.format.pack, layout.format.unpack

    def __call__(
        self,
        arrays: Mapping[str, Tensor],
        scalars: Sequence[float],
        *,
        offset: int = 0,
        low: Tensor | None = None,
        lines: Lines | None = None,
    ) -> tuple[Tensor, ...]:
        """Run it in place on one tensor; see `PhaseKernel`."""
        return self.many([Row(arrays, scalars, offset, low, lines)])[0]

    def row(self, segment: Segment, count: int, scalars: Sequence[float]) -> bytes:
        """What `run` takes for a segment of ``count`` elements, which must live until then; see `rows`."""
        low = segment.low
        if low is not None or self._writes_low or not self._takes_all:
            return self._pack(*self._addresses(arrays_of(segment), low), count, segment.offset, *scalars)
        found = map(_address, (segment.param, segment.grad, *segment.state.values()))
        return self._pack(*found, 0, count, segment.offset, *scalars)

    def rows(self, stack: Stack, counts: Sequence[int], scalars: Sequence[float]) -> list[bytes]:
        """What `run` takes for a stack with these ``counts`` of elements and the binding's arrays, in its order.

        It must live until then. For phases without sums, rows and columns.
        """
        low = stack.first.low
        if self._writes_low if low is None else self._low is None:
            raise self._misfit(low)
        addresses, pack, rows = map(_address, stack.arrays), self._pack, list[bytes]()
        each: Iterable[Sequence[int]] = zip(*[addresses] * stack.width, strict=True)
        if not self._takes_all:
            places = self._places if low is None else [*self._places, -1]
            each = ([found[place] for place in places] for found in each)
        for found, count, offset in zip(each, counts, stack.offsets, strict=True):
            if low is None:
                rows.append(pack(*found, 0, count, offset, *scalars))
            else:
                rows.append(pack(*found, count, offset, *scalars))
        return rows

    def run(self, rows: Sequence[bytes], numel: int) -> None:
        """Run it in place on many tensors, of ``numel`` elements in all: in one call or in a few by several threads."""
        if numel <= WORTH_THREADS or (threads := torch.get_num_threads()) == 1:
            self._run(b"".join(rows), len(rows))
        else:
            run_all(self._run, self._calls(rows, max(min(CHUNK, -(-numel // threads)), BLOCK)), threads)

    def many(self, rows: Sequence[Row]) -> list[tuple[Tensor, ...]]:
        """Run it in place on many tensors; the partials of each row."""
        counts = [next(iter(row.arrays.values())).numel() for row in rows]  # a phase may use none but the index
        if any(reduction.along for reduction in self._reductions):
            return self._many_of_lines(rows, counts)
        rooms = [self._room(count, row) for count, row in zip(counts, rows, strict=True)]
        self.run([self._packed(row, room) for row, room in zip(rows, rooms, strict=True)], sum(counts))
        return [tuple(room) for room in rooms]

    def _many_of_lines(self, rows: Sequence[Row], counts: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Many tensors whose rows or columns are reduced: no two threads may add to the same numbers."""
        threads = torch.get_num_threads()
        large = [count > WORTH_THREADS and threads > 1 for count in counts]
        made = [self._in_parts(row, threads) if cut else () for row, cut in zip(rows, large, strict=True)]
        whole = [(i, rows[i], self._room(counts[i], rows[i])) for i, cut in enumerate(large) if not cut]
        calls = []
        for turn in range(threads):  # some of the tensors for each
            pieces = [self._packed(row, room) for _, row, room in whole[turn::threads]]
            calls += [(b"".join(pieces), len(pieces))] if pieces else []
        run_all(self._run, calls, threads if sum(counts) > WORTH_THREADS else 1)
        for i, _, room in whole:
            made[i] = tuple([values.double() for values in room])
        return made

    def _in_parts(self, row: Row, threads: int) -> tuple[Tensor, ...]:
        """One large tensor: each thread has a part, and numbers of its own to add to."""
        count = next(iter(row.arrays.values())).numel()
        ends = list(cuts(count, row.offset, -(-count // threads) + BLOCK))
        parts = [_part(row, begin, end) for begin, end in ends]
        rooms = [self._room(end - begin, part) for (begin, end), part in zip(ends, parts, strict=True)]
        calls = [(self._packed(part, room), 1) for part, room in zip(parts, rooms, strict=True)]
        run_all(self._run, calls, threads)
        return tuple(self._joined(reduction, row, ends, rooms) for reduction in self._reductions)

    def _joined(self, reduction: Reduction, row: Row, ends: list[tuple[int, int]], rooms: list[list[Tensor]]) -> Tensor:
        parts = [room[reduction.number].double() for room in rooms]
        if reduction.along is None or row.lines is None:
            return torch.cat([torch.empty(0, dtype=torch.float64), *parts])
        start, shape = row.lines.start, reduction.line.type.shape
        touched = row.lines.touched(shape, ends[-1][1] if ends else 0)
        whole = torch.from_numpy(no_lines(reduction.line.operation, touched.stop - touched.start))
        for (begin, end), values in zip(ends, parts, strict=True):
            own = row.lines.view.touched(shape, start + begin, start + end)
            into = whole[own.start - touched.start : own.stop - touched.start]
            join_lines(reduction.line.operation, into.numpy(), values.numpy())
        return whole

    def _calls(self, rows: Sequence[bytes], length: int) -> list[Call]:
        """Tables of about ``length`` elements each: long rows are cut, short ones go together."""
        calls, packed, size = list[Call](), list[bytes](), 0
        for row in rows:
            words = self._unpack(row)
            count, offset = words[self._layout.count], words[self._layout.offset]
            if size + count <= length - BLOCK:  # the usual case of many small ones
                packed.append(row)
                size += count
                continue
            for begin, end in cuts(count, offset, length):
                packed.append(self._pack(*self._layout.part(words, self._sizes, begin, end)))
                size += end - begin
                if size > length - BLOCK:
                    calls.append((b"".join(packed), len(packed)))
                    packed, size = [], 0
        if packed:
            calls.append((b"".join(packed), len(packed)))
        return calls

    def _room(self, count: int, row: Row) -> list[Tensor]:
        """For the partials of a row."""
        room = []
        for reduction in self._reductions:
            if reduction.along is None or row.lines is None:
                room.append(torch.empty(blocks_touched(count, row.offset), dtype=torch.float64))
                continue
            touched = row.lines.touched(reduction.line.type.shape, count)
            dtype = torch.float64 if reduction.type == "double" else torch.float32
            room.append(torch.full((touched.stop - touched.start,), reduction.empty, dtype=dtype))
        return room

    def _partials(self, row: Row, room: list[Tensor]) -> list[int]:
        """Where they go: those of rows and columns counted from the tensor's first one."""
        found = [*map(_address, room)]
        if row.lines is not None:
            count = next(iter(row.arrays.values())).numel()
            for reduction in self._reductions:
                if reduction.along is not None:
                    first = row.lines.touched(reduction.line.type.shape, count).start
                    found[reduction.number] -= first * room[reduction.number].itemsize
        return found

    def _addresses(self, arrays: Mapping[str, Tensor], low: Tensor | None) -> list[int]:
        """Of the arrays, and of low, or 0."""
        found = [arrays[name].data_ptr() for name in self._names]
        if self._writes_low if low is None else self._low is None:
            raise self._misfit(low)
        found.append(0 if low is None else low.data_ptr())
        return found

    def _packed(self, row: Row, room: list[Tensor]) -> bytes:
        count = next(iter(row.arrays.values())).numel()
        partials, lines = self._partials(row, room), self._of_lines(row)
        return self._pack(*self._addresses(row.arrays, row.low), count, row.offset, *partials, *lines, *row.scalars)

    def _of_lines(self, row: Row) -> list[int]:
        if not self._lines:
            return []
        if row.lines is None:
            raise ConfigError("expected where the rows and columns of the run are, got nothing; pass lines=")
        (_, rows, columns), vectors = row.lines.view, row.lines.vectors
        return [row.lines.start, columns, rows, *map(_address, vectors)]

    def _misfit(self, low: Tensor | None) -> ConfigError:
        if low is None:
            return ConfigError(f"expected a tensor for the {self._low} copy of the new param, got none; pass low=")
        return ConfigError(f"expected no low copy, got one of {low.dtype}; bind the phase with that dtype as low")


def _part(row: Row, begin: int, end: int) -> Row:
    """Elements ``begin`` to ``end``, from where a scale begins."""
    lines = None if row.lines is None else replace(row.lines, start=row.lines.start + begin)
    return row._replace(arrays=cut_states(row.arrays, begin, end), offset=row.offset + begin, lines=lines)
