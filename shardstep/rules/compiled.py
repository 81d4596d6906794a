"""A rule and its kernels: one for each combination of flags, dtypes and kind of device that it has met.

The last room that a rule flows through, and the only one that optimizers see. It chooses the back end, has the
host's values computed before each phase, and joins reductions between phases. It never looks into a phase, and never
knows where the parts of a tensor lie.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from shardstep.errors import ConfigError
from shardstep.rules import noise
from shardstep.rules.backends import blocks, llvm, reference, rounding, triton
from shardstep.rules.backends.dynamic8 import decoded_states, encode
from shardstep.rules.backends.evaluation import exactly
from shardstep.rules.binding import (
    CODED,
    Binding,
    Lines,
    PhaseKernel,
    check_dtypes,
    checked,
    compute_dtype,
    scale_name,
    stored_arrays,
)
from shardstep.rules.flags import compile_plainness
from shardstep.rules.host import HostPlan, HostValues, write_states
from shardstep.rules.ir import Phase, Phases, Program, State
from shardstep.rules.language import Rule
from shardstep.rules.locality import is_by_tensor, locality, runs_in_steps
from shardstep.rules.lower import program_of
from shardstep.rules.matrices import MatrixUpdate, hypers_of
from shardstep.rules.passes import compile_truths, cut, stages, used_arrays
from shardstep.rules.scalars import Scalars, compile_scalars, uniform_values
from shardstep.rules.view import view_of
from shardstep.types import Batch, Segment, Update

Hypers = Mapping[str, object]
"""Hyper-parameters by name: numbers, truth values, one-element tensors, or tuples of them."""

_COUNTS: Final = frozenset({"numel", "rows", "columns"})


_Form = tuple[tuple[bool, ...], torch.dtype, torch.dtype | None]
"""Of a program: the truths of its conditions, the compute dtype, and what param is stochastically rounded to."""


@dataclass(frozen=True)
class _Pass:
    """A compiled phase, and what the host does around it."""

    kernel: PhaseKernel
    scalars: Scalars
    phase: Phase
    sums: tuple[tuple[str, int], ...]
    """For each reduction, which one, and the number of its value in the whole program."""


@dataclass(frozen=True, eq=False)
class _Variant:
    """The kernels for one combination. ``host``: None where all that the host computes is scalars."""

    phases: Phases
    passes: tuple[_Pass, ...]
    counts: tuple[tuple[int, str], ...]
    host: HostPlan | None


@dataclass(slots=True)
class _Common:
    """What segments share that are updated alike. ``scalars`` fills up: those of each variant without sums."""

    hypers: dict[str, object]
    scalars: dict[int, tuple[float, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Job:
    """One segment on its way through the phases. ``known``: what the host knows of its tensor, by number."""

    segment: Segment
    variant: _Variant
    common: _Common
    known: dict[int, float]
    host: HostValues | None = None

    def sums(self, number: int) -> tuple[tuple[str, int], ...]:
        return self.variant.passes[number].sums if number < len(self.variant.passes) else ()

    def early_row(self, number: int) -> llvm.Row:
        """What a phase before the last is called with."""
        lines = self.before(number)
        scalars = self.variant.passes[number].scalars(self.common.hypers, self.known)
        return llvm.Row(_arrays(self.segment), scalars, self.segment.offset, None, lines)

    def take(self, number: int, whole: list[Tensor]) -> None:
        """What they give for the whole tensor."""
        for (operation, value), found in zip(self.sums(number), whole, strict=True):
            if self.host is not None:
                self.host.take(value, found)
            else:
                self.known[value] = float(blocks.combine(operation, found.cpu().numpy()))

    def before(self, number: int) -> Lines | None:
        """The host's work before a phase; what a phase with rows and columns must know."""
        if self.host is None:
            return None
        self.host.advance(number)
        phase = self.variant.passes[number].phase
        if not phase.has_lines:
            return None
        return Lines(view_of(self.segment.shape or ()), self.segment.start, self.host.vectors(phase.vectors))

    def row(self) -> llvm.Row:
        """What the last phase is called with."""
        lines = self.before(len(self.variant.passes) - 1)
        scalars = self.common.scalars.get(id(self.variant))
        if scalars is None:
            scalars = self.variant.passes[-1].scalars(self.common.hypers, self.known)
            if not self.known:
                self.common.scalars[id(self.variant)] = scalars
        return llvm.Row(_arrays(self.segment), scalars, self.segment.offset, self.segment.low, lines)

    def stores(self) -> list[tuple[Tensor, Any]]:
        """What the host stores after the last phase."""
        if self.host is None:
            return []
        self.host.advance(len(self.variant.passes))
        return self.host.store()


