"""Random well-typed programs and difficult arrays, to compare back ends with the interpreter.

Every program here is a whole program and, by `phase_of`, also the body of a phase.
"""

import math
import random

import numpy as np
import torch
from hypothesis import strategies as st

from shardstep.rules import ir

ELEMENTARY = ("exp", "log", "tanh", "rsqrt", "pow")
SCALARS = ("s0", "s1", "s2")
CONSTANTS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.0, 0.1, 1e-8, 1e-40, 1e30, 6e38, 1e300, math.inf, -math.inf, math.pi)
HOSTED = tuple(
    "again again again sum sum max numel choose choose lt eq add sub mul div pow exp log sqrt minimum fma where".split()
)
OF_LINES = ("row", "column", "tensor")
LINES = tuple(
    "row_sum row_sum column_sum column_sum row_max column_max sum max add sub mul div fma minimum sqrt exp log".split()
)
WORDS = (0, 1, 0x7F, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0x9E37_79B1)


def random_program(
    rng: random.Random,
    *,
    length: int = 16,
    elementary: bool = False,
    words: bool = True,
    reductions: bool = False,
    hosted: bool = False,
    lines: bool = False,
) -> ir.Program:
    """A program of about ``length`` operations on elements; its bits are fixed, as it never asks for those of a NaN.

    With ``elementary`` it has the operations that `passes.elementary` replaces; with ``reductions``, at its end, sums
    and maxima that it does not use itself. With ``hosted`` it is no phase: it has branches, work for the host, and
    sums and maxima that it uses. With ``lines`` too: rows and columns.
    """
    states = tuple(ir.State(name) for name in ("exp_avg", "exp_avg_sq")[: rng.randrange(3)])
    states += tuple(ir.State(shape, shape) for shape in OF_LINES) if lines else ()
    program = ir.Program("random", states, tuple(map(ir.Hyper, SCALARS)), (), ())
    grow = _Growing(rng, program, words)
    names = [name for name, operation in ir.OPERATIONS.items() if operation.family == "pointwise" and name != "choose"]
    names = [name for name in names if elementary or name not in ELEMENTARY]
    names = [name for name in names if words or "word" not in (*ir.OPERATIONS[name].takes, ir.OPERATIONS[name].gives)]
    for _ in range(length):
        if lines and rng.random() < 0.4:
            grow.line_operation(rng.choice(LINES))
        elif hosted and rng.random() < 0.5:
            grow.hosted_operation(rng.choice(HOSTED))
        else:
            grow.operation(rng.choice(names))
    shapes = program.shapes.items()
    stores = [
        (name, grow.some("real", element=True)) for name, shape in shapes if shape == "element" and name != "grad"
    ]
    stores += [(name, grow.of_line(shape)) for name, shape in shapes if shape != "element"]
    if reductions:
        for _ in range(rng.randrange(1, 4)):
            grow.build.emit(rng.choice(("sum", "max")), grow.some("real", element=True))
    return ir.verify(program.with_instructions(grow.build.instructions, stores))


@st.composite
def programs(draw, **options):
    """A hypothesis strategy; ``options`` are those of `random_program`."""
    return random_program(draw(st.randoms(use_true_random=False)), length=draw(st.integers(1, 24)), **options)


def phase_of(program: ir.Program) -> ir.Phase:
    """The program as a phase by itself. The entry of ``scalars`` for s0 is 0, and so on."""
    lines = enumerate(program.instructions)
    sums = tuple((number, number) for number, line in lines if ir.OPERATIONS[line.operation].family == "reduction")
    return ir.Phase(program, tuple(range(len(SCALARS))), sums)


