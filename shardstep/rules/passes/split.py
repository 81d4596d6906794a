"""Phases: what the host computes leaves the loop over elements, and the loop is cut where it needs a reduction.

before      %0 = load grad : real element                     phase 0   %0 = load grad : real element
            %1 = sum %0 : real tensor                                   %1 = sum %0 : real tensor
            %2 = load param : real element
            %3 = hyper lr : real uniform                      phase 1   %0 = load param : real element
            %4 = mul %3 %1 : real tensor                                %1 = hyper s0 : real uniform
            %5 = mul %2 %4 : real element                               %2 = mul %0 %1 : real element
            store param %5                                              store param %2

A phase's scalars are the largest uniform and tensor values that its instructions use (here s0 is %4), but for
constants. A truth value travels as 1.0 or 0.0. All stores are in the last phase, so that the earlier ones may read
the same arrays: they compute again what they need. Words are of the compute dtype's width, so what is made of them
stays in the loop.
"""

from shardstep.errors import RuleError
from shardstep.rules.ir import Builder, Hyper, Instruction, Phase, Phases, Program
from shardstep.rules.passes.dead import drop_dead
from shardstep.rules.scalars.wording import where


def split(program: Program) -> Phases:
    """Cut a program without ``choose`` into phases. Raises RuleError for rows, columns and matrices."""
    program = drop_dead(program)
    _refuse_other_shapes(program)
    hosted = _hosted(program)
    ranks = _ranks(program)
    last = max((ranks[value] for _, value in program.stores), default=0)
    program, carriers = carry_truths(program, hosted)
    cutter = _Cutter(program, hosted, carriers)
    early = [[n for n, rank in enumerate(ranks) if rank == i and _is_sum(program, n)] for i in range(1, last + 1)]
    return Phases(program, (*(cutter.phase(sums, []) for sums in early), cutter.phase([], list(program.stores))))


def _refuse_other_shapes(program: Program) -> None:
    for line in program.instructions:
        whole = line.type.is_single and line.operation != "load"
        if not whole and line.type.shape != "element":
            raise _refused(program, line, f"{line.operation} ({line.type})")
    for name, value in program.stores:
        if (shape := program.shapes[name]) != "element":
            raise _refused(program, program.instructions[value], f"a state {name!r} of shape {shape}")


def _refused(program: Program, line: Instruction, got: str) -> RuleError:
    return RuleError(
        f"{where(program, line)}: expected operations on elements and reductions over whole tensors, got {got}; "
        f"only the reference back end runs factored and matrix rules so far"
    )


def _is_sum(program: Program, number: int) -> bool:
    return program.instructions[number].operation in ("sum", "max")


def _hosted(program: Program) -> list[bool]:
    """Which values are the host's to compute: one number for all, and not made of words."""
    hosted: list[bool] = []
    for number, line in enumerate(program.instructions):
        made_here = _is_sum(program, number) or all(hosted[argument] for argument in line.arguments)
        hosted.append(line.type.shape != "element" and line.type.kind != "word" and made_here)
    return hosted


def _ranks(program: Program) -> list[int]:
    """How many reductions, one after the other, each value waits for."""
    ranks: list[int] = []
    for number, line in enumerate(program.instructions):
        ranks.append(max((ranks[argument] for argument in line.arguments), default=0) + _is_sum(program, number))
    return ranks


def carry_truths(program: Program, hosted: list[bool]) -> tuple[Program, dict[int, int]]:
    """The program with 1.0 or 0.0 at its end for each truth value of the host that elements use; their numbers."""
    builder = Builder(program.shapes)
    for line in program.instructions:
        builder.copy(line, line.arguments)
    carriers: dict[int, int] = {}
    for line, on_host in zip(program.instructions, hosted, strict=True):
        for argument in () if on_host else line.arguments:
            used = program.instructions[argument]
            if hosted[argument] and used.type.kind == "bool" and used.operation != "const" and argument not in carriers:
                one, zero = builder.constant(1.0), builder.constant(0.0)
                carriers[argument] = builder.emit("where", argument, one, zero, place=used.place)
    return program.with_instructions(builder.instructions, program.stores), carriers


class _Cutter:
    """Cuts phases out of one program. ``carriers``: truth value -> the real that travels for it."""

    def __init__(self, program: Program, hosted: list[bool], carriers: dict[int, int]) -> None:
        self._program = program
        self._hosted = hosted
        self._carriers = carriers

    def phase(self, sums: list[int], stores: list[tuple[str, int]]) -> Phase:
        """The pass over memory that makes these reductions and these stores."""
        builder = Builder(self._program.shapes)
        numbers: dict[int, int] = {}
        scalars: list[int] = []
        for old in self._inside([self._program.instructions[s].arguments[0] for s in sums] + [v for _, v in stores]):
            line = self._program.instructions[old]
            if self._hosted[old] and line.operation != "const":
                numbers[old] = scalar(builder, line, len(scalars))
                scalars.append(self._carriers.get(old, old))
            else:
                numbers[old] = builder.copy(line, tuple(numbers[argument] for argument in line.arguments))
        made = [builder.copy(line := self._program.instructions[s], (numbers[line.arguments[0]],)) for s in sums]
        hypers = tuple(Hyper(f"s{i}") for i in range(len(scalars)))
        written = tuple((name, numbers[value]) for name, value in stores)
        body = Program(self._program.name, self._program.states, hypers, tuple(builder.instructions), written)
        return Phase(body, tuple(scalars), tuple(zip(made, sums, strict=True)))

    def _inside(self, seeds: list[int]) -> list[int]:
        """What ``seeds`` are made of, as far as the host's values and with them, in order."""
        found: set[int] = set()
        stack = list(seeds)
        while stack:
            number = stack.pop()
            if number not in found:
                found.add(number)
                stack += () if self._hosted[number] else self._program.instructions[number].arguments
        return sorted(found)


def scalar(builder: Builder, line: Instruction, index: int) -> int:
    scalar = builder.hyper(f"s{index}", place=line.place)
    if line.type.kind == "real":
        return scalar
    return builder.emit("ne", scalar, builder.constant(0.0), place=line.place)
