"""How a phase meets memory: which dtype each array is stored in, how a compiled phase is called, and what it may be
called with. Nothing here computes; the checks are those whose neglect would give wrong numbers or touch other memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from shardstep.errors import ConfigError
from shardstep.rules.ir import State
from shardstep.types import Segment


@dataclass(frozen=True)
class Binding:
    """``compute``: float32 or float64. ``stored``: (array, dtype) for each array that the phase loads or stores.

    ``low``: dtype of the copy of the new param that is written beside it (bfloat16 or float16), or None.
    """

    compute: torch.dtype
    stored: tuple[tuple[str, torch.dtype], ...]
    low: torch.dtype | None = None


class PhaseKernel(Protocol):
    """One phase on flat arrays: each contiguous, of n elements in any shape, in the binding's dtypes, on one device."""

    def __call__(
        self, arrays: Mapping[str, Tensor], scalars: Sequence[float], *, offset: int = 0, low: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Run it in place. ``scalars``: s0, s1, … as float64, rounded once here. ``offset``: the global position of
        element 0. Returns, for each sum of the phase, the partials of the blocks of 1,024 global positions that the
        run touches, in order: float64 of shape (blocks,). The caller has checked the arrays.
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


def checked(arrays: Mapping[str, Tensor], low: Tensor | None) -> list[object]:
    """What kernels are made for: the device of the arrays, the param first, and their dtypes and that of low.

    Raises ConfigError unless all are contiguous, of one length and on one device.
    """
    param = arrays["param"]
    numel, device, on_cpu = param.numel(), param.device, param.is_cpu
    found: list[object] = [device]
    for array in arrays.values() if low is None else (*arrays.values(), low):
        here = array.is_cpu if on_cpu else array.device == device  # to compare devices takes three times as long
        if not here or array.numel() != numel or not array.is_contiguous():
            raise _misfit(array, param)
        found.append(array.dtype)
    return found


def _misfit(array: Tensor, param: Tensor) -> ConfigError:
    return ConfigError(
        f"expected contiguous arrays of {param.numel()} elements on {param.device}, got one of shape "
        f"{tuple(array.shape)} and strides {array.stride()} on {array.device}; pass arrays of one length"
    )
