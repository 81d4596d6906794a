"""Updates by rules with matrix products: passes over what a rank has of a tensor, products where it is whole.

Runs the steps of `ir.steps`. Passes are kernels of the usual back ends, products are torch's: ``torch.matmul`` on
contiguous matrices that torch has allotted, so on one kind of machine and with one number of threads their bits depend
on the shapes alone. Who owns which tensor, and how values travel, is the `Owners`' business.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from shardstep.rules import noise
from shardstep.rules.backends import blocks
from shardstep.rules.binding import Binding, PhaseKernel, check_arrays, check_dtypes, compute_dtype
from shardstep.rules.forms import Desk, Form, Kernels, Plan
from shardstep.rules.hypers import Hypers, hypers_of
from shardstep.rules.ir import Product, Program, Sweep, Turn
from shardstep.rules.variants import BackEnd
from shardstep.rules.view import View, view_of
from shardstep.types import Batch, Owners, Segment, Whole

ProgramFor: TypeAlias = Callable[[Hypers, torch.dtype, torch.dtype | None], Program]


@dataclass(slots=True)
class _Job:
    """A tensor, or what this rank has of it, on its way through the steps. ``desk``: where it is whole.

    ``arrays``: param, grad and states of elements; ``squares``: states of square matrices, where the middle runs.
    """

    form: Form
    kernels: Kernels
    hypers: Hypers
    view: View
    arrays: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    offset: int
    device: torch.device
    low: Tensor | None = None
    desk: Desk | None = None
    buffers: dict[int, Tensor] = field(default_factory=dict)
    known: dict[int, float] = field(default_factory=dict)


class MatrixUpdate:
    """How `CompiledRule` updates by a rule with matrix products."""

    def __init__(self, program_for: ProgramFor, back_end: BackEnd) -> None:
        self._program_for, self._back_end = program_for, back_end
        self._forms: dict[int, tuple[Program, Form]] = {}

    def moved_bytes(self, shape: tuple[int, ...], group: Hypers, compute: torch.dtype) -> tuple[int, int]:
        """The bytes of an element of a tensor that go to its owner, and that come back."""
        form = self._form(hypers_of(group, 1, 1.0, shape, compute), compute, None)
        inward, outward = (form.dtypes(buffers) for buffers in (form.steps.inward, form.steps.outward))
        return sum(dtype.itemsize for dtype in inward), sum(dtype.itemsize for dtype in outward)

    def update(self, batch: Batch, groups: Sequence[Hypers]) -> None:
        """Update every segment in place; see `CompiledRule.update`."""
        jobs = [self._job(segment, groups[segment.group]) for segment in batch.segments]
        if batch.owners is not None:
            self._update_in_parts(batch, batch.owners, jobs, groups)
            return
        for job in _at_desks(jobs, lambda form: (range(len(form.all)), ())):
            for places in job.form.rounds(range(len(job.form.all))):
                _learn(job, places, self._run(job, places))

    def _update_in_parts(self, batch: Batch, owners: Owners, jobs: list[_Job], groups: Sequence[Hypers]) -> None:
        forms = [self._form_of(whole, groups[whole.group]) for whole in owners.tensors]
        self._together(batch, jobs, forms, lambda form: form.head)
        inward = [form.dtypes(form.steps.inward) for form in forms]
        pieces = [[job.buffers[buffer] for buffer in job.form.steps.inward] for job in jobs]
        for job in jobs:
            job.buffers = {n: values for n, values in job.buffers.items() if job.form.last[n] in job.form.tail}
        wholes = owners.gather(pieces, inward)
        pieces.clear()
        results = self._middles([owners.tensors[i] for i in owners.owned], groups, wholes)
        for job, values in zip(jobs, owners.scatter(results, [f.dtypes(f.steps.outward) for f in forms]), strict=True):
            job.buffers |= zip(job.form.steps.outward, values, strict=True)
        self._together(batch, jobs, forms, lambda form: form.tail)

    def _together(self, batch: Batch, jobs: list[_Job], forms: list[Form], places: Callable[[Form], range]) -> None:
        """One part of all jobs, in step with the other ranks where sums are made."""
        most = max((len(form.rounds(places(form))) for form in forms), default=0)
        for number in range(most):
            rounds = [_at(job.form.rounds(places(job.form)), number) for job in jobs]
            partials = [self._run(job, part) for job, part in zip(jobs, rounds, strict=True)]
            made = [form.sums(_at(form.rounds(places(form)), number)) for form in forms]
            if any(made):
                reductions = [tuple(operation for operation, _ in sums) for sums in made]
                for job, part, whole in zip(jobs, rounds, batch.combine(partials, reductions), strict=True):
                    _learn(job, part, whole)

    def _middles(
        self, owned: Sequence[Whole], groups: Sequence[Hypers], wholes: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """What is done at owners; ``wholes`` is emptied on the way."""
        jobs = []
        for whole, values in zip(owned, wholes, strict=True):
            hypers = _hypers_of(whole, groups[whole.group])
            form, view = self._form(hypers, whole.compute, None), view_of(whole.shape)
            arrays = (*values, *whole.squares.values())
            device = arrays[0].device if arrays else torch.device("cpu")  # without any there is nothing to do
            kernels = form.kernels.setdefault((device.type, *_dtypes(whole.squares)), {})
            job = _Job(form, kernels, hypers, view, {}, whole.squares, whole.offset, device)
            job.known |= _counted(form, view)
            job.buffers |= zip(form.steps.inward, values, strict=True)
            jobs.append(job)
        wholes.clear()
        for job in _at_desks(jobs, lambda form: (form.middle, form.steps.inward)):
            assert job.desk is not None
            for buffer in job.form.steps.inward:
                job.desk.buffers[buffer].copy_(job.buffers.pop(buffer))
            for places in job.form.rounds(job.form.middle):
                _learn(job, places, self._run(job, places))
            job.buffers = {buffer: job.desk.buffers[buffer].clone() for buffer in job.form.steps.outward}
            job.desk = None
        return [list(job.buffers.values()) for job in jobs]

    # - forms and kernels

    def _form_of(self, whole: Whole, group: Hypers) -> Form:
        return self._form(_hypers_of(whole, group), whole.compute, None)

    def _form(self, hypers: Hypers, compute: torch.dtype, rounded: torch.dtype | None) -> Form:
        program = self._program_for(hypers, compute, rounded)
        if id(program) not in self._forms:
            self._forms[id(program)] = program, Form(program, compute)
        return self._forms[id(program)][1]

    def _job(self, segment: Segment, group: Hypers) -> _Job:
        arrays = {"param": segment.param, "grad": segment.grad, **segment.state}
        check_arrays(arrays, segment.low, segment.offset)
        check_dtypes(segment)
        shape, compute = segment.shape or (), compute_dtype(segment.param)
        hypers = hypers_of(group, segment.step, segment.grad_scale, shape, compute)
        if segment.seed is not None:
            hypers = {**hypers, noise.KEY: noise.key_of(segment, segment.seed)}
        form = self._form(hypers, compute, noise.rounded_dtype(segment))
        low = None if segment.low is None else segment.low.dtype
        key = (segment.param.device.type, low, *_dtypes(arrays), *_dtypes(segment.tensor_state))
        kernels, view = form.kernels.setdefault(key, {}), view_of(shape)
        job = _Job(form, kernels, hypers, view, arrays, segment.tensor_state, segment.offset, segment.param.device)
        job.low = segment.low
        job.known |= _counted(form, view)
        return job

    def _kernel(self, job: _Job, place: int, sweep: Sweep) -> PhaseKernel:
        """Compiled when it is first needed."""
        if place not in job.kernels:
            stored = [*_dtypes(job.arrays), *_dtypes(job.squares)]
            stored += [(job.form.steps.buffers[n].name, job.form.dtype(n)) for n in sweep.buffers]
            low = None if job.low is None or not _stores_param(sweep) else job.low.dtype
            binding = Binding(job.form.compute, tuple(stored), low)
            job.kernels[place] = self._back_end(job.device)(sweep.phase, binding)
        return job.kernels[place]

    # - running

    def _run(self, job: _Job, places: range) -> list[Tensor]:
        """These steps; the partial sums of the last one."""
        sums: list[Tensor] = []
        for place in places:
            step = job.form.all[place]
            if isinstance(step, Sweep):
                sums = self._sweep(job, place, step)
            elif isinstance(step, Product):
                assert job.desk is not None
                _multiply(job.desk.products[place], step, job.form.scalars[place](job.hypers, job.known))
            elif isinstance(step, Turn):
                assert job.desk is not None
                source, result = job.desk.products[place]
                result.copy_(source)
            else:
                assert job.desk is not None
                (result,) = job.desk.products[place]
                result.zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return sums

    def _sweep(self, job: _Job, place: int, step: Sweep) -> list[Tensor]:
        """Buffers of a part of a tensor begin here, and go when nobody reads them any more."""
        form, buffers = job.form, job.buffers if job.desk is None else job.desk.buffers
        arrays = dict(job.arrays)
        if step.extent != "element":  # kernels count elements by any of them
            shapes = form.steps.program.shapes
            arrays = {name: values.view(-1) for name, values in job.squares.items() if shapes[name] == step.extent}
        for buffer in step.buffers:
            if buffer not in buffers:
                param = job.arrays["param"]
                buffers[buffer] = torch.empty(param.numel(), dtype=form.dtype(buffer), device=param.device)
            arrays[form.steps.buffers[buffer].name] = buffers[buffer]
        low = job.low if _stores_param(step) else None
        offset = job.offset if step.extent == "element" else 0
        kernel = self._kernel(job, place, step)
        sums = kernel(arrays, form.scalars[place](job.hypers, job.known), offset=offset, low=low)
        for buffer in step.buffers if job.desk is None else ():
            if form.last[buffer] == place:
                del buffers[buffer]
        return list(sums)


def _dtypes(arrays: Mapping[str, Tensor]) -> list[tuple[str, torch.dtype]]:
    return [(name, array.dtype) for name, array in arrays.items()]


def _at_desks(jobs: Sequence[_Job], used: Callable[[Form], tuple[range, Sequence[int]]]) -> Iterator[_Job]:
    """The jobs, those of one form and shape one after the other at the same desk.

    ``used`` gives the places of the steps that are run there, and the buffers that are filled before.
    """
    alike: dict[tuple[int, View, torch.device], list[_Job]] = {}
    for job in jobs:
        alike.setdefault((id(job.form), job.view, job.device), []).append(job)
    for (_, view, device), together in alike.items():
        form, (places, given) = together[0].form, used(together[0].form)
        if places not in form.plans:
            form.plans[places] = Plan(form, places, given)
        desk = Desk(form, form.plans[places], view, places, device)
        for job in together:
            job.desk = desk
            yield job


def _hypers_of(whole: Whole, group: Hypers) -> dict[str, object]:
    return hypers_of(group, whole.step, whole.grad_scale, whole.shape, whole.compute)


def _counted(form: Form, view: View) -> Iterator[tuple[int, float]]:
    return ((number, float(getattr(view, what))) for number, what in form.counts)


def _learn(job: _Job, places: range, sums: Sequence[Tensor]) -> None:
    """What the host knows after a round."""
    for (operation, number), parts in zip(job.form.sums(places), sums, strict=False):
        job.known[number] = float(blocks.combine(operation, parts.cpu().numpy()))


def _at(rounds: list[range], number: int) -> range:
    return rounds[number] if number < len(rounds) else range(0)


def _stores_param(sweep: Sweep) -> bool:
    return any(name == "param" for name, _ in sweep.phase.body.stores)


def _multiply(matrices: tuple[Tensor, ...], step: Product, scales: Sequence[float]) -> None:
    """In the result's dtype; a narrow operand of a wide product is widened, which is exact."""
    left, right, result, *addend = matrices
    if addend:
        given = iter(scales)
        alpha, beta = (1.0 if number is None else next(given) for number in (step.alpha, step.beta))
        add = torch.addmm if result.ndim == 2 else torch.baddbmm
        add(addend[0], left, right, alpha=alpha, beta=beta, out=result)
        return
    if left.dtype != result.dtype or right.dtype != result.dtype:
        left, right = left.to(result.dtype), right.to(result.dtype)
    torch.matmul(left, right, out=result)
