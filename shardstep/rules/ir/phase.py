"""A program cut into passes over memory: what a back end compiles.

Between phases the host computes: what is one number for all, for a tensor, a row or a column never appears in a phase
but as its scalars and vectors.
"""

from dataclasses import dataclass
from functools import cached_property

from shardstep.rules.ir.operations import Shape
from shardstep.rules.ir.program import Instruction, Program


@dataclass(frozen=True)
class Vector:
    """The (real, row or column) instruction of the whole program that a vector is.

    ``anchors``: its float64 anchors are meant (see `backends.blocks`), for a sum of as many terms as a line has.
    """

    number: int
    shape: Shape
    anchors: bool = False


@dataclass(frozen=True)
class Phase:
    """One pass over the elements of a tensor, each array read once and written once.

    ``body``: a program whose instructions are loads, constants, pointwise operations on elements, reductions at the
    end, ``hyper s0``, ``hyper s1``, …: its scalars, and ``hyper v0``, …: its vectors, all of kind real. A total takes
    anchors in the place of the largest magnitudes.
    ``scalars``: for each of them the number of the (real, uniform or tensor) instruction of the whole program that it
    is. ``sums``: (number of a reduction in the body, number of the same in the whole program).
    """

    body: Program
    scalars: tuple[int, ...]
    sums: tuple[tuple[int, int], ...] = ()
    vectors: tuple[Vector, ...] = ()

    @cached_property
    def reductions(self) -> tuple[Instruction, ...]:
        return tuple(self.body.instructions[number] for number, _ in self.sums)

    @cached_property
    def has_lines(self) -> bool:
        """Whether it must know where rows and columns are."""
        return bool(self.vectors) or any(line.type.shape != "tensor" for line in self.reductions)


@dataclass(frozen=True)
class Phases:
    """``program``: the whole, after all passes; what it has that is not of elements is the host's work."""

    program: Program
    phases: tuple[Phase, ...]
