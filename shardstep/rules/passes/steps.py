"""Steps: a program with matrix products becomes passes over memory and products, in three parts (see `ir.steps`).

before      %0 = load grad : real element              head     %0 = load grad : real element
            %1 = bfloat16 %0 : real element                     store b1 %0                        b1: bfloat16
            %2 = transpose %1 : real cr                middle   b4 = b1 @ b1 transposed, in bfloat16
            %3 = matmul %1 %2 : real rr                         b5 = b4 @ b1
            %4 = bfloat16 %3 : real rr                 tail     %0 = load param : real element
            %5 = matmul %4 %1 : real element                    %1 = load b5 : real element
            %6 = load param : real element                      %2 = sub %0 %1 : real element
            %7 = sub %6 %5 : real element                       store param %2
            store param %7

In each part values have a level: how many products and sums, one after the other, they wait for. All of one level and
one extent are one pass; it runs as late as its users allow. A value that a product or a later pass needs is kept in a
buffer. An array is stored as soon as its new value is there and nobody reads the old one any more; one of square
matrices by the middle, which reads it where it is.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from shardstep.errors import RuleError
from shardstep.rules.ir import (
    SQUARE,
    Buffer,
    Builder,
    Hyper,
    Phase,
    Product,
    Program,
    Shape,
    State,
    Step,
    Steps,
    Sweep,
    Turn,
    Unit,
)
from shardstep.rules.passes.dead import drop_dead
from shardstep.rules.passes.parts import HEAD, MIDDLE, TAIL, Parts
from shardstep.rules.passes.split import carried, carry
from shardstep.rules.scalars.wording import where

_EXTENTS: Final[tuple[Shape, ...]] = ("element", "rr", "cc", "cr")

Site = tuple[int, int]
"""A part, and a level in it."""


def split_steps(program: Program) -> Steps:
    """Cut a program without ``choose`` into steps. Raises RuleError for row and column values, and their states."""
    program = drop_dead(program)
    _refuse_other_shapes(program)
    return _Cutter(Parts(program)).steps()


def _refuse_other_shapes(program: Program) -> None:
    for line in program.instructions:
        kept = line.operation == "load" and line.type.shape not in ("element", *SQUARE)
        if kept or line.type.shape in ("row", "column"):
            raise RuleError(
                f"{where(program, line)}: expected values of elements, matrices and tensors beside matrix products, "
                f"got {line.operation} ({line.type}); such rules run on the reference back end, unsharded"
            )


class _Cutter:
    def __init__(self, parts: Parts) -> None:
        self._parts, self._program, self._lines = parts, parts.program, parts.lines
        self._available: dict[tuple[int, int], int] = {}
        self._level: dict[int, int] = {}
        self._kept: set[int] = {number for number in range(len(self._lines)) if parts.is_whole(number)}
        self._stores: list[tuple[Site, str, int]] = []
        self._prefix = "b"
        while any(name.startswith(self._prefix) for name in self._program.shapes):
            self._prefix += "_"

    def steps(self) -> Steps:
        self._find_available()
        self._find_levels()
        self._place_stores()
        self._keep_what_is_read_elsewhere()
        self._carrying, self._carriers = carry(self._program, self._parts.hosted)
        head, middle, tail = (tuple(self._part(part)) for part in (HEAD, MIDDLE, TAIL))
        buffers = {number: self._buffer(number) for number in sorted(self._kept)}
        inward, outward = self._read_in(middle, HEAD), self._read_in((*head, *tail), MIDDLE)
        return Steps(self._carrying, buffers, head, middle, tail, inward, outward)

    def _read_in(self, steps: Iterable[Step], home: int) -> tuple[int, ...]:
        touched = {buffer for step in steps for buffer in step.buffers}
        return tuple(number for number in sorted(touched) if self._home(number) == home)

    def _buffer(self, number: int) -> Buffer:
        return Buffer(self._name(number), self._lines[number].type.shape, self._parts.is_narrow(number))

    def _name(self, number: int) -> str:
        return f"{self._prefix}{number}"

    def _home(self, number: int) -> int | None:
        return self._parts.home.get(number)

    # - levels

    def _find_available(self) -> None:
        """The first level at which each value is there, in its part; a sum's in each of its parts."""
        for number, arguments in enumerate(self._parts.made_of):
            parts = [part for part in (HEAD, MIDDLE, TAIL) if (part, number) in self._parts.sums]
            if (home := self._home(number)) is not None:
                parts = [home]
            waits = self._parts.is_sum(number) or self._parts.is_whole(number)
            for part in parts:
                first = max((self._there(part, argument) for argument in arguments), default=0)
                self._available[part, number] = first + waits

    def _there(self, part: int, number: int) -> int:
        """The first level of ``part`` that can use a value."""
        if (part, number) in self._available:
            return self._available[part, number]
        if self._parts.is_sum(number) or not (self._parts.hosted[number] or self._parts.is_free(number, part)):
            return 0
        return max((self._there(part, argument) for argument in self._parts.made_of[number]), default=0)

    def _find_levels(self) -> None:
        """The level at which each pointwise value is computed: the first at which it is used in its part."""
        for number in reversed(range(len(self._lines))):
            if (home := self._home(number)) is None or number in self._kept:
                continue
            used = [self._level_in(home, user) for user in self._users(number, home)]
            loaded = self._parts.is_load(number)
            self._level[number] = 0 if loaded else min(used, default=self._available[home, number])

    def _users(self, number: int, part: int) -> Iterator[int]:
        """Those in ``part`` that need a value, also by way of what is free."""
        for user in self._parts.users[number]:
            if self._parts.is_free(user, part):
                yield from self._users(user, part)
            if self._home(user) == part or (part, user) in self._parts.sums:
                yield user

    def _level_in(self, part: int, number: int) -> int:
        """The level at which an instruction is computed; products and sums, that which they wait for."""
        return self._level[number] if number in self._level else self._available[part, number] - 1

    def _sites(self, number: int) -> Iterator[Site]:
        """Where an instruction is computed."""
        for part in (HEAD, MIDDLE, TAIL):
            if self._home(number) == part or (part, number) in self._parts.sums:
                yield part, self._level_in(part, number)

    # - what is read, stored and kept

    def _needs(self, number: int, part: int) -> Iterator[int]:
        """The values that an instruction reads from memory or from its own pass: what is free in between is skipped."""
        for argument in self._parts.made_of[number]:
            if self._parts.is_free(argument, part):
                yield from self._needs(argument, part)
            elif not self._parts.hosted[argument]:
                yield argument

    def _reads(self) -> Iterator[tuple[Site, int, int]]:
        """(site, instruction, value that it needs there)."""
        for number in range(len(self._lines)):
            for site in self._sites(number):
                for value in self._needs(number, site[0]):
                    yield site, number, value
        for site, _, value in self._stores:
            if self._parts.is_free(value, site[0]):
                yield from ((site, -1, needed) for needed in self._needs(value, site[0]))
            elif not self._parts.hosted[value]:
                yield site, -1, value

    def _place_stores(self) -> None:
        """Each new value is stored when it is there and the old one was last read; storing may itself be a reading."""
        places: dict[str, Site] = {}
        values = dict(self._program.stores)
        for name, value in values.items():
            home, part = self._home(value), MIDDLE if self._is_square(name) else TAIL
            places[name] = (part, self._there(part, value))
            if home == HEAD or (home == part and value not in self._kept):
                places[name] = next(self._sites(value))
        for _ in range(len(values) + 1):
            self._stores = [(places[name], name, value) for name, value in values.items()]
            for site, _, value in self._reads():
                name = str(self._lines[value].attributes[0]) if self._parts.is_load(value) else ""
                if name in places and (site[0] == MIDDLE) == self._is_square(name):
                    places[name] = max(places[name], site)

    def _is_square(self, name: str) -> bool:
        """Whether the middle reads and writes an array where it is stored; of others it is given the values."""
        return self._program.shapes[name] in SQUARE

    def _keep_what_is_read_elsewhere(self) -> None:
        for site, number, value in self._reads():
            by_itself = number >= 0 and self._parts.is_whole(number)
            if self._parts.is_square_state(value):
                kept = by_itself
            elif self._parts.is_load(value):
                kept = site[0] == MIDDLE
            else:
                kept = by_itself or (self._home(value), self._level.get(value)) != site
            if kept:
                self._kept.add(value)

    # - steps

    def _part(self, part: int) -> Iterator[Step]:
        """The passes of each level, then the products that they make possible."""
        sites = {site for site, _, _ in self._stores}
        sites |= {site for number in range(len(self._lines)) for site in self._sites(number)}
        for level in sorted(level for home, level in sites if home == part):
            for extent in _EXTENTS:
                sweep = self._sweep((part, level), extent)
                if sweep is not None:
                    yield sweep
            for number in range(len(self._lines)):
                if self._home(number) == part and self._available[part, number] == level + 1:
                    yield from self._whole(number)

    def _whole(self, number: int) -> Iterator[Step]:
        if number in self._parts.units:
            yield Unit(number)
        elif number in self._parts.turns:
            yield Turn(self._parts.base(number)[0], number)
        elif number in self._parts.products:
            factors = self._parts.products[number]
            (left, left_turned), (right, right_turned) = map(self._parts.base, (factors.left, factors.right))
            yield Product(left, left_turned, right, right_turned, number, factors.addend, factors.alpha, factors.beta)

    def _sweep(self, site: Site, extent: Shape) -> Sweep | None:
        """The pass that keeps values, makes sums and stores arrays at ``site``."""
        part, level = site
        kept = [n for n in sorted(self._kept) if self._home(n) == part and self._level.get(n) == level]
        sums = [n for p, n in sorted(self._parts.sums) if p == part and self._available[p, n] == level + 1]
        kept = [n for n in kept if self._lines[n].type.shape == extent]
        sums = [n for n in sums if self._lines[self._lines[n].arguments[0]].type.shape == extent]
        stores = [(n, value) for at, n, value in self._stores if at == site and self._program.shapes[n] == extent]
        if not kept and not sums and not stores:
            return None
        return self._pass(site, extent, kept, sums, stores)

    def _pass(
        self, site: Site, extent: Shape, kept: list[int], sums: list[int], stores: list[tuple[str, int]]
    ) -> Sweep:
        written = [(self._name(n), self._unrounded(n)) for n in kept] + stores
        builder = Builder(dict.fromkeys([*self._program.shapes, *map(self._name, self._kept)], "element"))
        numbers: dict[int, int] = {}
        scalars: list[int] = []
        buffers = set(kept)
        summed = [self._parts.made_of[n][0] for n in sums]
        for old in self._inside(site, summed + [value for _, value in written]):
            line = self._lines[old]
            if self._is_read(site, old):
                numbers[old] = builder.load(self._name(old), line.place)
                buffers.add(old)
            elif self._parts.hosted[old] and line.operation != "const":
                numbers[old] = carried(builder, line, builder.hyper(f"s{len(scalars)}", place=line.place))
                scalars.append(self._carriers.get(old, old))
            elif self._parts.is_load(old):
                numbers[old] = builder.load(str(line.attributes[0]), line.place)
            else:
                numbers[old] = builder.copy(line, tuple(numbers[a] for a in self._parts.made_of[old]))
        made = [builder.emit(self._lines[n].operation, numbers[of]) for n, of in zip(sums, summed, strict=True)]
        hypers = tuple(Hyper(f"s{i}") for i in range(len(scalars)))
        instructions, new = tuple(builder.instructions), tuple((name, numbers[value]) for name, value in written)
        states = [*self._program.shapes][2:] + [self._name(n) for n in sorted(buffers)]
        body = Program(self._program.name, tuple(map(State, states)), hypers, instructions, new)
        return Sweep(extent, Phase(body, tuple(scalars), tuple(zip(made, sums, strict=True))), tuple(sorted(buffers)))

    def _unrounded(self, number: int) -> int:
        """What is stored for a kept value: storing rounds by itself what a narrow buffer keeps."""
        return self._lines[number].arguments[0] if self._parts.is_narrow(number) else number

    def _inside(self, site: Site, seeds: list[int]) -> list[int]:
        """What the pass at ``site`` computes or loads for ``seeds``, in order."""
        found: set[int] = set()
        stack = list(seeds)
        while stack:
            number = stack.pop()
            if number not in found:
                found.add(number)
                leaf = self._parts.hosted[number] or self._is_read(site, number)
                stack += () if leaf else self._parts.made_of[number]
        return sorted(found)

    def _is_read(self, site: Site, number: int) -> bool:
        """Whether the pass at ``site`` finds a value in a buffer."""
        if self._parts.is_load(number):
            return site[0] == MIDDLE and not self._parts.is_square_state(number)
        elsewhere = (self._home(number), self._level.get(number)) != site
        return number in self._kept and elsewhere and not self._parts.is_free(number, site[0])