class CompiledRule:
    """Updates segments by one rule. Raises RuleErrors here if the rule is wrong."""

    def __init__(self, rule: Rule) -> None:
        self._name = rule.name
        self.program = program_of(rule)
        self.locality, self.reason = locality(self.program)
        self.is_plain = not is_by_tensor(self.program)
        """Whether every element is updated by itself, whatever tensor it is in."""
        self._is_plain_with = compile_plainness(self.program)
        self._scaled = any(len(stored_arrays(state)) > 1 for state in self.program.states)
        given = {hyper.name for hyper in self.program.hypers}
        self._matrices = MatrixUpdate(self._program_for, _back_end) if runs_in_steps(self.program) else None
        self.is_shardable = self.locality != "matrix" or self._matrices is not None
        """Whether segments may be parts of tensors."""
        self._by_ndim, self._by_dtype = "ndim" in given, "machine_eps" in given
        self._truths = compile_truths(self.program)
        self._programs: dict[_Form, Program] = {}
        self._phases: dict[_Form, Phases] = {}
        self._variants: dict[tuple[Any, ...], _Variant] = {}
        self._checks: dict[tuple[bool, ...], Scalars] = {}

    def is_plain_with(self, groups: Iterable[Hypers]) -> bool:
        """Whether every element is updated by itself with the flags of all these groups."""
        return all(map(self._is_plain_with, groups))

    def is_by_tensor_with(self, groups: Iterable[Hypers]) -> bool:
        """Whether each segment must be a part of one tensor, with these flags."""
        return self._scaled or not self.is_plain_with(groups)

    def states(self, hypers: Hypers, ndim: int) -> tuple[State, ...]:
        """The states that a param has with these flags, in order; the others are neither read nor written."""
        used = used_arrays(self.program, {**hypers, "ndim": ndim})
        return tuple(state for state in self.program.states if state.name in used)

    def update(self, batch: Batch, groups: Sequence[Hypers]) -> None:
        """Update every segment in place, by the hyper-parameters of its group.

        Collective where the rule makes sums over tensors, rows or columns. Raises ConfigError for arrays that are not
        as `Segment` says, RuleError if a per-step scalar has no value.
        """
        if self._matrices is not None:
            self.check(batch.updated, groups)
            self._matrices.update(batch, groups)
            return
        if self.locality == "matrix":
            self.check(batch.updated, groups)
            for segment in batch.segments:
                self._update_whole(segment, groups[segment.group])
            return
        if self.is_plain or self.is_plain_with([groups[index] for index in {update.group for update in batch.updated}]):
            self._update_elements(batch.segments, groups)
            return
        jobs = self._jobs(batch.segments, groups)
        with exactly() if any(job.host for job in jobs) else nullcontext():
            self._update_jobs(batch, jobs, groups)

    def _update_jobs(self, batch: Batch, jobs: list[_Job], groups: Sequence[Hypers]) -> None:
        self._make_sums(batch, jobs, groups)
        together: dict[int, tuple[_Variant, list[llvm.Row]]] = {}
        for job in _with_one_key(jobs):
            together.setdefault(id(job.variant), (job.variant, []))[1].append(job.row())
        stores = [store for job in jobs for store in job.stores()]
        for variant, rows in together.values():
            _run(variant.passes[-1].kernel, rows)
        write_states(stores)

    def check(self, updated: Iterable[Update], groups: Sequence[Hypers]) -> None:
        """Raise RuleError if a per-step scalar has no value in one of these updates."""
        key_of_noise = (0.0,) * noise.PIECES
        alike = {
            (one.group, one.step, one.shape if self.locality == "matrix" else len(one.shape)): one for one in updated
        }
        for group, step, shape in alike.values():
            hypers = {**hypers_of(groups[group], step, 1.0, shape, torch.float32), noise.KEY: key_of_noise}
            truths = self._truths(hypers)
            if truths not in self._checks:
                program = self._program_for(hypers, torch.float32)
                self._checks[truths] = compile_scalars(program, uniform_values(program))
            self._checks[truths](hypers, {})

    def _update_elements(self, segments: Sequence[Segment], groups: Sequence[Hypers]) -> None:
        """Rules over single elements: one phase and no sums, so this is the short way, for many small tensors."""
        alike: dict[object, tuple[tuple[float, ...], list[llvm.Row]]] = {}
        together: dict[_Variant, list[llvm.Row]] = {}
        for whole in segments:
            for segment in (whole,) if whole.seed is None else noise.between_turns(whole):
                arrays, seed, low = _arrays(segment), segment.seed, segment.low
                turn = 0 if seed is None else segment.offset // noise.TURN
                kind = (seed is None, *arrays, *checked(arrays, low, segment.offset))
                key = (segment.group, segment.step, segment.grad_scale, seed, turn, kind)
                found = alike.get(key)
                if found is None:
                    hypers = _hypers(segment, groups[segment.group])
                    variant = self._variant(segment, kind, hypers)
                    scalars = variant.passes[-1].scalars(hypers, {})
                    found = alike[key] = scalars, together.setdefault(variant, [])
                found[1].append(llvm.Row(arrays, found[0], segment.offset, low))
        for variant, rows in together.items():
            _run(variant.passes[-1].kernel, rows)

    def _variant(self, segment: Segment, kind: tuple[object, ...], hypers: Hypers) -> _Variant:
        """``kind``: all that kernels depend on but the truths."""
        key = (self._truths(hypers), kind)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = self._compile(segment, hypers)
        return variant

    def moved_bytes(self, shape: tuple[int, ...], group: Hypers, compute: torch.dtype) -> tuple[int, int]:
        """Of a rule with matrix products: the bytes of an element that go to a tensor's owner, and that come back."""
        return (0, 0) if self._matrices is None else self._matrices.moved_bytes(shape, group, compute)

    def _update_whole(self, segment: Segment, group: Hypers) -> None:
        """One whole tensor, on the reference back end."""
        check_dtypes(segment)
        shape, compute = segment.shape or (), compute_dtype(segment.param)
        hypers = {**_hypers(segment, group), **hypers_of(group, segment.step, segment.grad_scale, shape, compute)}
        program = self._program_for(hypers, compute, noise.rounded_dtype(segment))
        arrays = {"param": segment.param.view(shape), "grad": segment.grad.view(shape)}
        states = decoded_states(segment.state)
        arrays |= {name: values.view(shape) for name, values in states.items()} | segment.tensor_state
        new = reference.run_whole(program, arrays, hypers, compute=compute, offset=segment.offset)
        for name, values in new.items():
            if name in segment.state and segment.state[name].dtype in CODED:
                codes, scale = encode(values.view(segment.state[name].shape), segment.state[name].dtype)
                segment.state[name].copy_(codes)
                segment.state[scale_name(name)].copy_(scale)
            else:
                arrays[name].copy_(values)
        if segment.low is not None:
            with exactly():
                rounding.write(rounding.read(segment.param, compute), segment.low)

    def _make_sums(self, batch: Batch, jobs: list[_Job], groups: Sequence[Hypers]) -> None:
        everywhere = [self._reductions(groups[update.group], update) for update in batch.updated]
        for number in range(max(map(len, everywhere), default=0)):
            reductions = [phases[number] if number < len(phases) else () for phases in everywhere]
            partials = _reduced(jobs, number)
            for job, whole in zip(jobs, batch.combine(partials, reductions), strict=True):
                job.take(number, whole)

    def _reductions(self, group: Hypers, update: Update) -> list[tuple[str, ...]]:
        """The reductions of each phase of a tensor but the last, here or on another rank."""
        given = {**group, "step": update.step, "ndim": len(update.shape)}
        phases = self._phases_for(given, torch.float32).phases[:-1]
        return [tuple(line.operation for line in phase.reductions) for phase in phases]

    def _program_for(self, hypers: Hypers, compute: torch.dtype, rounded: torch.dtype | None = None) -> Program:
        key = (self._truths(hypers), compute, rounded)
        if key not in self._programs:
            self._programs[key] = stages(self.program, *key)[-1][1]
        return self._programs[key]

    def _phases_for(self, hypers: Hypers, compute: torch.dtype, rounded: torch.dtype | None = None) -> Phases:
        key = (self._truths(hypers), compute, rounded)
        if key not in self._phases:
            self._phases[key] = cut(self._program_for(hypers, compute, rounded))
        return self._phases[key]

    def _jobs(self, segments: Sequence[Segment], groups: Sequence[Hypers]) -> list[_Job]:
        found: dict[tuple[object, ...], _Common] = {}
        jobs = []
        for segment in segments:
            if self.locality == "factored" and not segment.param.numel():
                continue  # it has no rows and columns
            arrays = _arrays(segment)
            kind = (segment.seed is None, *arrays, *checked(arrays, segment.low, segment.offset))
            turn = 0 if segment.seed is None else segment.offset // noise.TURN
            ndim = len(segment.shape) if self._by_ndim and segment.shape is not None else None
            dtype = segment.param.dtype if self._by_dtype else None
            alike = (segment.group, segment.step, segment.grad_scale, segment.seed, turn, ndim, dtype)
            common = found.get(alike)
            if common is None:
                common = found[alike] = _Common(_hypers(segment, groups[segment.group]))
            variant = self._variant(segment, kind, common.hypers)
            known = {n: _counted(segment, what) for n, what in variant.counts}
            job = _Job(segment, variant, common, known)
            if variant.host is not None:
                view = view_of(segment.shape or ())
                job.host = HostValues(variant.host, view, common.hypers, segment.tensor_state, known)
            jobs.append(job)
        return jobs

    def _compile(self, segment: Segment, hypers: Hypers) -> _Variant:
        check_dtypes(segment)
        compute = compute_dtype(segment.param)
        phases = self._phases_for(hypers, compute, noise.rounded_dtype(segment))
        stored = _arrays(segment)
        given = {**segment.state, **segment.tensor_state}
        missing = [state.name for state in self.states(hypers, len(segment.shape or ())) if state.name not in given]
        if missing:
            raise ConfigError(f"expected the states {missing} of the rule {self._name!r}, got only {list(given)}")
        passes = []
        for number, phase in enumerate(phases.phases):
            low = segment.low if number == len(phases.phases) - 1 else None
            dtypes = tuple((name, array.dtype) for name, array in stored.items())
            binding = Binding(compute, dtypes, None if low is None else low.dtype)
            kernel = _back_end(segment.param.device)(phase, binding)
            sums = tuple((phase.body.instructions[inner].operation, outer) for inner, outer in phase.sums)
            passes.append(_Pass(kernel, compile_scalars(phases.program, phase.scalars), phase, sums))
        counts = [(n, line.operation) for n, line in enumerate(phases.program.instructions)]
        plan = HostPlan(phases, compute)
        host = plan if plan.is_needed else None
        return _Variant(phases, tuple(passes), tuple((n, what) for n, what in counts if what in _COUNTS), host)


