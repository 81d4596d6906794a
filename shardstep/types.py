"""Plain data that rooms on different floors hand to each other.

Nothing here computes, and nothing here knows where a gradient came from or who else holds the rest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

BLOCK_NUMEL: Final = 1024
"""Elements per block of a flat space. Shards are whole blocks, and sums are taken block by block."""

SCALED_NUMEL: Final = 256
"""Neighbouring elements of a tensor that share one scale, where a state is stored in 8 bits."""


@dataclass(slots=True)
class Segment:
    """One flat run of elements that share hyper-parameters and step count.

    ``group`` is an index into the optimizer's ``param_groups``; ``step`` counts from 1 and already includes
    this update. All tensors are contiguous and of one length, in any shape. ``param`` is the float32 (or
    float64) master; each ``state`` has its dtype, or is bfloat16 or float16; ``grad`` may be of any floating dtype and
    is multiplied by ``grad_scale`` on the way in; ``low``, if any, receives the new parameters rounded to its dtype.
    ``offset`` is the place of element 0 in its flat space, which does not depend on who owns what. ``shape`` is the
    whole tensor's where the segment is a part of one tensor, and None where it may run over several; ``start`` is then
    the place of element 0 in that tensor, and ``tensor_state`` holds its states that are not of elements, whole (those
    of square matrices are with the `Whole`, if there is one).

    A state in 8 bits is int8 or uint8 codes, and float32 scales under its name with ``_scale`` behind it: one for each
    256 elements, the last ones rounded up. Such a segment is part of one tensor and begins at a multiple of 256 of it
    and of the flat space.

    ``param`` may also be bfloat16 or float16, without a master: then all is computed in float32, and the new
    parameters are rounded stochastically if there is a ``seed``, else to nearest even. The noise is a function of
    (``seed``, ``step``, place in the flat space), so flat spaces that are updated alike need different seeds.
    """

    group: int
    step: int
    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    low: Tensor | None
    grad_scale: float
    offset: int = 0
    shape: tuple[int, ...] | None = None
    seed: int | None = None
    start: int = 0
    tensor_state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Stack:
    """Many small segments, in lists, to be updated by a rule that sees single elements.

    They have the group, grad_scale, seed and names of states of ``first``, and a low if it has one. ``names``: "param",
    "grad" and the states; ``arrays``: those of the first segment and its low, ``width`` in all, then those of the next.
    """

    first: Segment
    names: tuple[str, ...]
    width: int
    steps: list[int]
    offsets: list[int]
    arrays: list[Tensor]

    def segments(self) -> Iterator[Segment]:
        """One by one."""
        one, arrays = self.first, iter(self.arrays)
        for step, offset in zip(self.steps, self.offsets, strict=True):
            state = {name: next(arrays) for name in self.names}
            param, grad = state.pop("param"), state.pop("grad")
            low = None if one.low is None else next(arrays)
            yield Segment(one.group, step, param, grad, state, low, one.grad_scale, offset, one.shape, one.seed)


class Update(NamedTuple):
    """Of one tensor: its group, its step count with this update, and its shape."""

    group: int
    step: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """A tensor that is updated now, on this rank or another, by a rule with matrix products.

    The entries mean what those of a `Segment` of all its elements would; ``compute``: the dtype of its master.
    ``squares``: on the rank that owns it, its states of pairs of rows and of columns.
    """

    group: int
    step: int
    shape: tuple[int, ...]
    compute: torch.dtype
    grad_scale: float
    offset: int
    squares: Mapping[str, Tensor] = field(default_factory=dict)


class Owners(Protocol):
    """Where whole tensors are put together: each has one rank that owns it. Collective; in flat tensors.

    ``tensors``: all that are updated, the same list on every rank; ``owned``: the places in it of those that this rank
    owns.
    """

    @property
    def tensors(self) -> Sequence[Whole]: ...

    @property
    def owned(self) -> Sequence[int]: ...

    def gather(self, pieces: Sequence[Sequence[Tensor]], dtypes: Sequence[Sequence[torch.dtype]]) -> list[list[Tensor]]:
        """From values of each segment of the batch, those of the whole tensors that this rank owns.

        ``dtypes``: for each of ``tensors``, those of its values.
        """

    def scatter(
        self, wholes: Sequence[Sequence[Tensor]], dtypes: Sequence[Sequence[torch.dtype]]
    ) -> list[list[Tensor]]:
        """From values of the whole tensors that this rank owns, those of each segment of the batch."""


@dataclass
class Batch:
    """Segments that are updated together, by one rule: those of one flat space, or of several for matrix products.
    Those of a rule that sees single elements may be ``stacks`` instead.

    ``updated``: every tensor of these spaces that is updated now, on this rank or another, in order.
    ``combine`` makes whole tensors' reductions of their parts'. It takes, for each segment, what its reductions gave
    (float64: a value for each block of 1,024 places that it touches, or for each row or column), and the names of
    those operations for each entry of ``updated``; it returns the same for the tensors that the segments are parts
    of: all of their blocks in order, or all of their rows or columns. Every rank calls it equally often, also without
    segments. ``owners``: for matrix products; None where segments are whole tensors anyway.
    """

    segments: list[Segment]
    updated: list[Update]
    combine: "Combine"
    owners: Owners | None = None
    stacks: list[Stack] = field(default_factory=list)


Combine = Callable[[list[list[Tensor]], list[tuple[str, ...]]], list[list[Tensor]]]


class FlatSource(Protocol):
    """Whoever holds the parameters, gradients and state of an optimizer as flat runs.

    ``left_out``: whether the last step was, because its gradients had overflowed under the loss's scale; it had no
    batches then.
    """

    left_out: bool

    def batches(self, *, per_tensor: bool, whole: Set[int]) -> Iterator[Batch]:
        """What to update now; each batch is updated before the next one is asked for.

        ``per_tensor``: no segment may run over two tensors, because the rule looks at whole ones. ``whole``: of an
        optimizer with several rules, the numbers of those with matrix products (0 where there is one rule); all that
        one of them updates is in one batch, with the `Owners` of its tensors.
        """

    def between_steps(self, call: Literal["train()", "eval()"]) -> Iterator[list[tuple[nn.Parameter, Segment]]]:
        """What is held here of every parameter that has been updated, for an optimizer that changes it without a step;
        each list is changed before the next one is asked for, and every rank asks for all of them.

        ``call``: the optimizer's method, which ranks compare. A segment is part of one tensor, has the steps taken so
        far, and its ``grad`` means nothing. Raises SequenceError where the parameters are not to be changed now.
        """

    def include(self, parameters: Sequence[nn.Parameter]) -> None:
        """Update these as well from now on. Every rank asks for the same ones.

        Raises ConfigError, before anything has changed, for one that this source does not know.
        """

    def discard(self) -> None:
        """Forget the gradients (``zero_grad``)."""

    def whole_state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """State in the shapes of the parameters, with ``step`` as torch keeps it (0-d float32 on the CPU).

        A parameter that has never been updated is left out. Every rank gets the same answer, so every rank
        must ask.
        """

    def adopt_state(self, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Replace all state by a copy of ``state``, in the form of :meth:`whole_state`.

        A parameter left out starts anew, and so does a state that its entry leaves out.
        """

    def check_adoptable(self) -> None:
        """Raise SequenceError where state is not to be replaced now."""

    def write_parameters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Replace parameters by ``values``, whole and in their shapes; every rank must call it with the same."""
