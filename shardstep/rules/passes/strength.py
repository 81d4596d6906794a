"""Cheaper operations with the same bits: a division by a power of two is a multiplication.

before      %0 = load grad : real element
            %1 = const 4.0 : real uniform
            %2 = div %0 %1 : real element
after       %0 = load grad : real element
            %1 = const 4.0 : real uniform
            %2 = const 0.25 : real uniform
            %3 = mul %0 %2 : real element

Both are x scaled by a power of two, rounded once, where 1/c is exact and not flushed: a normal number of float32,
and so of float64. Any other c has a reciprocal that is rounded, and x * (1/c) then differs from x / c.
"""

import math
from typing import Final

from shardstep.rules.ir import Builder, Instruction, Program
from shardstep.rules.passes.constants import constant
from shardstep.rules.passes.rewrite import rewrite

_SMALLEST: Final = 2.0**-126
_LARGEST: Final = 2.0**127


def reduce_strength(program: Program) -> Program:
    """Multiply instead of dividing by constant powers of two."""
    return rewrite(program, _cheaper)


def _cheaper(builder: Builder, line: Instruction, arguments: tuple[int, ...]) -> int | None:
    if line.operation != "div":
        return None
    divisor = constant(builder, arguments[1])
    if divisor is None or not _is_power_of_two(divisor) or not _SMALLEST <= abs(1.0 / divisor) <= _LARGEST:
        return None
    return builder.emit("mul", arguments[0], builder.constant(1.0 / divisor, place=line.place), place=line.place)


def _is_power_of_two(value: float) -> bool:
    return math.isfinite(value) and abs(math.frexp(value)[0]) == 0.5
