"""Updates by rules that look at whole tensors: segments on their way through phases, and the host's work between them.

A phase before the last makes sums of what is here, and the batch makes those of whole tensors of them, wherever their
parts are. The last phase stores. Nothing here knows what a phase computes.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shardstep.rules import noise
from shardstep.rules.backends import blocks
from shardstep.rules.backends.evaluation import exactly
from shardstep.rules.backends.llvm import Row
from shardstep.rules.binding import Lines, arrays_of
from shardstep.rules.host import HostTable, write_states
from shardstep.rules.hypers import Hypers, segment_hypers
from shardstep.rules.variants import Variant, Variants, kind_of
from shardstep.rules.view import view_of
from shardstep.types import Batch, Segment, Update


@dataclass(slots=True)
class Common:
    """What segments share that are updated alike. ``scalars`` fills up: those of each variant without sums."""

    hypers: dict[str, object]
    scalars: dict[Variant, tuple[float, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Job:
    """One segment on its way through the phases. ``known``: what the host knows of its tensor, by number; ``host``: its
    place in a table, where the host has more to do than numbers.
    """

    segment: Segment
    variant: Variant
    common: Common
    known: dict[int, float]
    host: tuple[HostTable, int] | None = None

    def sums(self, number: int) -> tuple[tuple[str, int], ...]:
        """What a phase sums up; nothing if it is not one of this job."""
        return self.variant.passes[number].sums if number < len(self.variant.passes) else ()

    def early_row(self, number: int) -> Row:
        """What a phase before the last is called with."""
        lines = self._before(number)
        scalars = self.variant.passes[number].scalars(self.common.hypers, self.known)
        return Row(arrays_of(self.segment), scalars, self.segment.offset, None, lines)

    def take(self, number: int, whole: list[Tensor]) -> None:
        """What its sums are for the whole tensor."""
        for (operation, value), found in zip(self.sums(number), whole, strict=True):
            if self.host is not None:
                table, place = self.host
                table.take(place, value, found)
            else:
                self.known[value] = float(blocks.combine(operation, found.cpu().numpy()))

    def row(self) -> Row:
        """What the last phase is called with."""
        lines = self._before(len(self.variant.passes) - 1)
        scalars = self.common.scalars.get(self.variant)
        if scalars is None:
            scalars = self.variant.passes[-1].scalars(self.common.hypers, self.known)
            if not self.known:
                self.common.scalars[self.variant] = scalars
        return Row(arrays_of(self.segment), scalars, self.segment.offset, self.segment.low, lines)

    def _before(self, number: int) -> Lines | None:
        """The host's work before a phase; what a phase with rows and columns must know."""
        if self.host is None:
            return None
        table, place = self.host
        table.advance(number)
        phase = self.variant.passes[number].phase
        if not phase.has_lines:
            return None
        return Lines(view_of(self.segment.shape or ()), self.segment.start, table.vectors(place, phase.vectors))


def update_by_tensor(variants: Variants, batch: Batch, groups: Sequence[Hypers]) -> None:
    """Update segments in place. Collective where the rule makes sums; nothing is stored before all is known."""
    jobs, tables = _jobs(variants, batch.segments, groups)
    with exactly() if tables else nullcontext():
        _make_sums(variants, batch, jobs, groups)
        together: dict[Variant, list[Row]] = {}
        for job in _with_one_key(jobs):
            together.setdefault(job.variant, []).append(job.row())
        stores = [store for variant, table in tables for store in _stores(variant, table)]
        for variant, rows in together.items():
            variant.passes[-1].kernel.many(rows)
        write_states(stores)


def _stores(variant: Variant, table: HostTable) -> list[tuple[list[Tensor], Any]]:
    """What the host stores after the last phase."""
    table.advance(len(variant.passes))
    return table.store()


def _jobs(
    variants: Variants, segments: Sequence[Segment], groups: Sequence[Hypers]
) -> tuple[list[Job], list[tuple[Variant, HostTable]]]:
    """And the tables that they are in."""
    found: dict[tuple[object, ...], Common] = {}
    tables: dict[tuple[object, ...], tuple[Variant, HostTable]] = {}
    jobs = []
    for segment in segments:
        shape = segment.shape or ()
        turn = 0 if segment.seed is None else segment.offset // noise.TURN
        given = (len(shape), segment.param.dtype, segment.seed, turn)
        alike = (segment.group, segment.step, segment.grad_scale, *given)
        common = found.get(alike)
        if common is None:
            common = found[alike] = Common(segment_hypers(segment, groups[segment.group]))
        variant = variants.of(segment, kind_of(segment), common.hypers)
        view = view_of(shape)
        known = {number: float(getattr(view, what)) for number, what in variant.counts}
        job = Job(segment, variant, common, known)
        if variant.host is not None:
            key = (variant, id(common), view)
            if key not in tables:
                tables[key] = variant, HostTable(variant.host, view, common.hypers)
            table = tables[key][1]
            job.host = table, table.add(segment.tensor_state, known)
        jobs.append(job)
    return jobs, list(tables.values())


def _with_one_key(jobs: list[Job]) -> Iterator[Job]:
    """The jobs, cut where the key of the noise changes."""
    for job in jobs:
        seed = job.segment.seed
        if seed is None:
            yield job
            continue
        for part in noise.between_turns(job.segment):
            hypers = {**job.common.hypers, noise.KEY: noise.key_of(part, seed)}
            yield replace(job, segment=part, common=Common(hypers))


def _make_sums(variants: Variants, batch: Batch, jobs: list[Job], groups: Sequence[Hypers]) -> None:
    """All phases but the last, each on all jobs before the next one, in step with the other ranks."""
    everywhere = [_reductions(variants, groups[update.group], update) for update in batch.updated]
    for number in range(max(map(len, everywhere), default=0)):
        reductions = [phases[number] if number < len(phases) else () for phases in everywhere]
        partials = _reduced(jobs, number)
        for job, whole in zip(jobs, batch.combine(partials, reductions), strict=True):
            job.take(number, whole)


def _reductions(variants: Variants, group: Hypers, update: Update) -> list[tuple[str, ...]]:
    """Those of each phase of a tensor but the last, here or on another rank."""
    given = {**group, "step": update.step, "ndim": len(update.shape)}
    phases = variants.phases_for(given, torch.float32).phases[:-1]
    return [tuple(line.operation for line in phase.reductions) for phase in phases]


def _reduced(jobs: list[Job], number: int) -> list[list[Tensor]]:
    """What the reductions of a phase before the last give, for each job; nothing for those without that phase."""
    made: list[list[Tensor]] = [[] for _ in jobs]
    together: dict[Variant, list[int]] = {}
    for index, job in enumerate(jobs):
        if job.sums(number):
            together.setdefault(job.variant, []).append(index)
    for variant, indices in together.items():
        rows = [jobs[index].early_row(number) for index in indices]
        for index, found in zip(indices, variant.passes[number].kernel.many(rows), strict=True):
            made[index] = list(found)
    return made