def random_arrays(program: ir.Program, numel: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """param, grad and the states: numbers of all magnitudes among which zeros, denormals, infinities and NaN lie."""
    return {name: random_array(numel, dtype, 10 * seed + i) for i, name in enumerate(program.shapes)}


def random_array(numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Of any floating dtype."""
    rng = np.random.default_rng(seed)
    info = torch.finfo(dtype)
    values = torch.from_numpy(rng.standard_normal(numel) * 10.0 ** rng.integers(-9, 5, numel)).to(dtype)
    specials = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny]
    specials += [-info.tiny, info.tiny / 4, -info.tiny / 3, info.smallest_normal * info.eps, 1 + info.eps, -info.eps]
    places = torch.from_numpy(rng.random(numel) < 0.25)
    chosen = torch.tensor(specials, dtype=torch.float64).to(dtype)[torch.from_numpy(rng.integers(0, 18, numel))]
    return torch.where(places, chosen, values)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal bit for bit, except that one NaN is as good as another."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    return bool(((got.view(words) == want.view(words)) | (got.isnan() & want.isnan())).all())


class _Growing:
    """A program under construction: every operation has an element among its operands."""

    def __init__(self, rng: random.Random, program: ir.Program, words: bool) -> None:
        self.build = ir.Builder(program.shapes)
        self._rng = rng
        for name in program.shapes:
            self.build.load(name)
        for name in SCALARS:
            self.build.hyper(name)
        for value in rng.sample(CONSTANTS, 4):
            self.build.constant(value)
        self.build.constant(rng.random() < 0.5, "bool")
        if words:
            self.build.constant(rng.choice(WORDS), "word")
            self.build.emit("index")
        self.build.emit("lt", 0, 1)

    def some(self, kind: str, *, element: bool) -> int:
        lines = list(enumerate(self.build.instructions))
        fitting = [n for n, t in lines if t.type.kind == kind and (t.type.shape == "element" or not element)]
        return self._rng.choice(fitting[-8:] if self._rng.random() < 0.6 else fitting)

    def operation(self, name: str) -> None:
        takes = ir.OPERATIONS[name].takes
        element = self._rng.randrange(len(takes))
        arguments = [self.some(kind, element=i == element) for i, kind in enumerate(takes)]
        if name == "bits":
            number = self.build.emit("eq", arguments[0], arguments[0])
            arguments = [self.build.emit("where", number, arguments[0], self.build.constant(1.0))]
        shift = (self._rng.randrange(32),) if ir.OPERATIONS[name].attributes else ()
        self.build.emit(name, *arguments, attributes=shift)

    def hosted_operation(self, name: str) -> None:
        """A branch, or what is one number for a step or for a tensor."""
        if name == "again":
            return self._once_more()
        takes = ir.OPERATIONS[name].takes
        if name in ("sum", "max"):
            total = self.build.emit(name, self.some("real", element=True))
            self.build.emit("minimum", self.some("real", element=True), total)  # or hardly any would be needed
        elif name == "choose":
            # One branch of elements makes both so: else another branch would make other roundings of what follows.
            shape = self._rng.choice(("element", "uniform"))
            self.build.emit(name, self._of("bool", "uniform"), self._of("real", shape), self._of("real", shape))
        else:
            shape = self._rng.choice(("tensor", "uniform"))
            self.build.emit(name, *(self._of(kind, shape if i == 0 else "uniform") for i, kind in enumerate(takes)))

    def line_operation(self, name: str) -> None:
        """One value for each row or column."""
        takes, family = ir.OPERATIONS[name].takes, ir.OPERATIONS[name].family
        if family == "pointwise":
            shape = self._rng.choice(("row", "column"))
            self.build.emit(name, *(self.of_line(shape if i == 0 else "tensor") for i in range(len(takes))))
        elif name in ("sum", "max"):
            self.build.emit(name, self.of_line(self._rng.choice(("row", "column")), only=True))
        else:
            value = self.some("real", element=True)
            if self._rng.random() < 0.2 and name != "row_max":
                value = self.of_line("column" if name.startswith("row") else "row", only=True)
            self.build.emit(name, value)

    def of_line(self, shape: str, *, only: bool = False) -> int:
        """A number for each row or column, or, unless ``only``, for the tensor or the step."""
        shapes = (shape, "tensor", "uniform") if self._rng.random() < 0.1 and not only else (shape,)
        lines = list(enumerate(self.build.instructions))
        fitting = [n for n, line in lines if line.type.kind == "real" and line.type.shape in shapes]
        return self._rng.choice(fitting[-4:])

    def _once_more(self) -> None:
        """What the passes look for: a constant for an operand, or the operands of an operation in the other order."""
        element = self.some("real", element=True)
        constant = self.build.constant(self._rng.choice(CONSTANTS))
        name = self._rng.choice(("add", "sub", "mul", "div", "minimum"))
        first = self.build.emit(name, element, self._rng.choice((constant, self.some("real", element=False))))
        second = self.build.emit(name, *reversed(self.build.instructions[first].arguments))
        self.build.emit("where", self.some("bool", element=True), first, second)

    def _of(self, kind: str, shape: str) -> int:
        """A value of this shape; a uniform one if there is none."""
        lines = list(enumerate(self.build.instructions))
        for wanted in (shape, "uniform"):
            if fitting := [n for n, line in lines if line.type == ir.Type(kind, wanted)]:
                return self._rng.choice(fitting)
        raise AssertionError(kind)
