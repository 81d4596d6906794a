"""A program with matrix products, cut into what runs on parts of a tensor and what needs it whole.

    head      passes over the elements that a rank has        what products are made of goes to the tensor's owner
    middle    passes and products over whole matrices         what comes of it goes back
    tail      passes over the elements that a rank has

So arrays stay where they are stored, and only the values between the steps travel; states of square matrices are
stored at the owner, and the middle reads and writes them. Where tensors are whole anyway the three follow one another,
and nothing travels. Pure data.
"""

from dataclasses import dataclass

from shardstep.rules.ir.operations import Shape
from shardstep.rules.ir.phase import Phase
from shardstep.rules.ir.program import Program


@dataclass(frozen=True)
class Buffer:
    """Memory for a value between steps. ``name``: what phases call it; ``extent``: element, rr, cc or cr.

    ``narrow``: in bfloat16, which holds its values exactly; else in the compute dtype.
    """

    name: str
    extent: Shape
    narrow: bool


@dataclass(frozen=True)
class Sweep:
    """One pass over all elements of a matrix of ``extent``. To its phase everything is flat: the rule's arrays of this
    shape, and ``buffers``, by number.
    """

    extent: Shape
    phase: Phase
    buffers: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """``result`` = ``left`` @ ``right``, buffers by number; the flags say which are transposed on the way.

    In bfloat16 where the result is narrow: then all are. There may be an ``addend``: the result is then
    ``alpha`` · ``left`` @ ``right`` + ``beta`` · ``addend``, with the host's values of these numbers, or 1 where None.
    """

    left: int
    left_turned: bool
    right: int
    right_turned: bool
    result: int
    addend: int | None = None
    alpha: int | None = None
    beta: int | None = None

    @property
    def buffers(self) -> tuple[int, ...]:
        factors = (self.left, self.right, self.result)
        return factors if self.addend is None else (*factors, self.addend)

    @property
    def turned(self) -> tuple[bool, ...]:
        """Which of the buffers are transposed on the way."""
        return (self.left_turned, self.right_turned, *(False,) * (len(self.buffers) - 2))


@dataclass(frozen=True)
class Turn:
    """``result`` is ``source`` transposed, in memory of its own."""

    source: int
    result: int

    @property
    def buffers(self) -> tuple[int, ...]:
        return (self.source, self.result)

    @property
    def turned(self) -> tuple[bool, ...]:
        return (True, False)


@dataclass(frozen=True)
class Unit:
    """``result`` is the identity matrix."""

    result: int

    @property
    def buffers(self) -> tuple[int, ...]:
        return (self.result,)

    @property
    def turned(self) -> tuple[bool, ...]:
        return (False,)


Step = Sweep | Product | Turn | Unit


@dataclass(frozen=True)
class Steps:
    """``program``: the whole, after all passes; its uniform and tensor instructions are the host's work.

    ``inward``: the buffers that the middle is given; ``outward``: those that it gives back. All are of extent element.
    """

    program: Program
    buffers: dict[int, Buffer]
    head: tuple[Step, ...]
    middle: tuple[Step, ...]
    tail: tuple[Step, ...]
    inward: tuple[int, ...]
    outward: tuple[int, ...]

    @property
    def all(self) -> tuple[Step, ...]:
        return (*self.head, *self.middle, *self.tail)
