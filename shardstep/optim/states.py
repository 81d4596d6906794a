"""States of single parameters: their shapes, how they start, and complex numbers as pairs of real ones."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shardstep.errors import UnsupportedError
from shardstep.rules.backends.dynamic8 import encode
from shardstep.rules.binding import CODED, compute_dtype, scale_name, stored_arrays
from shardstep.rules.ir import State
from shardstep.rules.view import state_shape
from shardstep.types import SCALED_NUMEL


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as the real and imaginary parts in one more dimension, as torch's optimizers see it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def dtype_of(declared: State, param: Tensor) -> torch.dtype:
    """What a state of ``param`` is kept in: complex where the parameter is and the state has its elements; one number
    for a tensor in float32, as torch keeps ``step``.
    """
    unsaid = torch.float32 if declared.shape == "tensor" else compute_dtype(as_real(param))
    dtype = stored_arrays(declared)[0].dtype or unsaid
    if not param.is_complex() or declared.shape != "element":
        return dtype
    if dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(
            f"expected real parameters for the state {declared.name!r}, which is stored in {dtype}, got {param.dtype}; "
            f"give torch.view_as_real(...) of the parameter"
        )
    return dtype.to_complex()


def device_of(declared: State, param: Tensor) -> torch.device:
    """Where it lies: one number for a tensor, on the CPU."""
    return torch.device("cpu") if declared.shape == "tensor" else param.device


def start_of(declared: State, param: Tensor) -> dict[str, Tensor]:
    """The arrays of a new state of ``param``."""
    shape = state_shape(declared.shape, tuple(param.shape))
    first, *scales = stored_arrays(declared)
    arrays = {first.name: torch.empty(shape, dtype=dtype_of(declared, param), device=device_of(declared, param))}
    for scale in scales:
        arrays[scale.name] = torch.empty(scales_of(math.prod(shape)), dtype=scale.dtype, device=param.device)
    begin(declared, arrays, param)
    return arrays


def begin(declared: State, arrays: Mapping[str, Tensor], param: Tensor) -> None:
    """Let the arrays of a state begin anew."""
    values = arrays[declared.name]
    if values.dtype not in CODED:
        if isinstance(declared.start, str):
            values.copy_(param.detach())
        else:
            as_real(values).fill_(declared.start)  # both parts of a complex number, for the rule sees two real ones
        return
    scale = arrays[scale_name(declared.name)]
    if isinstance(declared.start, str):
        codes, scales = encode(param, values.dtype)
        values.copy_(codes)
        scale.copy_(scales)
    else:
        codes, scales = encode(torch.tensor([declared.start], dtype=torch.float32), values.dtype)
        values.fill_(codes.item())
        scale.fill_(scales.item())


def scales_of(numel: int) -> int:
    """How many scales there are for a tensor."""
    return -(-numel // SCALED_NUMEL)
