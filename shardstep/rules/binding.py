"""How a phase meets memory: which arrays hold a state and in which dtype, how a compiled phase is called, and what it
may be called with. Nothing here computes; the checks are those whose neglect would give wrong numbers or touch other
memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from shardstep.errors import ConfigError
from shardstep.rules.ir import Shape, State
from shardstep.rules.view import View
from shardstep.types import SCALED_NUMEL, Segment


@dataclass(frozen=True)
class Binding:
    """``compute``: float32 or float64. ``stored``: (array, dtype) for each array that the phase loads or stores; behind
    a state in 8 bits (int8 or uint8) that of its scales.

    ``low``: dtype of the copy of the new param that is written beside it (bfloat16 or float16), or None.
    """

    compute: torch.dtype
    stored: tuple[tuple[str, torch.dtype], ...]
    low: torch.dtype | None = None

    def arrays(self, used: Iterable[str]) -> tuple[str, ...]:
        """The arrays that params, grads and states by these names lie in, in the binding's order."""
        names = set(used)
        names |= {scale_name(name) for name, dtype in self.stored if dtype in CODED and name in names}
        return tuple(name for name, _ in self.stored if name in names)


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
    """One phase on flat arrays: each contiguous, of n elements in any shape, in the binding's dtypes, on one device;
    scales of one entry for each 256 elements, with an ``offset`` that is a multiple of 256.
    """

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

_BY_NAME: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "dynamic8": torch.int8,
    "dynamic8_unsigned": torch.uint8,
}

CODED: Final = frozenset({torch.int8, torch.uint8})
"""What 8-bit states are stored in: the dtype alone says which map their bytes are numbers of (`backends.dynamic8`)."""


@dataclass(frozen=True)
class StoredArray:
    """One of the arrays that hold a state. ``dtype`` None: the compute dtype. ``per``: elements that share an entry."""

    name: str
    dtype: torch.dtype | None
    per: int = 1


def stored_arrays(state: State) -> tuple[StoredArray, ...]:
    """What holds a state in memory: one array of its name, and for 8 bits the scales as well."""
    dtype = None if state.dtype is None else _BY_NAME[state.dtype]
    codes = StoredArray(state.name, dtype)
    return (codes, StoredArray(scale_name(state.name), torch.float32, SCALED_NUMEL)) if dtype in CODED else (codes,)


def arrays_of(segment: Segment) -> dict[str, Tensor]:
    """All that has an entry for each element, by the names that kernels know."""
    return {"param": segment.param, "grad": segment.grad, **segment.state}


def scale_name(state: str) -> str:
    """The name of the scales of a state."""
    return f"{state}_scale"


def scales_among(arrays: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of those arrays that are the scales of others."""
    return frozenset([scale_name(name) for name, array in arrays.items() if array.dtype in CODED])


def cut_states(arrays: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """What the flat arrays of states hold of elements [start, stop): one, or a run that begins where a scale does."""
    scales = scales_among(arrays)
    part, of_scales = slice(start, stop), slice(start // SCALED_NUMEL, -(-stop // SCALED_NUMEL))
    return {name: array.view(-1)[of_scales if name in scales else part] for name, array in arrays.items()}


def compute_dtype(param: Tensor) -> torch.dtype:
    """What a param is updated in, and its states kept in where the rule leaves that open: a 16-bit one, in float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def check_dtypes(segment: Segment) -> None:
    """Raise ConfigError for dtypes that no kernel can be made for."""
    compute = compute_dtype(segment.param)
    if segment.param.dtype not in _STORED:
        raise ConfigError(f"expected a floating-point param, got {segment.param.dtype}; keep a float32 master of it")
    if segment.grad.dtype not in _STORED:
        raise ConfigError(f"expected a floating-point grad, got {segment.grad.dtype}; convert it")
    scales = scales_among(segment.state)
    if missing := scales - segment.state.keys():
        raise ConfigError(f"expected scales for states in 8 bits, got none called {sorted(missing)}; pass them too")
    for name, state in segment.state.items():
        if name in scales and state.dtype != torch.float32:
            raise ConfigError(f"expected the scales {name!r} as float32, got {state.dtype}")
        if name not in scales and state.dtype not in (compute, torch.bfloat16, torch.float16, *CODED):
            raise ConfigError(f"expected state {name!r} as {compute}, bfloat16, float16 or 8 bits, got {state.dtype}")
    if segment.low is not None and segment.low.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"expected the copy of param in bfloat16 or float16, got {segment.low.dtype}")


def check_arrays(arrays: Mapping[str, Tensor], low: Tensor | None, offset: int) -> None:
    """Raise ConfigError unless all are contiguous, of one length (but for scales) and on one device."""
    param = arrays["param"]
    numel, on_cpu = param.numel(), param.is_cpu
    for array in arrays.values() if low is None else (*arrays.values(), low):
        here = array.is_cpu if on_cpu else array.device == param.device  # to compare devices takes three times as long
        if not here or not array.is_contiguous():
            raise _misfit(array, param)
        if array.numel() != numel:
            _check_scale(array, arrays, offset)


def _misfit(array: Tensor, param: Tensor) -> ConfigError:
    return ConfigError(
        f"expected contiguous arrays of {param.numel()} elements on {param.device}, got one of shape "
        f"{tuple(array.shape)} and strides {array.stride()} on {array.device}; pass arrays of one length"
    )


def _check_scale(array: Tensor, arrays: Mapping[str, Tensor], offset: int) -> None:
    """An array of another length must be scales, of one for each 256 elements from the first one on."""
    param = arrays["param"]
    name = next((name for name in scales_among(arrays) if arrays.get(name) is array), None)
    if name is None:
        raise _misfit(array, param)
    if offset % SCALED_NUMEL:
        raise ConfigError(
            f"expected a segment with states in 8 bits to begin at a multiple of {SCALED_NUMEL} elements, got one at "
            f"{offset}; cut it where a scale begins"
        )
    shape = (-(-param.numel() // SCALED_NUMEL),)
    if array.shape != shape:
        raise ConfigError(
            f"expected flat contiguous scales {name!r} of shape {shape} on {param.device}, got shape "
            f"{tuple(array.shape)}; pass one for each {SCALED_NUMEL} elements"
        )
