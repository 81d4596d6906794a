"""States of single parameters: their shapes, how they start, and complex numbers as pairs of real ones."""

import math

import torch
from torch import Tensor

from shardstep.errors import UnsupportedError
from shardstep.rules.binding import compute_dtype, stored_dtype
from shardstep.rules.ir import State


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as the real and imaginary parts in one more dimension, as torch's optimizers see it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def shape_of(declared: State, param: Tensor) -> tuple[int, ...]:
    """The shape of a state of ``param``; its rows are its first dimension, its columns all the others."""
    shape = tuple(param.shape)
    rows, columns = shape[:1] or (1,), (math.prod(shape[1:]),)
    return {"element": shape, "row": rows, "column": columns}.get(declared.shape, ())


def dtype_of(declared: State, param: Tensor) -> torch.dtype:
    """What a state of ``param`` is kept in: complex where the parameter is and the state has its elements."""
    dtype = stored_dtype(declared) or compute_dtype(as_real(param))
    if not param.is_complex() or declared.shape != "element":
        return dtype
    if dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(
            f"expected real parameters for the state {declared.name!r}, which is stored in {dtype}, got {param.dtype}; "
            f"give torch.view_as_real(...) of the parameter"
        )
    return dtype.to_complex()


def start_of(declared: State, param: Tensor) -> Tensor:
    """A new state of ``param``."""
    dtype = dtype_of(declared, param)
    if isinstance(declared.start, str):
        return param.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
    state = torch.empty(shape_of(declared, param), dtype=dtype, device=param.device)
    as_real(state).fill_(declared.start)  # both parts of a complex number, for the rule sees two real ones
    return state
