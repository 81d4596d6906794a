"""All passes in their order, the verifier between them.

    gradient · [stochastic] · specialise · exact · constants · dead · elementary
    · { constants · strength · common · dead } · split | steps

What is in brackets runs if it is asked for. The braces are gone through until nothing changes: sharing can make two
branches equal, which then fold. The last pass is `steps` for programs with matrix products.
"""

from collections.abc import Callable, Sequence

import torch

from shardstep.rules.ir import Phases, Program, Steps, Sweep, verify
from shardstep.rules.passes.common import share_common
from shardstep.rules.passes.constants import fold_constants
from shardstep.rules.passes.dead import drop_dead
from shardstep.rules.passes.elementary import expand
from shardstep.rules.passes.exact import find_largest
from shardstep.rules.passes.gradient import scale_gradient
from shardstep.rules.passes.specialise import specialise
from shardstep.rules.passes.split import split
from shardstep.rules.passes.steps import split_steps
from shardstep.rules.passes.stochastic import round_stochastically
from shardstep.rules.passes.strength import reduce_strength

Pass = Callable[[Program], Program]

_SIMPLIFYING: tuple[tuple[str, Pass], ...] = (
    ("constants", fold_constants),
    ("strength", reduce_strength),
    ("common", share_common),
    ("dead", drop_dead),
)


def compile_phases(program: Program, truths: Sequence[bool], compute: torch.dtype) -> Phases:
    """The phases of ``program`` for these truths of its conditions, in this compute dtype.

    The gradient's scale is put in: the phases' scalars need a hyper-parameter ``grad_scale``.
    """
    return cut(stages(program, truths, compute)[-1][1])


def cut(program: Program) -> Phases:
    """The phases of a program that has been through `stages`."""
    phases = split(program)
    verify(phases.program, "split")
    for phase in phases.phases:
        verify(phase.body, "split")
    return phases


def cut_steps(program: Program) -> Steps:
    """The steps of a program with matrix products that has been through `stages`."""
    steps = split_steps(program)
    verify(steps.program, "steps")
    for step in steps.all:
        if isinstance(step, Sweep):
            verify(step.phase.body, "steps")
    return steps


def stages(
    program: Program, truths: Sequence[bool], compute: torch.dtype, rounded: torch.dtype | None = None
) -> list[tuple[str, Program]]:
    """(name of a pass, the program after it), from ("ir", the program given); passes that found nothing to do in a
    later round are left out. ``rounded``: the dtype that the new param is rounded to stochastically.
    """
    found = [("ir", verify(program))]

    def run(name: str, change: Pass) -> None:
        found.append((name, _changed(found[-1][1], name, change)))

    run("gradient", scale_gradient)
    if rounded is not None:
        run("stochastic", lambda given: round_stochastically(given, rounded))
    run("specialise", lambda given: specialise(given, truths))
    run("exact", find_largest)
    run("constants", fold_constants)
    run("dead", drop_dead)
    run("elementary", lambda given: expand(given, compute))
    for name, change in _SIMPLIFYING:
        run(name, change)
    while again := _round(found[-1][1]):
        found += again
    return found


def _round(program: Program) -> list[tuple[str, Program]]:
    """The simplifying passes that still change something, and what they give."""
    changed: list[tuple[str, Program]] = []
    for name, change in _SIMPLIFYING:
        after = _changed(program, name, change)
        if after != program:
            changed.append((name, after))
        program = after
    return changed


def _changed(program: Program, name: str, change: Pass) -> Program:
    """The program after the pass. One that the pass gives back as it was has been verified."""
    after = change(program)
    return after if after is program else verify(after, name)
