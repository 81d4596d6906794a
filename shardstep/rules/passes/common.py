"""Common subexpressions: what is computed twice is computed once, where it first was.

before      %0 = load grad : real element
            %1 = load param : real element
            %2 = mul %0 %1 : real element
            %3 = mul %1 %0 : real element
            %4 = add %2 %3 : real element
after       %0 = load grad : real element
            %1 = load param : real element
            %2 = mul %0 %1 : real element
            %3 = add %2 %2 : real element

Operations whose operands may change places without a change of bits count as the same either way round: their
result is defined by the two numbers and not by their order. Sums of three are never regrouped.
"""

from collections.abc import Hashable
from typing import Final

from shardstep.rules.ir import Builder, Instruction, Program
from shardstep.rules.passes.rewrite import rewrite

_COMMUTATIVE: Final = frozenset(
    "add mul minimum maximum eq ne and or word_add word_mul word_and word_or word_xor".split()
)


def share_common(program: Program) -> Program:
    """Keep the first of equal instructions."""
    seen: dict[Hashable, int] = {}

    def change(builder: Builder, line: Instruction, arguments: tuple[int, ...]) -> int:
        key = _key(line, arguments)
        if key not in seen:
            seen[key] = builder.copy(line, arguments)
        return seen[key]

    return rewrite(program, change)


def _key(line: Instruction, arguments: tuple[int, ...]) -> Hashable:
    """Constants by their text: 0.0 is not -0.0, and a NaN is the same as itself."""
    if line.operation in _COMMUTATIVE:
        arguments = tuple(sorted(arguments))
    elif line.operation == "fma":
        arguments = (*sorted(arguments[:2]), arguments[2])
    return line.operation, tuple(map(repr, line.attributes)), arguments, line.type.kind
