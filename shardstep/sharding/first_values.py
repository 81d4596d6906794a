"""Where the first values of a flat space come from, and how a parameter comes to be a view of it.

A `Space` asks its source for the run of elements that this rank keeps: a shard at stage 3, else all. The source here
is the model itself; a file of weights is another (`weights`). Nothing here decides who keeps what.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shardstep.collectives import Group
from shardstep.layout import Layout
from shardstep.sharding.cut import CutParameter, forget, whole_values


class Source(Protocol):
    """From where the first values of flat spaces come."""

    def fill(self, run: Tensor, start: int, layout: Layout, parameters: Sequence[nn.Parameter], where: str) -> None:
        """Write the elements from ``start`` on of one space into ``run``, which holds zeros: this rank's shard, or the
        whole space. Collective. ``where`` names the space in messages.
        """


class FromModel:
    """What rank 0's parameters hold."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def fill(self, run: Tensor, start: int, layout: Layout, parameters: Sequence[nn.Parameter], where: str) -> None:
        padded_numel = layout.padded_numel(self._group.size)
        whole = run if run.numel() == padded_numel else torch.zeros(padded_numel, dtype=run.dtype, device=run.device)
        for slot, parameter in zip(layout.slots, parameters, strict=True):
            whole[slot.offset : slot.end].view(slot.shape).copy_(whole_values(parameter))
        self._group.broadcast(whole, label=f"broadcast of the first values of {where}")
        if whole is not run:
            run.copy_(whole[start : start + run.numel()])


def put(parameter: nn.Parameter, values: Tensor) -> None:
    """Let ``values`` be the parameter's data; the object stays the one that the model and the optimizer know."""
    if isinstance(parameter, CutParameter):
        forget(parameter)
    if parameter.is_meta:
        real = nn.Parameter(values, requires_grad=parameter.requires_grad)
        real.__class__ = type(parameter)
        real.__dict__.update(parameter.__dict__)
        swap: Any = torch.utils.swap_tensors  # torch leaves it untyped
        swap(parameter, real)
    else:
        parameter.data = values
