"""Sums of rows and columns: before a sum comes the largest magnitude of its terms, with which it needs no order.

before      %0 = load grad : real element
            %1 = row_sum %0 : real row
after       %0 = load grad : real element
            %1 = abs %0 : real element
            %2 = row_max %1 : real row
            %3 = row_total %0 %2 : real row

A maximum needs no order by itself, so both may be taken part by part, wherever the parts lie. Sums over what the host
has stay as they are: it has all of it in one place.
"""

from shardstep.rules.ir import Builder, Instruction, Program
from shardstep.rules.passes.rewrite import rewrite


def find_largest(program: Program) -> Program:
    """Make totals of the sums of rows and columns of elements."""
    return rewrite(program, _bounded)


def _bounded(builder: Builder, line: Instruction, arguments: tuple[int, ...]) -> int | None:
    along, _, what = line.operation.partition("_")
    if what != "sum" or builder.type_of(arguments[0]).shape != "element":
        return None
    magnitude = builder.emit("abs", arguments[0], place=line.place)
    largest = builder.emit(f"{along}_max", magnitude, place=line.place)
    return builder.emit(f"{along}_total", arguments[0], largest, place=line.place)
