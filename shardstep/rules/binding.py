"""How a phase meets memory: which dtype each array is stored in, how a compiled phase is called, and what it may be
called with. Nothing here computes; the checks are those whose neglect would give wrong numbers or touch other memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from shardstep.errors import ConfigError
from shardstep.rules.ir import Shape, State
from shardstep.rules.view import View
from shardstep.types import Segment


@dataclass(frozen=True)
class Binding:
    """``compute``: float32 or float64. ``stored``: (array, dtype) for each array that the phase loads or stores.

    ``low``: dtype of the copy of the new param that is written beside it (bfloat16 or float16), or None.
    """

    compute: torch.dtype
    stored: tuple[tuple[str, torch.dtype], ...]
    low: torch.dtype | None = None


@dataclass(frozen=True)
class Lines:
    """Where the rows and columns of a run are. ``start``: the place in its tensor of the run's first element.

    ``vectors``: v0, v1, … of a phase, for all rows or columns of the tensor: flat, contiguous, on the CPU, in the
    compute dtype, or float64 for anchors.
    """

    view: View
    start: int = 0
    vectors: tuple[Tensor, ...] = ()

    def touched(self, shape: Shape, count: int) -> slice:
        """The rows or columns that a run of ``count`` elements has a part in."""
        return self.view.touched(shape, self.start, self.start + count)


class PhaseKernel(Protocol):
    """One phase on flat arrays: each contiguous, of shape (n,), in the binding's dtypes, on one device."""

    def __call__(
        self,
        arrays: Mapping[str, Tensor],
        scalars: Sequence[float],
        *,
        offset: int = 0,
        low: Tensor | None = None,
        lines: Lines | None = None,
    ) -> tuple[Tensor, ...]:
        """Run it in place. ``scalars``: s0, s1, … as float64, rounded once here. ``offset``: the global position of
        element 0. ``lines``: for a phase that has any.

        Returns, in float64, for each reduction of the phase: the partials of the blocks of 1,024 global positions
        that the run touches, in order; or of the rows or columns that it touches. The caller has checked the arrays.
        """


_STORED: Final = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def compute_dtype(param: Tensor) -> torch.dtype:
    """What a param is updated in, and its states kept in where the rule leaves that open: a 16-bit one, in float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def stored_dtype(state: State) -> torch.dtype | None:
    """What the rule says a state is stored in; None if it leaves that to the compute dtype."""
    dtype: torch.dtype | None = None if state.dtype is None else getattr(torch, state.dtype)
    return dtype


def check_dtypes(segment: Segment) -> None:
    """Raise ConfigError for dtypes that no kernel can be made for."""
    compute = compute_dtype(segment.param)
    if segment.param.dtype not in _STORED:
        raise ConfigError(f"expected a floating-point param, got {segment.param.dtype}; keep a float32 master of it")
    if segment.grad.dtype not in _STORED:
        raise ConfigError(f"expected a floating-point grad, got {segment.grad.dtype}; convert it")
    for name, state in segment.state.items():
        if state.dtype not in (compute, torch.bfloat16, torch.float16):
            raise ConfigError(f"expected state {name!r} as {compute}, bfloat16 or float16, got {state.dtype}")
    if segment.low is not None and segment.low.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"expected the copy of param in bfloat16 or float16, got {segment.low.dtype}")


def check_arrays(segment: Segment) -> None:
    """Raise ConfigError unless all arrays are contiguous, of one length and on one device."""
    param, low = segment.param, segment.low
    shape, device = param.shape, param.device
    arrays = (param, segment.grad, *segment.state.values())
    for array in arrays if low is None else (*arrays, low):
        if array.shape != shape or not array.is_contiguous() or array.device != device or len(shape) != 1:
            raise ConfigError(
                f"expected flat contiguous arrays of {param.numel()} elements on {device}, got one of shape "
                f"{tuple(array.shape)} and strides {array.stride()} on {array.device}; pass flat views of one length"
            )
