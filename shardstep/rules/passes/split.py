"""Phases: what the host computes leaves the loop over elements, and the loop is cut where it needs a reduction.

before      %0 = load grad : real element                     phase 0   %0 = load grad : real element
            %1 = sum %0 : real tensor                                   %1 = sum %0 : real tensor
            %2 = load param : real element
            %3 = hyper lr : real uniform                      phase 1   %0 = load param : real element
            %4 = mul %3 %1 : real tensor                                %1 = hyper s0 : real uniform
            %5 = mul %2 %4 : real element                               %2 = mul %0 %1 : real element
            store param %5                                              store param %2

A phase's scalars are the largest uniform and tensor values that its instructions use (here s0 is %4), but for
constants; its vectors are the values of rows and columns that they use. A truth value travels as 1.0 or 0.0. All
stores of elements are in the last phase, so that the earlier ones may read the same arrays: they compute again what
they need. Other arrays are read and stored by the host. Words are of the compute dtype's width, so what is made of
uniform ones stays in the loop; those of rows and columns are the host's, and travel as the reals with their bits.
"""

from shardstep.errors import RuleError
from shardstep.rules.ir import OPERATIONS, Builder, Hyper, Instruction, Phase, Phases, Program, Vector
from shardstep.rules.passes.dead import drop_dead
from shardstep.rules.scalars.wording import where

_LINES = ("row", "column")


def split(program: Program) -> Phases:
    """Cut a program without ``choose`` into phases. Raises RuleError for matrices, and for sums that are no totals."""
    program = drop_dead(program)
    _refuse_others(program)
    hosted = hosted_values(program)
    ranks = _ranks(program)
    last = max((ranks[value] for _, value in program.stores), default=0)
    program, carriers = carry(program, hosted)
    cutter = _Cutter(program, hosted, carriers)
    early = [[n for n, rank in enumerate(ranks) if rank == i and is_swept(program, n)] for i in range(1, last + 1)]
    stores = [(name, value) for name, value in program.stores if program.shapes[name] == "element"]
    return Phases(program, (*(cutter.phase(sums, []) for sums in early), cutter.phase([], stores)))


def _refuse_others(program: Program) -> None:
    for number, line in enumerate(program.instructions):
        total = is_swept(program, number) and line.operation in ("row_sum", "column_sum")
        if total or line.type.shape not in ("uniform", "tensor", "element", *_LINES):
            raise RuleError(
                f"{where(program, line)}: expected operations on elements and reductions, got {line.operation} "
                f"({line.type}); only the reference back end runs matrix rules so far"
            )


def is_swept(program: Program, number: int) -> bool:
    """Whether it is a reduction of elements, which a phase makes."""
    line = program.instructions[number]
    reduces = OPERATIONS[line.operation].family == "reduction"
    return reduces and program.instructions[line.arguments[0]].type.shape == "element"


def hosted_values(program: Program) -> list[bool]:
    """Which values are the host's to compute: not of elements, and no single ones made of words."""
    hosted: list[bool] = []
    for number, line in enumerate(program.instructions):
        made_here = is_swept(program, number) or all(hosted[argument] for argument in line.arguments)
        single = line.type.is_single and line.type.kind != "word" and made_here
        hosted.append(single or line.type.shape in _LINES)
    return hosted


def _ranks(program: Program) -> list[int]:
    """How many reductions of elements, one after the other, each value waits for."""
    ranks: list[int] = []
    for number, line in enumerate(program.instructions):
        ranks.append(max((ranks[argument] for argument in line.arguments), default=0) + is_swept(program, number))
    return ranks


def carry(program: Program, hosted: list[bool]) -> tuple[Program, dict[int, int]]:
    """The program with a real at its end for each value of the host that elements use and is none; their numbers."""
    builder = Builder(program.shapes)
    for line in program.instructions:
        builder.copy(line, line.arguments)
    carriers: dict[int, int] = {}
    for line, on_host in zip(program.instructions, hosted, strict=True):
        for argument in () if on_host else line.arguments:
            used = program.instructions[argument]
            if hosted[argument] and used.operation != "const" and argument not in carriers:
                if used.type.kind == "bool":
                    one, zero = builder.constant(1.0), builder.constant(0.0)
                    carriers[argument] = builder.emit("where", argument, one, zero, place=used.place)
                elif used.type.kind == "word":
                    carriers[argument] = builder.emit("from_bits", argument, place=used.place)
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
        scalars, vectors = list[int](), list[Vector]()
        for old in self._inside([self._program.instructions[s].arguments[0] for s in sums] + [v for _, v in stores]):
            line = self._program.instructions[old]
            if not self._hosted[old] or line.operation == "const":
                numbers[old] = builder.copy(line, tuple(numbers[argument] for argument in line.arguments))
            elif line.type.is_single:
                numbers[old] = carried(builder, line, builder.hyper(f"s{len(scalars)}", place=line.place))
                scalars.append(self._carriers.get(old, old))
            else:
                numbers[old] = carried(builder, line, _vector(builder, line, len(vectors)))
                vectors.append(Vector(self._carriers.get(old, old), line.type.shape))
        made = [self._reduction(builder, sum_, numbers, vectors) for sum_ in sums]
        hypers = [Hyper(f"s{i}") for i in range(len(scalars))]
        hypers += [Hyper(f"v{i}", shape=vector.shape) for i, vector in enumerate(vectors)]
        written = tuple((name, numbers[value]) for name, value in stores)
        body = Program(self._program.name, self._program.states, tuple(hypers), tuple(builder.instructions), written)
        return Phase(body, tuple(scalars), tuple(zip(made, sums, strict=True)), tuple(vectors))

    def _reduction(self, builder: Builder, sum_: int, numbers: dict[int, int], vectors: list[Vector]) -> int:
        """One at the end of a phase. A total gets a vector of its own, since anchors serve for nothing else."""
        line = self._program.instructions[sum_]
        value, *largest = line.arguments
        arguments = [numbers[value]]
        for number in largest:
            arguments.append(_vector(builder, line, len(vectors)))
            vectors.append(Vector(number, line.type.shape, anchors=True))
        return builder.copy(line, tuple(arguments))

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


def _vector(builder: Builder, line: Instruction, index: int) -> int:
    return builder.hyper(f"v{index}", place=line.place, shape=line.type.shape)


def carried(builder: Builder, line: Instruction, real: int) -> int:
    """The value of ``line``, of the real that travels for it."""
    if line.type.kind == "word":
        return builder.emit("bits", real, place=line.place)
    return builder.emit("ne", real, builder.constant(0.0), place=line.place) if line.type.kind == "bool" else real