def _hypers(segment: Segment, group: Hypers) -> dict[str, object]:
    """All that the host's scalars may be made of."""
    hypers = {
        **group,
        "step": segment.step,
        "ndim": len(segment.shape or ()),
        "machine_eps": torch.finfo(compute_dtype(segment.param)).eps,
        "grad_scale": segment.grad_scale,
    }
    return hypers if segment.seed is None else {**hypers, noise.KEY: noise.key_of(segment, segment.seed)}


def _with_one_key(jobs: list[_Job]) -> Iterator[_Job]:
    """The jobs, cut where the key of the noise changes."""
    for job in jobs:
        seed = job.segment.seed
        if seed is None:
            yield job
            continue
        for part in noise.between_turns(job.segment):
            hypers = {**job.common.hypers, noise.KEY: noise.key_of(part, seed)}
            yield replace(job, segment=part, common=replace(job.common, hypers=hypers, scalars={}))


def _arrays(segment: Segment) -> dict[str, Tensor]:
    return {"param": segment.param, "grad": segment.grad, **segment.state}


def _reduced(jobs: list[_Job], number: int) -> list[list[Tensor]]:
    """What the reductions of a phase before the last give, for each job; nothing for those without that phase."""
    made: list[list[Tensor]] = [[] for _ in jobs]
    together: dict[int, list[int]] = {}
    for index, job in enumerate(jobs):
        if job.sums(number):
            together.setdefault(id(job.variant), []).append(index)
    for indices in together.values():
        kernel = jobs[indices[0]].variant.passes[number].kernel
        for index, found in zip(indices, _run(kernel, [jobs[i].early_row(number) for i in indices]), strict=True):
            made[index] = list(found)
    return made


