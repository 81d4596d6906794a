"""What the host's scalars are made of: the hyper-parameters of a group, and those that are given by themselves."""

from collections.abc import Mapping
from typing import Final, TypeAlias

import torch

from shardstep.rules import noise
from shardstep.rules.view import view_of
from shardstep.types import Segment

Hypers: TypeAlias = Mapping[str, object]
"""Hyper-parameters by name: numbers, truth values, one-element tensors, or tuples of them."""

_EPS32: Final = torch.finfo(torch.float32).eps
_EPS64: Final = torch.finfo(torch.float64).eps


def hypers_of(
    group: Hypers, step: int, grad_scale: float, shape: tuple[int, ...], compute: torch.dtype
) -> dict[str, object]:
    """All of them, for a tensor of a rule that may ask for its rows and columns."""
    view = view_of(shape)
    of_shape = {"ndim": len(shape), "rows": view.rows, "columns": view.columns}
    return {
        **group,
        **of_shape,
        "step": step,
        "grad_scale": grad_scale,
        "machine_eps": _EPS64 if compute == torch.float64 else _EPS32,
    }


def segment_hypers(segment: Segment, group: Hypers) -> dict[str, object]:
    """All of them, for a segment of any other rule; with the key of its noise."""
    hypers = group.copy() if type(group) is dict else dict(group)  # half the time of {**group, ...}
    hypers["step"] = segment.step
    hypers["ndim"] = len(segment.shape or ())
    hypers["machine_eps"] = _EPS64 if segment.param.dtype == torch.float64 else _EPS32
    hypers["grad_scale"] = segment.grad_scale
    return hypers if segment.seed is None else {**hypers, noise.KEY: noise.key_of(segment, segment.seed)}
