"""Where each value of a program lives while the reference back end runs it: in an array or a register.

A result goes straight into the array that it replaces, once the old content has been read for the last time.
"""

import math
from dataclasses import dataclass

from shardstep.rules.program import Instruction, Operand, Program, Uniform, Value

GRAD = 1
"""The slot of the gradient, which is never written."""


@dataclass(frozen=True)
class SlotOperation:
    """One instruction on slots.

    An operand that is a ``Uniform`` stays one; a ``Value`` now numbers a slot.
    """

    operation: str
    arguments: tuple[Operand, ...]
    destination: int


@dataclass(frozen=True)
class SlotProgram:
    """Slots 0 .. ``inputs`` - 1 are param, grad and states; ``registers`` scratch slots follow."""

    inputs: int
    registers: int
    operations: tuple[SlotOperation, ...]


def assign_slots(program: Program) -> SlotProgram:
    """Give every value of ``program`` a slot, such that each array ends up holding its own output."""
    program = _with_copies(program)
    allocation = _Allocation(program)
    operations = [allocation.place(index, line) for index, line in enumerate(program.instructions)]
    operations += allocation.moves_home()
    return SlotProgram(program.inputs, len(allocation.holds) - program.inputs, tuple(operations))


def _homes(program: Program) -> tuple[int, ...]:
    """The slot of the array that each output belongs to: param, then the states."""
    return (0, *range(GRAD + 1, program.inputs))


def _with_copies(program: Program) -> Program:
    """Make each output a value of its own: a copy where it is another array's input or is returned twice."""
    instructions, outputs = list(program.instructions), list[int]()
    for home, value in zip(_homes(program), program.outputs, strict=True):
        if value != home and (value < program.inputs or value in outputs):
            instructions.append(Instruction("copy", (Value(value),)))
            value = program.inputs + len(instructions) - 1
        outputs.append(value)
    return Program(program.name, program.states, program.uniforms, tuple(instructions), tuple(outputs))


class _Allocation:
    """Linear scan over the instructions. ``holds[slot]`` is the value that a slot holds now."""

    def __init__(self, program: Program) -> None:
        self.inputs = program.inputs
        self.holds = list(range(program.inputs))
        self.slot_of = list(range(program.inputs))
        self.home_of = dict(zip(program.outputs, _homes(program), strict=True))
        self.last_use = _last_uses(program)
        # When each array gets its output; until then it may serve as scratch. Never, if it is unchanged.
        self.written_at = {home: value - program.inputs for value, home in self.home_of.items()}

    def place(self, index: int, line: Instruction) -> SlotOperation:
        arguments = tuple(a if isinstance(a, Uniform) else Value(self.slot_of[a.index]) for a in line.arguments)
        value = self.inputs + index
        slot = self._choose(index, value)
        if slot == len(self.holds):
            self.holds.append(value)
        self.holds[slot] = value
        self.slot_of.append(slot)
        return SlotOperation(line.operation, arguments, slot)

    def _choose(self, index: int, value: int) -> int:
        home = self.home_of.get(value)
        # An operand that is read here for the last time may be overwritten: the operations are elementwise.
        free = [s for s, held in enumerate(self.holds) if s != GRAD and self.last_use[held] <= index]
        if home is not None and home in free:
            return home
        usable = [s for s in free if s >= self.inputs or self.last_use[value] <= self.written_at[s]]
        return min(usable, default=len(self.holds))

    def moves_home(self) -> list[SlotOperation]:
        """Outputs that could not be written in place, because their array was still being read."""
        moves = []
        for value, home in self.home_of.items():
            if self.slot_of[value] != home:
                moves.append(SlotOperation("copy", (Value(self.slot_of[value]),), home))
        return moves


def _last_uses(program: Program) -> list[float]:
    """For each value the index of the last instruction that reads it; infinity for outputs."""
    uses: list[float] = [-1.0] * program.inputs + [float(i) for i in range(len(program.instructions))]
    for index, line in enumerate(program.instructions):
        for argument in line.arguments:
            if isinstance(argument, Value):
                uses[argument.index] = index
    for output in program.outputs:
        uses[output] = math.inf
    return uses
