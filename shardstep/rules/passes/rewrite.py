"""How a pass goes over a program: once, in order, each instruction on the new numbers of its arguments."""

from collections.abc import Callable
from typing import TypeAlias

from shardstep.rules.ir import Builder, Instruction, Program

Change: TypeAlias = Callable[[Builder, Instruction, tuple[int, ...]], int | None]
"""(what is built so far, an old instruction, its arguments' new numbers) -> its new number, or None: copy it."""


def rewrite(program: Program, change: Change) -> Program:
    """The program with every instruction put through ``change``, itself if that changes nothing.

    What became useless stays: see `dead`.
    """
    builder = Builder(program.shapes)
    numbers: list[int] = []
    for line in program.instructions:
        arguments = tuple([numbers[argument] for argument in line.arguments])
        changed = change(builder, line, arguments)
        numbers.append(builder.copy(line, arguments) if changed is None else changed)
    return program.with_instructions(builder.instructions, [(name, numbers[value]) for name, value in program.stores])
