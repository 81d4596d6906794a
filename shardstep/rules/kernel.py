"""What every back end makes of a program: a kernel, and how it is called.

Nothing here computes. The checks are those whose neglect would give silently wrong numbers.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from shardstep.errors import ConfigError


class Kernel(Protocol):
    """One update of a flat run of elements, in place, each element independent of all others."""

    def __call__(
        self,
        param: Tensor,
        grad: Tensor,
        states: Mapping[str, Tensor],
        scalars: Mapping[str, object],
        grad_scale: float,
        low: Tensor | None,
    ) -> None:
        """Update ``param`` and ``states`` in place; write the new param to ``low``, rounded to nearest even.

        All tensors: shape (n,), contiguous, on one device, without autograd. ``param`` is float32 or float64,
        and everything is computed in its dtype; states have that dtype. ``grad`` (any floating dtype,
        unchanged) is converted to it and multiplied by ``grad_scale``. ``scalars``: the hyper-parameters, and
        ``step`` from 1. Raises ConfigError if the arrays are not so, RuleError if a per-step scalar has no
        value.
        """


def check_arrays(
    names: tuple[str, ...], param: Tensor, grad: Tensor, states: Mapping[str, Tensor], low: Tensor | None
) -> None:
    """Raise ConfigError unless the arrays are as :class:`Kernel` says; ``names`` are the rule's states."""
    if param.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"expected a float32 or float64 param, got {param.dtype}; keep a float32 master of it")
    if tuple(states) != names:
        raise ConfigError(f"expected the states {names}, got {tuple(states)}; pass them by these names, in order")
    _check("param", param, param, param.dtype)
    _check("grad", grad, param, None)
    for name, state in states.items():
        _check(f"state {name!r}", state, param, param.dtype)
    if low is not None:
        _check("low", low, param, None)


def _check(name: str, tensor: Tensor, param: Tensor, dtype: torch.dtype | None) -> None:
    if tensor.dim() != 1 or tensor.numel() != param.numel() or not tensor.is_contiguous():
        raise ConfigError(
            f"expected {name} to be contiguous of shape ({param.numel()},), got shape {tuple(tensor.shape)} "
            f"and strides {tensor.stride()}; pass flat views of one length"
        )
    if tensor.device != param.device:
        raise ConfigError(f"expected {name} on {param.device} like param, got {tensor.device}; move it there")
    if dtype not in (None, tensor.dtype) or not tensor.is_floating_point():
        raise ConfigError(f"expected {name} as {dtype or 'floating point'}, got {tensor.dtype}; convert it")
