"""Which operations there are, what they take, and what type they give: the one table that everybody reads.

Bits: `add sub mul div sqrt fma` round once, to nearest even. `minimum` and `maximum` give NaN if either is NaN, and
+0 of zeros of either sign. `sign` gives 0 for NaN and zeros. `neg` and `abs` change the sign bit only. Comparisons
with NaN are false, but for `ne`. Words wrap around. Which NaN a NaN is, is not fixed.
`bfloat16` rounds once to bfloat16, to nearest even, and stays real.
`exp log tanh rsqrt pow` have no fixed bits of their own: a pass replaces them by the ones above.
`mod` is Python's `%`, of numbers that the host computes only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

Kind = Literal["real", "bool", "word"]
Shape = Literal["uniform", "tensor", "row", "column", "element", "rr", "cc", "cr"]


@dataclass(frozen=True)
class Type:
    """What kind of number, and one for each of what."""

    kind: Kind
    shape: Shape

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}"

    @property
    def is_single(self) -> bool:
        """Whether it is one number, for a step or for a tensor."""
        return self.shape in ("uniform", "tensor")


@dataclass(frozen=True)
class Operation:
    """``takes`` and ``gives`` are kinds; ``attributes`` is how many constants are written in the instruction.

    ``family`` decides the shape of the result: see `result_type`.
    """

    family: Literal["source", "pointwise", "host", "reduction", "matrix"]
    takes: tuple[Kind, ...]
    gives: Kind
    attributes: int = 0


def _pointwise(takes: str, gives: Kind, names: str, attributes: int = 0) -> dict[str, Operation]:
    kinds: dict[str, Kind] = {"r": "real", "b": "bool", "w": "word"}
    return {n: Operation("pointwise", tuple(kinds[t] for t in takes), gives, attributes) for n in names.split()}


def _reductions(takes: str, names: str) -> dict[str, Operation]:
    real: Kind = "real"
    return {name: Operation("reduction", (real,) * len(takes), real) for name in names.split()}


OPERATIONS: dict[str, Operation] = {
    # const NUMBER | load param, grad or a state | hyper NAME [INDEX] | the tensor's counts | the global index, low word
    "const": Operation("source", (), "real", 1),
    "load": Operation("source", (), "real", 1),
    "hyper": Operation("source", (), "real", 1),
    "numel": Operation("source", (), "real"),
    "rows": Operation("source", (), "real"),
    "columns": Operation("source", (), "real"),
    "index": Operation("source", (), "word"),
    **_pointwise("r", "real", "neg abs sign sqrt rsqrt exp log tanh bfloat16"),
    **_pointwise("rr", "real", "add sub mul div minimum maximum pow"),
    **_pointwise("rrr", "real", "fma"),
    **_pointwise("rr", "bool", "lt le gt ge eq ne"),
    **_pointwise("bb", "bool", "and or"),
    **_pointwise("b", "bool", "not"),
    **_pointwise("brr", "real", "where"),
    # choose: a branch of the source, decided when the rule is specialised; its condition is uniform
    **_pointwise("brr", "real", "choose"),
    "mod": Operation("host", ("real", "real"), "real"),
    **_pointwise("r", "word", "bits"),
    **_pointwise("w", "real", "from_bits"),
    **_pointwise("ww", "word", "word_add word_sub word_mul word_and word_or word_xor"),
    **_pointwise("w", "word", "word_shl word_shr", attributes=1),
    # over a tensor, each row, each column: sums over tensors go block by block in a fixed tree, in float64; those of
    # rows and columns are exact (see `backends.blocks`). A total is a sum of terms whose largest magnitude is known.
    **_reductions("r", "sum max row_sum column_sum row_max column_max"),
    **_reductions("rr", "row_total column_total"),
    "matmul": Operation("matrix", ("real", "real"), "real"),
    "transpose": Operation("matrix", ("real",), "real"),
    # the identity of the shape of its argument, whose values do not matter
    "identity": Operation("matrix", ("real",), "real"),
}

_SOURCES: dict[str, Shape] = {
    "hyper": "uniform",
    "numel": "tensor",
    "rows": "tensor",
    "columns": "tensor",
    "index": "element",
}
_MATRICES: dict[str, Shape] = {"rc": "element", "rr": "rr", "cc": "cc", "cr": "cr"}
_DIMENSIONS = {shape: dimensions for dimensions, shape in _MATRICES.items()}

SQUARE: Final[frozenset[Shape]] = frozenset({"rr", "cc"})
"""The shapes of square matrices: one number for each pair of rows, or of columns."""


def join(shapes: Sequence[Shape]) -> Shape | None:
    """The shape of a pointwise result; None where the shapes do not fit together."""
    found = set(shapes) - {"uniform", "tensor"}
    if not found:
        return "tensor" if "tensor" in shapes else "uniform"
    if len(found) == 1:
        return found.pop()
    return "element" if found <= {"row", "column", "element"} else None


@cache  # there are few types, and every pass and every verification asks again
def result_type(operation: str, arguments: tuple[Type, ...]) -> Type | None:
    """The type that ``operation`` gives; None if it cannot take ``arguments``. Not for ``const`` and ``load``."""
    signature = OPERATIONS[operation]
    if tuple(argument.kind for argument in arguments) != signature.takes:
        return None
    shape = _result_shape(operation, signature.family, [argument.shape for argument in arguments])
    return None if shape is None else Type(signature.gives, shape)


def _result_shape(operation: str, family: str, shapes: list[Shape]) -> Shape | None:
    if operation == "choose" and shapes[0] != "uniform":
        return None
    if family == "source":
        return _SOURCES[operation]
    if family in ("pointwise", "host"):
        joined = join(shapes)
        return joined if family == "pointwise" or joined in ("uniform", "tensor") else None
    if family == "reduction":
        return _reduced(operation, shapes)
    if operation == "identity":
        return shapes[0] if shapes[0] in SQUARE else None
    dimensions = [_DIMENSIONS.get(shape) for shape in shapes]
    if operation == "transpose":
        return _MATRICES.get(dimensions[0][::-1]) if dimensions[0] else None
    left, right = dimensions
    return _MATRICES[left[0] + right[1]] if left and right and left[1] == right[0] else None


def _reduced(operation: str, shapes: list[Shape]) -> Shape | None:
    along, _, what = operation.rpartition("_")
    if not along:
        return "tensor" if shapes[0] not in ("uniform", "tensor") else None
    line: Shape = "row" if along == "row" else "column"
    fits = shapes[0] in ("element", "column" if line == "row" else "row")
    return line if fits and (what != "total" or shapes[1] == line) else None
