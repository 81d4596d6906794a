"""Constants: what can be computed now is, and what changes nothing goes.

before      %0 = const 0.5 : real uniform
            %1 = const 0.5 : real uniform
            %2 = add %0 %1 : real uniform
            %3 = load param : real element
            %4 = mul %3 %2 : real element
            store param %4
after       %0 = const 0.5 : real uniform
            %1 = const 0.5 : real uniform
            %2 = const 1.0 : real uniform
            %3 = load param : real element
            store param %3

Uniform values are folded in float64 by the host's own arithmetic; those that have no value stay, to be reported if
they are ever needed. An identity must keep every bit of every number, the sign of a zero among them: x + 0.0 is not
x where x is -0.0, and 0.0 * x is not 0.0 where x is negative or no number. It must keep the shape too: a number for all
is float64 until it meets elements, so putting one in the place of element values would round elsewhere.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final

from shardstep.rules.ir import Builder, Instruction, Program
from shardstep.rules.passes.rewrite import rewrite
from shardstep.rules.scalars.arithmetic import ARITHMETIC, fault


def fold_constants(program: Program) -> Program:
    """Fold constants and drop what changes nothing."""
    return rewrite(program, _folded)


def constant(builder: Builder, number: int) -> float | None:
    """The value of a ``const`` that is a number or a truth value; None for anything else."""
    line = builder.instructions[number]
    if line.operation != "const" or line.type.kind == "word":
        return None
    value = line.attributes[0]
    return value if isinstance(value, float | bool) else None


def _folded(builder: Builder, line: Instruction, arguments: tuple[int, ...]) -> int | None:
    if (value := _value(builder, line, arguments)) is not None:
        return builder.constant(value, line.type.kind, line.place)
    same = _IDENTITIES.get(line.operation, _nothing)(builder, arguments)
    return same if same is not None and builder.type_of(same) == line.type else None


def _value(builder: Builder, line: Instruction, arguments: tuple[int, ...]) -> float | None:
    if line.type.shape != "uniform" or line.operation not in ARITHMETIC:
        return None
    values = [value for argument in arguments if (value := constant(builder, argument)) is not None]
    if len(values) < len(arguments):
        return None
    value = ARITHMETIC[line.operation](*values)
    return None if fault(line.operation, values, value) else value


def _is(builder: Builder, number: int, wanted: float) -> bool:
    """Whether this is the constant ``wanted``, of the same sign if it is zero."""
    value = constant(builder, number)
    return value is not None and value == wanted and math.copysign(1.0, value) == math.copysign(1.0, wanted)


def _inner(builder: Builder, number: int, operation: str) -> int | None:
    """x, where the value is ``operation x``."""
    line = builder.instructions[number]
    return line.arguments[0] if line.operation == operation else None


Identity = Callable[[Builder, tuple[int, ...]], int | None]


def _nothing(builder: Builder, arguments: tuple[int, ...]) -> int | None:
    return None


def _neutral(wanted: float, *, left: bool) -> Identity:
    """x, where the other operand is ``wanted``: the right one, or with ``left`` either."""

    def identity(builder: Builder, arguments: tuple[int, ...]) -> int | None:
        if _is(builder, arguments[1], wanted):
            return arguments[0]
        return arguments[1] if left and _is(builder, arguments[0], wanted) else None

    return identity


def _undone(operation: str) -> Identity:
    return lambda builder, arguments: _inner(builder, arguments[0], operation)


def _already(operation: str) -> Identity:
    return lambda builder, arguments: None if _inner(builder, arguments[0], operation) is None else arguments[0]


def _branch(builder: Builder, arguments: tuple[int, ...]) -> int | None:
    condition, yes, no = arguments
    known = constant(builder, condition)
    if known is not None:
        return yes if known else no
    return yes if yes == no else None


def _logical(decides: bool) -> Identity:
    """``or`` (True decides) and ``and`` (False decides) of truth values."""

    def identity(builder: Builder, arguments: tuple[int, ...]) -> int | None:
        left, right = arguments
        for one, other in ((left, right), (right, left)):
            known = constant(builder, one)
            if known is not None:
                return one if known == decides else other
        return left if left == right else None

    return identity


_IDENTITIES: Final[Mapping[str, Identity]] = {
    "mul": _neutral(1.0, left=True),
    "div": _neutral(1.0, left=False),
    "sub": _neutral(0.0, left=False),  # x - 0.0: -0.0 - 0.0 is -0.0
    "add": _neutral(-0.0, left=True),  # 0.0 + -0.0 is 0.0
    "neg": _undone("neg"),
    "not": _undone("not"),
    "from_bits": _undone("bits"),
    "bits": _undone("from_bits"),
    "abs": _already("abs"),
    "where": _branch,
    "choose": _branch,
    "and": _logical(decides=False),
    "or": _logical(decides=True),
}
