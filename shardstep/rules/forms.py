"""What a rule with matrix products needs to run: its steps for one way that its conditions go, and memory for them.

A desk is memory for whole tensors of one shape, which are worked on one after the other; buffers that do not live at
the same time share it. Nothing here runs a step.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from shardstep.rules.binding import PhaseKernel
from shardstep.rules.ir import Buffer, Product, Program, Step, Steps, Sweep
from shardstep.rules.passes import cut_steps
from shardstep.rules.scalars import Scalars, compile_scalars
from shardstep.rules.view import View

Kernels: TypeAlias = dict[int, PhaseKernel]
"""Those of the sweeps of a form, by their place among its steps."""


class Form:
    """The steps for one way that the conditions go, and what they need to run."""

    def __init__(self, program: Program, compute: torch.dtype) -> None:
        self.steps: Steps = cut_steps(program)
        self.compute = compute
        steps = self.steps
        self.all = steps.all
        self.head, self.tail = range(len(steps.head)), range(len(self.all) - len(steps.tail), len(self.all))
        self.middle = range(self.head.stop, self.tail.start)
        self.scalars: dict[int, Scalars] = {
            place: compile_scalars(steps.program, _scalars_of(step)) for place, step in enumerate(self.all)
        }
        self.last = {buffer: place for place, step in enumerate(self.all) for buffer in step.buffers}
        lines = enumerate(steps.program.instructions)
        self.counts = [(n, line.operation) for n, line in lines if line.operation in ("numel", "rows", "columns")]
        self.kernels: dict[tuple[Any, ...], Kernels] = {}
        self.plans: dict[range, Plan] = {}
        """For the steps at these places."""

    def dtypes(self, buffers: Sequence[int]) -> list[torch.dtype]:
        return [self.dtype(buffer) for buffer in buffers]

    def dtype(self, buffer: int) -> torch.dtype:
        return torch.bfloat16 if self.steps.buffers[buffer].narrow else self.compute

    def extent(self, buffer: int, view: View) -> tuple[int, ...]:
        """Of a whole buffer: that of one matrix, or of a batch of them."""
        batch, *matrix = view.extent(self.steps.buffers[buffer].extent)
        return tuple(matrix) if batch == 1 else (batch, *matrix)

    def rounds(self, places: range) -> list[range]:
        """``places`` cut after each sweep that makes sums."""
        cuts = [place + 1 for place in places if isinstance(step := self.all[place], Sweep) and step.phase.sums]
        bounds = [places.start, *cuts, places.stop]
        return [range(a, b) for a, b in pairwise(bounds)]

    def sums(self, places: range) -> tuple[tuple[str, int], ...]:
        """What the last of ``places`` sums up: the operation, and the number of its value."""
        step = self.all[places[-1]] if places else None
        if not isinstance(step, Sweep):
            return ()
        return tuple((step.phase.body.instructions[inner].operation, outer) for inner, outer in step.phase.sums)


class Plan:
    """Which buffers share memory at a desk, one after the other: those of one extent and dtype.

    ``slots``: a buffer for which each memory is made; ``of``: the slot of each buffer.
    """

    def __init__(self, form: Form, places: range, given: Sequence[int]) -> None:
        self.slots: list[int] = []
        self.of: dict[int, int] = {}
        free: dict[Buffer, list[int]] = {}
        for buffer in given:
            self._take(form, buffer, free)
        for place in places:
            buffers = dict.fromkeys(form.all[place].buffers)
            for buffer in buffers:
                if buffer not in self.of:
                    self._take(form, buffer, free)
            for buffer in buffers:
                if form.last[buffer] == place:
                    free.setdefault(_kind(form, buffer), []).append(self.of[buffer])

    def _take(self, form: Form, buffer: int, free: dict[Buffer, list[int]]) -> None:
        kept = free.get(_kind(form, buffer))
        if not kept:
            kept = [len(self.slots)]
            self.slots.append(buffer)
        self.of[buffer] = kept.pop()


def _kind(form: Form, buffer: int) -> Buffer:
    return replace(form.steps.buffers[buffer], name="")


class Desk:
    """Memory for whole tensors of one shape, one after the other, and the matrices in it."""

    def __init__(self, form: Form, plan: Plan, view: View, places: range, device: torch.device) -> None:
        extents = [form.extent(buffer, view) for buffer in plan.slots]
        dtypes = form.dtypes(plan.slots)
        matrices = [torch.empty(e, dtype=d, device=device) for e, d in zip(extents, dtypes, strict=True)]
        both = [(matrix, matrix.mT) for matrix in matrices]
        flat = [matrix.view(-1) for matrix in matrices]
        self.buffers = {buffer: flat[slot] for buffer, slot in plan.of.items()}
        self.products: dict[int, tuple[Tensor, ...]] = {}
        for place in places:
            step = form.all[place]
            if not isinstance(step, Sweep):
                slots = zip(step.buffers, step.turned, strict=True)
                self.products[place] = tuple(both[plan.of[buffer]][flag] for buffer, flag in slots)


def _scalars_of(step: Step) -> Sequence[int]:
    """The host's values that a step needs."""
    if isinstance(step, Product):
        return [number for number in (step.alpha, step.beta) if number is not None]
    return step.phase.scalars if isinstance(step, Sweep) else ()
