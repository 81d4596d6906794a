"""Updates by rules over single elements: one phase and no sums.

Models have many small tensors, and what Python does for each of them soon takes longer than its update. So tensors are
looked at in columns, by functions that run in C; one by one only where columns are mixed.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, Final, TypeAlias

from torch import Tensor

from shardstep.rules import noise
from shardstep.rules.backends.choice import ManyKernel
from shardstep.rules.hypers import Hypers, segment_hypers
from shardstep.rules.variants import Variants, kind_of
from shardstep.types import Segment, Stack

_is_cpu: Final = attrgetter("is_cpu")
_dtype: Final = attrgetter("dtype")


_Tables: TypeAlias = dict[ManyKernel, tuple[list[Any], list[int]]]
"""For each kernel what it is to run on: rows, and their counts of elements."""


def update_elements(
    variants: Variants, segments: Sequence[Segment], stacks: Sequence[Stack], groups: Sequence[Hypers]
) -> None:
    """Update all in place. Nothing is changed before the scalars of all of them are known."""
    if len(segments) == 1 and not stacks and segments[0].seed is None:
        _update_one(variants, segments[0], groups)
        return
    tables: _Tables = {}
    _add_segments(variants, segments, groups, tables)
    for stack in stacks:
        if _is_of_one_kind(stack):
            _add_stack(variants, stack, groups, tables)
        else:
            _add_segments(variants, stack.segments(), groups, tables)
    for kernel, (rows, counts) in tables.items():
        kernel.run(rows, sum(counts))


def _update_one(variants: Variants, segment: Segment, groups: Sequence[Hypers]) -> None:
    """What there is for a flat space of one parameter group, and small enough to count: nothing to look up twice."""
    hypers = segment_hypers(segment, groups[segment.group])
    compiled = variants.of(segment, kind_of(segment), hypers).passes[-1]
    count = segment.param.numel()
    row: Any = compiled.kernel.row(segment, count, compiled.scalars(hypers, {}))
    compiled.kernel.run([row], count)


def _add_segments(variants: Variants, segments: Iterable[Segment], groups: Sequence[Hypers], tables: _Tables) -> None:
    """One by one; what several share is looked up where it changes from one to the next."""
    found: dict[object, tuple[ManyKernel, tuple[float, ...]]] = {}
    last: object = None
    for segment in noise.with_one_key(segments):
        kind, seed = kind_of(segment), segment.seed
        turn = 0 if seed is None else segment.offset // noise.TURN
        alike = (segment.group, segment.step, segment.grad_scale, seed, turn, kind)
        if alike != last:
            last = alike
            known = found.get(alike)
            if known is None:
                hypers = segment_hypers(segment, groups[segment.group])
                compiled = variants.of(segment, kind, hypers).passes[-1]
                known = found[alike] = compiled.kernel, compiled.scalars(hypers, {})
            kernel, scalars = known
            rows, counts = tables.setdefault(kernel, ([], []))
        count = segment.param.numel()
        rows.append(kernel.row(segment, count, scalars))
        counts.append(count)


def _add_stack(variants: Variants, stack: Stack, groups: Sequence[Hypers], tables: _Tables) -> None:
    """All at once: of one kind, with one step count."""
    segment = stack.first
    hypers = segment_hypers(segment, groups[segment.group])
    compiled = variants.of(segment, kind_of(segment), hypers).passes[-1]
    rows, counts = tables.setdefault(compiled.kernel, ([], []))
    own = [*map(Tensor.numel, stack.arrays[:: stack.width])]
    rows += compiled.kernel.rows(stack, own, compiled.scalars(hypers, {}))
    counts += own


def _is_of_one_kind(stack: Stack) -> bool:
    """Whether all segments have one step count and are arrays of one length on the CPU, of the dtypes of the first."""
    arrays, width = stack.arrays, stack.width
    if not all(map(_is_cpu, arrays)) or not all(map(Tensor.is_contiguous, arrays)) or len(set(stack.steps)) > 1:
        return False
    counts, dtypes = [*map(Tensor.numel, arrays)], [*map(_dtype, arrays)]
    if any(counts[place::width] != counts[::width] for place in range(1, width)):
        return False
    return dtypes == dtypes[:width] * len(stack.steps)
