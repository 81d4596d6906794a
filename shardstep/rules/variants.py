"""The kernels of a rule: one set for each combination of flags, dtypes and kind of device that it has met.

They are compiled when they are first asked for. Nothing here runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, TypeAlias

import torch

from shardstep.errors import ConfigError
from shardstep.rules import noise
from shardstep.rules.backends.choice import ManyKernel, for_many
from shardstep.rules.binding import Binding, PhaseKernel, arrays_of, check_arrays, check_dtypes, compute_dtype
from shardstep.rules.host import HostPlan
from shardstep.rules.hypers import Hypers
from shardstep.rules.ir import Phase, Phases, Program, State
from shardstep.rules.passes import compile_truths, cut, stages, used_arrays
from shardstep.rules.scalars import Scalars, compile_scalars
from shardstep.types import Segment

BackEnd: TypeAlias = Callable[[torch.device], Callable[[Phase, Binding], PhaseKernel]]

Kind: TypeAlias = tuple[object, ...]
"""All that the kernels for a segment depend on but the truths of conditions: the device, if it is not the CPU; whether
there is no seed; the dtype of low; the names of its arrays, and their dtypes.
"""

_dtype: Final = attrgetter("dtype")

_COUNTS: Final = frozenset({"numel", "rows", "columns"})

_Form: TypeAlias = tuple[tuple[bool, ...], torch.dtype, torch.dtype | None]
"""Of a program: the truths of its conditions, the compute dtype, and what param is stochastically rounded to."""


@dataclass(frozen=True)
class Pass:
    """A compiled phase, and what the host does around it."""

    kernel: ManyKernel
    scalars: Scalars
    phase: Phase
    sums: tuple[tuple[str, int], ...]
    """For each reduction, which one, and the number of its value in the whole program."""


@dataclass(frozen=True, eq=False)
class Variant:
    """The kernels for one combination. ``host``: None where all that the host computes is scalars."""

    passes: tuple[Pass, ...]
    counts: tuple[tuple[int, str], ...]
    host: HostPlan | None


def kind_of(segment: Segment) -> Kind:
    """Raises ConfigError for arrays that do not fit."""
    param, low, state = segment.param, segment.low, segment.state
    arrays, numel = [param, segment.grad, *state.values()], param.numel()
    for array in arrays if low is None else [*arrays, low]:
        if not array.is_cpu or not array.is_contiguous() or array.numel() != numel:  # the usual case is none of these
            check_arrays(arrays_of(segment), low, segment.offset)
            break
    device = None if param.is_cpu else param.device  # whose hash takes longer than the rest
    return (device, segment.seed is None, None if low is None else low.dtype, *state, *map(_dtype, arrays))


class Variants:
    """Those of one rule. ``back_end``: what compiles for a device."""

    def __init__(self, program: Program, back_end: BackEnd) -> None:
        self._program, self._back_end = program, back_end
        self.truths = compile_truths(program)
        """Of the conditions in it, given hyper-parameters."""
        self._programs: dict[_Form, Program] = {}
        self._phases: dict[_Form, Phases] = {}
        self._variants: dict[tuple[Any, ...], Variant] = {}

    def states(self, hypers: Hypers, ndim: int) -> tuple[State, ...]:
        """The states that a param has with these flags, in order; the others are neither read nor written."""
        used = used_arrays(self._program, {**hypers, "ndim": ndim})
        return tuple(state for state in self._program.states if state.name in used)

    def program_for(self, hypers: Hypers, compute: torch.dtype, rounded: torch.dtype | None = None) -> Program:
        """The program as the passes leave it, before it is cut."""
        key = (self.truths(hypers), compute, rounded)
        if key not in self._programs:
            self._programs[key] = stages(self._program, *key)[-1][1]
        return self._programs[key]

    def phases_for(self, hypers: Hypers, compute: torch.dtype, rounded: torch.dtype | None = None) -> Phases:
        """The same, cut at its sums."""
        key = (self.truths(hypers), compute, rounded)
        if key not in self._phases:
            self._phases[key] = cut(self.program_for(hypers, compute, rounded))
        return self._phases[key]

    def of(self, segment: Segment, kind: Kind, hypers: Hypers) -> Variant:
        """What updates a segment of this kind (see `kind_of`). Raises ConfigError if dtypes or states do not fit."""
        key = (self.truths(hypers), kind)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = self._compile(segment, hypers)
        return variant

    def _compile(self, segment: Segment, hypers: Hypers) -> Variant:
        check_dtypes(segment)
        self._check_states(segment, hypers)
        compute = compute_dtype(segment.param)
        phases = self.phases_for(hypers, compute, noise.rounded_dtype(segment))
        stored = tuple((name, array.dtype) for name, array in arrays_of(segment).items())
        passes = []
        for number, phase in enumerate(phases.phases):
            low = segment.low if number == len(phases.phases) - 1 else None
            binding = Binding(compute, stored, None if low is None else low.dtype)
            kernel = for_many(self._back_end(segment.param.device)(phase, binding))
            sums = tuple((phase.body.instructions[inner].operation, outer) for inner, outer in phase.sums)
            passes.append(Pass(kernel, compile_scalars(phases.program, phase.scalars), phase, sums))
        counts = [(n, line.operation) for n, line in enumerate(phases.program.instructions)]
        plan = HostPlan(phases, compute)
        host = plan if plan.is_needed else None
        return Variant(tuple(passes), tuple((n, what) for n, what in counts if what in _COUNTS), host)

    def _check_states(self, segment: Segment, hypers: Hypers) -> None:
        given = {**segment.state, **segment.tensor_state}
        missing = [state.name for state in self.states(hypers, len(segment.shape or ())) if state.name not in given]
        if missing:
            name = self._program.name
            raise ConfigError(f"expected the states {missing} of the rule {name!r}, got only {list(given)}")