def _run(kernel: PhaseKernel, rows: list[llvm.Row]) -> list[tuple[Tensor, ...]]:
    """A phase on segments that share their kernel: in one call where the back end can."""
    if len(rows) > 1 and isinstance(kernel, llvm.LlvmKernel):
        return kernel.many(rows)
    return [kernel(row.arrays, row.scalars, offset=row.offset, low=row.low, lines=row.lines) for row in rows]


def _counted(segment: Segment, what: str) -> float:
    return float(getattr(view_of(segment.shape or ()), what))


def _back_end(device: torch.device) -> Callable[[Phase, Binding], PhaseKernel]:
    """``compile_phase`` of the fastest back end for a device."""
    if device.type == "cuda":
        return triton.compile_phase
    return _llvm_or_reference if device.type == "cpu" else reference.compile_phase


def _llvm_or_reference(phase: Phase, binding: Binding) -> PhaseKernel:
    try:
        return llvm.compile_phase(phase, binding)
    except llvm.TargetUnsupported as error:
        _warn_once(str(error))
        return reference.compile_phase(phase, binding)


@cache
def _warn_once(reason: str) -> None:
    text = f"updates run on the reference back end, which is slow and gives the same bits: {reason}"
    warnings.warn(text, stacklevel=2)


_COMPILED: "WeakKeyDictionary[Rule, CompiledRule]" = WeakKeyDictionary()


def compile_rule(rule: Rule) -> CompiledRule:
    """The compiled form of ``rule``, kept for as long as the rule lives."""
    compiled = _COMPILED.get(rule)
    if compiled is None:
        compiled = _COMPILED[rule] = CompiledRule(rule)
    return compiled
