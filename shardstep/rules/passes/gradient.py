"""The gradient's scale: loss scale, clipping and averaging are one factor, which every rule applies as it loads.

before      %0 = load grad : real element
            %1 = mul %0 %0 : real element
after       %0 = load grad : real element
            %1 = hyper grad_scale : real uniform
            %2 = mul %0 %1 : real element
            %3 = mul %2 %2 : real element
"""

from dataclasses import replace
from typing import Final

from shardstep.rules.ir import Builder, Hyper, Instruction, Program
from shardstep.rules.passes.rewrite import rewrite

GRAD_SCALE: Final = "grad_scale"
"""A reserved name: no rule has a hyper-parameter of its own that is called so."""


def scale_gradient(program: Program) -> Program:
    """Multiply the gradient by ``hyper grad_scale``, which is added. A program that has it already is left alone."""
    if any(hyper.name == GRAD_SCALE for hyper in program.hypers):
        return program
    return rewrite(replace(program, hypers=(*program.hypers, Hyper(GRAD_SCALE))), _scaled)


def _scaled(builder: Builder, line: Instruction, arguments: tuple[int, ...]) -> int | None:
    if line.operation != "load" or line.attributes != ("grad",):
        return None
    gradient = builder.copy(line, arguments)
    return builder.emit("mul", gradient, builder.hyper(GRAD_SCALE, place=line.place), place=line.place)
