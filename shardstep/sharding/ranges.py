"""Which part of which parameter a rank owns: the param-to-shard range map of Megatron's distributed optimizer.

Arithmetic over layouts, so any rank can be asked for any other's; nothing here communicates or looks at values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shardstep.errors import ConfigError
from shardstep.sharding.space import Space
from shardstep.sharding.tensor_states import part
from shardstep.sharding.unit import Unit

_NOTHING = range(0)
_TITLES = ("parameter", "shape", "buffer", "gbuf_world", "gbuf_local", "param")


@dataclass(frozen=True)
class ParameterRange:
    """One parameter, in ranges of elements: ``buffer`` is its place in its unit's flat buffer. What the rank owns of it
    is ``gbuf_world`` in that buffer, ``gbuf_local`` in the rank's shard and ``param`` in the parameter, flattened; all
    three are empty where it owns nothing.
    """

    unit: str
    dtype: torch.dtype
    name: str
    shape: tuple[int, ...]
    buffer: range
    gbuf_world: range
    gbuf_local: range
    param: range


@dataclass(frozen=True)
class BufferRanges:
    """A unit's flat buffer of one dtype, which Megatron calls a bucket: equal shards, of whole blocks, one for each
    rank. ``numel``: elements, ``padding`` included; ``owned``: what the rank updates, all of it at stage 0.
    """

    unit: str
    dtype: torch.dtype
    stage: int
    trained: bool
    numel: int
    shard_numel: int
    padding: int
    owned: range
    parameters: tuple[ParameterRange, ...]


@dataclass(frozen=True, repr=False)
class Ranges:
    """What one rank owns, parameter by parameter; prints as a table."""

    rank: int
    world_size: int
    buffers: tuple[BufferRanges, ...]

    def __iter__(self) -> Iterator[ParameterRange]:
        return (parameter for buffer in self.buffers for parameter in buffer.parameters)

    def __len__(self) -> int:
        return sum(len(buffer.parameters) for buffer in self.buffers)

    def __repr__(self) -> str:
        rows = [_row(parameter) for parameter in self]
        widths = [max(map(len, column)) for column in zip(_TITLES, *rows, strict=True)]
        lines = [f"rank {self.rank} of {self.world_size}: what it owns, in elements"]
        for buffer in self.buffers:
            lines += ["", _headline(buffer, self.world_size), _aligned(_TITLES, widths)]
            lines += [_aligned(_row(parameter), widths) for parameter in buffer.parameters]
        return "\n".join(lines)


def ranges_of(units: Sequence[Unit], rank: int, world_size: int) -> Ranges:
    """What ``rank`` owns of ``units``."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
        raise ConfigError(f"expected a rank of 0 to {world_size - 1} for ranges(), got {rank!r}")
    buffers = [_buffer(space, unit.stage.number, rank, world_size) for unit in units for space in unit.spaces]
    return Ranges(rank, world_size, tuple(buffers))


def _buffer(space: Space, stage: int, rank: int, world_size: int) -> BufferRanges:
    numel, shard_numel, dtype = space.padded_numel, space.shard_numel, space.precision.params
    run = slice(rank * shard_numel, (rank + 1) * shard_numel) if space.stage.shard_state else slice(0, numel)
    parameters = []
    for slot in space.layout.slots:
        start, stop = part(slot, run)
        begin = slot.offset + start
        world = range(begin, begin + stop - start) if start < stop else _NOTHING
        local = range(begin - run.start, begin - run.start + len(world)) if world else _NOTHING
        own = range(start, stop) if world else _NOTHING
        place = range(slot.offset, slot.end)
        parameters.append(ParameterRange(space.unit_name, dtype, slot.name, slot.shape, place, world, local, own))
    padding = numel - sum(slot.numel for slot in space.layout.slots)
    owned = range(run.start, run.stop)
    return BufferRanges(
        space.unit_name, dtype, stage, space.trained, numel, shard_numel, padding, owned, tuple(parameters)
    )


def _headline(buffer: BufferRanges, world_size: int) -> str:
    where = f"unit {buffer.unit!r}" if buffer.unit else "the root unit"
    kind = str(buffer.dtype).removeprefix("torch.") + ("" if buffer.trained else ", frozen")
    return (
        f"{where}, {kind}, stage {buffer.stage}: {buffer.numel:,} elements ({buffer.padding:,} of padding) in "
        f"{world_size} shards of {buffer.shard_numel:,}; owned: {_shown(buffer.owned)}"
    )


def _row(parameter: ParameterRange) -> tuple[str, ...]:
    parts = (parameter.buffer, parameter.gbuf_world, parameter.gbuf_local, parameter.param)
    return parameter.name, "x".join(map(str, parameter.shape)) or "-", *map(_shown, parts)


def _shown(run: range) -> str:
    return f"[{run.start:,}, {run.stop:,})" if run else "-"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  " + "  ".join(cells).rstrip()
