"""Which part of a program with matrix products each value belongs to: head, middle or tail (see `ir.steps`).

The middle is what lies between products, and what has another extent than the elements, states of square matrices
among it. A value that no product is made of and that is made of none runs as late as its users allow, so that it need
not be kept. What the middle is made of, and what it makes, is computed on the side where fewer bytes travel.

Values that are *free* belong to no part: each pass that needs one computes it again. They are the truth values and
words, which no array can hold, and outside the middle what is made of the gradient alone, such as its scaled form (but
not with numbers that only the middle knows).
"""

from dataclasses import astuple, dataclass
from typing import Final

from shardstep.rules.ir import OPERATIONS, SQUARE, Program

HEAD, MIDDLE, TAIL = 0, 1, 2

_REAL_BYTES, _NARROW_BYTES = 4, 2
_SUMS: Final = ("sum", "max")


@dataclass(frozen=True)
class Factors:
    """``alpha`` · ``left`` @ ``right`` + ``beta`` · ``addend``, by number; ``alpha`` and ``beta`` are the host's."""

    left: int
    right: int
    addend: int | None = None
    alpha: int | None = None
    beta: int | None = None


class Parts:
    """``products``: what each value that is one is the product of; ``turns``, ``units``: transposes and identities that
    are needed in memory. ``home``: value -> its part; none for the host's, for what is free, and for what is loaded and
    not sent to the middle. ``sums``: (part, reduction): some twice.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.lines = program.instructions
        self._count = len(self.lines)
        self.users: list[list[int]] = [[] for _ in self.lines]
        for number, line in enumerate(self.lines):
            for argument in line.arguments:
                self.users[argument].append(number)
        self.hosted = self._find_hosted()
        self._merged: set[int] = set()
        self.products = self._find_products()
        self.turns = {n for n in range(self._count) if self._is_turn(n)}
        self.units = {n for n in range(self._count) if self.lines[n].operation == "identity"}
        self.made_of = [self._arguments(number) for number in range(self._count)]
        self.users = [[] for _ in self.lines]
        for number, arguments in enumerate(self.made_of):
            for argument in arguments:
                self.users[argument].append(number)
        self._below = [False] * self._count
        self._of_gradient = self._find_of_gradient()
        self.middle = self._find_middle()
        self.home: dict[int, int] = {}
        self.sums: set[tuple[int, int]] = set()
        self._assign()

    # - what values are

    def is_narrow(self, number: int) -> bool:
        """Whether bfloat16 holds the value exactly."""
        return self.lines[number].operation == "bfloat16"

    def is_load(self, number: int) -> bool:
        return self.lines[number].operation == "load"

    def is_square_state(self, number: int) -> bool:
        """Whether the value is read from an array that is stored where the middle runs."""
        return self.is_load(number) and self.lines[number].type.shape in SQUARE

    def is_whole(self, number: int) -> bool:
        """Whether it is made by a step of its own, and not by a pass."""
        return number in self.products or number in self.turns or number in self.units

    def is_sum(self, number: int) -> bool:
        return self.lines[number].operation in _SUMS

    def is_free(self, number: int, part: int) -> bool:
        """Whether a pass of this part computes it for itself."""
        line = self.lines[number]
        if self.hosted[number] or self.is_whole(number) or self.is_load(number):
            return False
        of_gradient = part != MIDDLE and self._of_gradient[number] and number not in self.middle
        return line.type.is_single or line.type.kind != "real" or of_gradient

    def base(self, number: int) -> tuple[int, bool]:
        """The value that transposes lead back to, and whether it is transposed."""
        turned = False
        while self.lines[number].operation == "transpose":
            number, turned = self.lines[number].arguments[0], not turned
        return number, turned

    def _find_products(self) -> dict[int, Factors]:
        """``bfloat16(x @ y)`` and ``bfloat16(b * z + a * (x @ y))`` of narrow values are one product each."""
        found: dict[int, Factors] = {}
        for number, line in enumerate(self.lines):
            if self.is_narrow(number) and (factors := self._rounded_product(number, line.arguments[0])) is not None:
                found[number] = factors
        for number, line in enumerate(self.lines):
            if line.operation == "matmul" and number not in self._merged:
                found[number] = Factors(*line.arguments)
        return found

    def _rounded_product(self, number: int, inner: int) -> Factors | None:
        if self._is_narrow_product(inner, number):
            self._merged.add(inner)
            left, right = self.lines[inner].arguments
            return Factors(left, right)
        if self.lines[inner].operation != "add" or self.users[inner] != [number]:
            return None
        for one, other in (self.lines[inner].arguments, self.lines[inner].arguments[::-1]):
            (alpha, product), (beta, addend) = self._scaled(one), self._scaled(other)
            chain = {inner, one, product}
            alone = self.users[one] == [inner] and self._is_narrow_product(product, inner if alpha is None else one)
            if alone and self.is_narrow(addend):
                used = self.users[other] == [inner]
                self._merged |= chain | ({other} if used and beta is not None else set())
                left, right = self.lines[product].arguments
                return Factors(left, right, addend, alpha, beta)
        return None

    def _is_narrow_product(self, number: int, user: int) -> bool:
        line = self.lines[number]
        narrow = all(self.is_narrow(self.base(argument)[0]) for argument in line.arguments)
        return line.operation == "matmul" and self.users[number] == [user] and narrow

    def _scaled(self, number: int) -> tuple[int | None, int]:
        """(a, x) of a * x with a number a that the host knows; else (None, the value)."""
        line = self.lines[number]
        for scale, value in (line.arguments, line.arguments[::-1]) if line.operation == "mul" else ():
            if self.hosted[scale] and not self.hosted[value]:
                return scale, value
        return None, number

    def _is_turn(self, number: int) -> bool:
        """A transpose that is needed in memory: not by products alone."""
        line = self.lines[number]
        if line.operation != "transpose" or not self.base(number)[1]:
            return False
        others = [user for user in self.users[number] if self.lines[user].operation not in ("matmul", "transpose")]
        return bool(others) or any(value == number for _, value in self.program.stores)

    def _find_hosted(self) -> list[bool]:
        """One number for all, and not made of words: the host computes it."""
        hosted: list[bool] = []
        for number, line in enumerate(self.lines):
            made_there = self.is_sum(number) or all(hosted[argument] for argument in line.arguments)
            hosted.append(line.type.is_single and line.type.kind != "word" and made_there)
        return hosted

    def _arguments(self, number: int) -> tuple[int, ...]:
        """What a value is made of, transposes resolved."""
        if number in self.products:
            left, right, *others = astuple(self.products[number])
            return (self.base(left)[0], self.base(right)[0], *(other for other in others if other is not None))
        if number in self.turns:
            return (self.base(number)[0],)
        if self._is_gone(number) or number in self.units:
            return ()
        return tuple(a if a in self.turns else self.base(a)[0] for a in self.lines[number].arguments)

    def _is_gone(self, number: int) -> bool:
        """Whether a value goes by another name: a transpose, or a part of a product."""
        kept = number in self.products or number in self.turns
        return not kept and (self.lines[number].operation == "transpose" or number in self._merged)

    def _find_of_gradient(self) -> list[bool]:
        found: list[bool] = []
        for number, line in enumerate(self.lines):
            arguments = [a for a in self.made_of[number] if not self.hosted[a]]
            made = bool(arguments) and all(found[a] or self.lines[a].attributes == ("grad",) for a in arguments)
            found.append(made and OPERATIONS[line.operation].family == "pointwise" and number not in self.products)
        return found

    # - the middle

    def _find_middle(self) -> set[int]:
        core = {*self.products, *self.turns, *self.units}
        for number, line in enumerate(self.lines):
            shapes = [line.type.shape, *(self.lines[a].type.shape for a in self.made_of[number])]
            if not self._is_gone(number) and {"rr", "cc", "cr"} & set(shapes):
                core.add(number)
        while True:
            inner = self._between(core)
            scalars = self._scalars_of(inner)
            outside = {
                n
                for n in range(self._count)
                if n not in inner and not self.hosted[n] and any(a in scalars for a in self.made_of[n])
            }
            if not outside:
                inner |= self._followed(inner, scalars)
                return inner | self._led(inner)
            core |= outside

    def _between(self, core: set[int]) -> set[int]:
        """``core``, and what is made of it and used for it."""
        self._below = [False] * self._count
        above = [False] * self._count
        for number, arguments in enumerate(self.made_of):
            self._below[number] = number in core or any(self._below[a] for a in arguments)
        for number in reversed(range(self._count)):
            above[number] = number in core or any(above[user] for user in self.users[number])
        return core | {n for n in range(self._count) if self._below[n] and above[n]}

    def _scalars_of(self, inner: set[int]) -> set[int]:
        """The host's values that are made of sums in the middle."""
        found: set[int] = set()
        for number in range(self._count):
            if self.hosted[number]:
                inside = self.is_sum(number) and number in inner
                if inside or (not self.is_sum(number) and any(a in found for a in self.made_of[number])):
                    found.add(number)
        return found

    def _followed(self, inner: set[int], scalars: set[int]) -> set[int]:
        """What is made of the middle's values alone, as far as it is smaller than they are."""
        summed = self._made_of_sums(scalars)
        followed: set[int] = set()
        for number, arguments in enumerate(self.made_of):
            arrays = self._arrays(number)
            inside = bool(arrays) and all(a in inner or a in followed for a in arrays)
            if inside and number not in inner and not self.hosted[number] and not any(summed[a] for a in arguments):
                followed.add(number)
        for number in sorted(followed, reverse=True):
            if any(user in inner or user in followed for user in self.users[number]):
                continue
            more = [a for a in self._arrays(number) if all(u in inner or u in followed for u in self.users[a])]
            if self.lines[number].type.kind != "real" or sum(map(self._bytes, more)) <= self._bytes(number):
                followed.discard(number)
        return followed

    def _led(self, inner: set[int]) -> set[int]:
        """What only the middle uses and is larger than what it is made of, as far as that is not there anyway."""
        summed, led = self._made_of_sums(set()), set[int]()
        for number in reversed(range(self._count)):
            arrays, users = self._arrays(number), self.users[number]
            if not arrays or not users or self.hosted[number] or number in inner or self._below[number]:
                continue
            if not all(u in inner or u in led for u in users) or any(summed[a] for a in self.made_of[number]):
                continue
            more = [a for a in arrays if not any(u in inner or u in led for u in self.users[a])]
            if sum(map(self._bytes, more)) < self._bytes(number):
                led.add(number)
        return led

    def _arrays(self, number: int) -> set[int]:
        return {a for a in self.made_of[number] if not self.hosted[a]}

    def _made_of_sums(self, but: set[int]) -> list[bool]:
        """Which of the host's values depend on a reduction, those in ``but`` left out."""
        summed: list[bool] = []
        for number, arguments in enumerate(self.made_of):
            own = self.is_sum(number) and number not in but
            summed.append(self.hosted[number] and (own or any(summed[a] for a in arguments)))
        return summed

    def _bytes(self, number: int) -> int:
        return _NARROW_BYTES if self.is_narrow(number) else _REAL_BYTES

    # - the parts

    def _assign(self) -> None:
        """From the last value to the first: each goes where its users are."""
        wanted: list[set[int]] = [set() for _ in self.lines]
        stored = {value for _, value in self.program.stores}
        for number in reversed(range(self._count)):
            parts = wanted[number]
            if self.hosted[number]:
                parts |= {TAIL} if number in stored else set()
                parts = self._parts_of_sum(number, parts) if self.is_sum(number) else parts
                self.sums |= {(part, number) for part in parts if self.is_sum(number)}
            elif any(self.is_free(number, part) for part in parts) or self.is_free(number, TAIL):
                parts |= {TAIL} if number in stored and not parts else set()
                kept = {part for part in parts if not self.is_free(number, part)}
                if kept:  # of the gradient alone, and needed in the middle
                    self.home[number] = HEAD
                    parts = (parts - kept) | {HEAD}
            elif self.is_load(number):
                self.home |= {number: MIDDLE if self.is_square_state(number) else HEAD} if MIDDLE in parts else {}
            else:
                parts = {self._home(number, parts)}
                self.home[number] = next(iter(parts))
            for argument in self.made_of[number]:
                wanted[argument] |= parts

    def _home(self, number: int, wanted: set[int]) -> int:
        if number in self.middle:
            return MIDDLE
        return TAIL if self._below[number] or wanted == {TAIL} else HEAD

    def _parts_of_sum(self, number: int, wanted: set[int]) -> set[int]:
        """The middle makes for itself what it needs, since its scalars do not travel."""
        if number in self.middle:
            return {MIDDLE}
        if self._below[number]:
            return {TAIL}
        return wanted - {TAIL} if HEAD in wanted else wanted
