"""A program cut into passes over memory: what a back end compiles.

Between phases the host computes: uniform and tensor values never appear in a phase but as its scalars.
"""

from dataclasses import dataclass

from shardstep.rules.ir.program import Program


@dataclass(frozen=True)
class Phase:
    """One pass over the elements of a tensor, each array read once and written once.

    ``body``: a program whose instructions are loads, constants, pointwise operations on elements, reductions at the
    end, and ``hyper s0``, ``hyper s1``, …: its scalars, of kind real.
    ``scalars``: for each of them the number of the (real, uniform or tensor) instruction of the whole program that it
    is. ``sums``: (number of a reduction in the body, number of the same in the whole program).
    """

    body: Program
    scalars: tuple[int, ...]
    sums: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Phases:
    """``program``: the whole, after all passes; its uniform and tensor instructions are the host's work."""

    program: Program
    phases: tuple[Phase, ...]
