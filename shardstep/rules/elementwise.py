"""Updates by rules over single elements: one phase and no sums.

Models have many small tensors, and what Python does for each of them soon takes longer than its update. So tensors are
looked at in columns, by functions that run in C; one by one only where columns are mixed.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, Final

from torch import Tensor

from shardstep.rules import noise
from shardstep.rules.backends.choice import ManyKernel
from shardstep.rules.hypers import Hypers, segment_hypers
from shardstep.rules.variants import Kind, Variants, kind_of
from shardstep.types import Segment, Stack

_is_cpu: Final = attrgetter("is_cpu")
_dtype: Final = attrgetter("dtype")


def update_elements(variants: Variants, stacks: Iterable[Stack], groups: Sequence[Hypers]) -> None:
    """Update all in place. Nothing is changed before the scalars of all of them are known."""
    tables: dict[ManyKernel, tuple[list[Any], list[int]]] = {}
    for given in stacks:
        for stack, kind in _of_one_kind(given):
            segment = stack.first
            hypers = segment_hypers(segment, groups[segment.group])
            last = variants.of(segment, kind, hypers).passes[-1]
            rows, counts = tables.setdefault(last.kernel, ([], []))
            own = [*map(Tensor.numel, stack.arrays[:: stack.width])]
            rows += last.kernel.rows(stack, own, last.scalars(hypers, {}))
            counts += own
    for kernel, (rows, counts) in tables.items():
        kernel.run(rows, sum(counts))


def stacks_of(segments: Sequence[Segment]) -> Iterable[Stack]:
    """Segments in stacks, those together that may be; those that are rounded stochastically cut where keys change."""
    found: dict[object, Stack] = {}
    for segment in segments:
        names = ("param", "grad", *segment.state)
        alike = (segment.group, segment.grad_scale, segment.low is None, names)
        if segment.seed is None:
            _put(segment, names, found, alike)
            continue
        for part in noise.between_turns(segment):
            _put(part, names, found, (*alike, segment.seed, part.offset // noise.TURN))
    return found.values()


def _put(segment: Segment, names: tuple[str, ...], stacks: dict[Any, Stack], key: object) -> None:
    """Onto the stack with this key."""
    arrays = [segment.param, segment.grad, *segment.state.values()]
    if segment.low is not None:
        arrays.append(segment.low)
    stack = stacks.get(key)
    if stack is None:
        stacks[key] = Stack(segment, names, len(arrays), [segment.step], [segment.offset], arrays)
        return
    stack.steps.append(segment.step)
    stack.offsets.append(segment.offset)
    stack.arrays += arrays


def _of_one_kind(stack: Stack) -> Iterable[tuple[Stack, Kind]]:
    """Parts of a stack with one step count and one kind. Raises ConfigError for arrays that do not fit."""
    if len(stack.steps) == 1 or _is_of_one_kind(stack):
        return ((stack, kind_of(stack.first)),)
    parts: dict[tuple[int, Kind], Stack] = {}
    for segment in stack.segments():
        _put(segment, stack.names, parts, (segment.step, kind_of(segment)))
    return [(part, kind) for (_, kind), part in parts.items()]


def _is_of_one_kind(stack: Stack) -> bool:
    """Whether all segments have one step count and are arrays of one length on the CPU, of the dtypes of the first."""
    arrays, width = stack.arrays, stack.width
    if not all(map(_is_cpu, arrays)) or not all(map(Tensor.is_contiguous, arrays)) or len(set(stack.steps)) > 1:
        return False
    counts, dtypes = [*map(Tensor.numel, arrays)], [*map(_dtype, arrays)]
    if any(counts[place::width] != counts[::width] for place in range(1, width)):
        return False
    return dtypes == dtypes[:width] * len(stack.steps)
