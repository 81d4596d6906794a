"""Dead code: what no store needs goes, and so does the store of a state that stays as it was.

before      state buffer element = 0.0
            %0 = load param : real element
            %1 = load buffer : real element
            %2 = neg %1 : real element
            store param %0
            store buffer %1
after       state buffer element = 0.0
            %0 = load param : real element
            store param %0

States and hyper-parameters stay declared. ``param`` is stored even if it did not change: its low-precision copy is
written with it.
"""

from shardstep.rules.ir import Builder, Program


def drop_dead(program: Program) -> Program:
    """Keep what the stores need."""
    stores = [(name, value) for name, value in program.stores if not _is_as_it_was(program, name, value)]
    alive = reachable(program, [value for _, value in stores])
    return renumbered(program, alive, stores)


def reachable(program: Program, values: list[int]) -> list[int]:
    """The numbers of ``values`` and of all that they are made of, in order."""
    found: set[int] = set()
    stack = list(values)
    while stack:
        number = stack.pop()
        if number not in found:
            found.add(number)
            stack += program.instructions[number].arguments
    return sorted(found)


def renumbered(program: Program, alive: list[int], stores: list[tuple[str, int]]) -> Program:
    """The program of these instructions and stores only."""
    numbers = {old: new for new, old in enumerate(alive)}
    builder = Builder(program.shapes)
    for line in map(program.instructions.__getitem__, alive):
        builder.copy(line, tuple([numbers[argument] for argument in line.arguments]))
    return program.with_instructions(builder.instructions, [(name, numbers[value]) for name, value in stores])


def _is_as_it_was(program: Program, name: str, value: int) -> bool:
    line = program.instructions[value]
    return name != "param" and line.operation == "load" and line.attributes == (name,)
