"""The global norm, with bits that do not depend on who owns what.

Each rank sums the squares of its run block by block, in float64 and in a fixed order of additions; all block
sums then meet on every rank in the order of the layouts and are added there. The norm changes no gradient: the
coefficient goes into the update's one multiplication. Clipping by value is of single elements, where they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from shardstep.block_sums import block_sums
from shardstep.collectives import Group
from shardstep.errors import NonFiniteGradientError
from shardstep.sharding.space import Space
from shardstep.types import BLOCK_NUMEL


@dataclass(frozen=True)
class Clipping:
    """How a step clips. ``by_norm``: the factor of all gradients, given the norm of their mean; ``value``: the largest
    magnitude of an element of the mean.
    """

    by_norm: Callable[[float], float] | None = None
    value: float | None = None

    def factor(self, norm: float | None) -> float:
        """What all gradients are multiplied by."""
        return 1.0 if self.by_norm is None or norm is None else self.by_norm(norm)


def global_norm(runs: list[tuple[Space, Tensor]], group: Group, step: int) -> float:
    """The 2-norm over all spaces; ``runs`` holds this rank's run (shard numel) of each space's gradient sum."""
    own = torch.cat([block_sums(values) for _, values in runs])
    sums = group.all_gather_small(own, label=f"gather of block norms in step {step}")
    by_part, offset = dict[int, Tensor](), 0
    for space, values in runs:
        blocks = values.numel() // BLOCK_NUMEL
        of_space = sums[:, offset : offset + blocks].reshape(-1)[: space.layout.blocks]
        cut = torch.split(of_space, [part.blocks for part in space.parts])
        by_part |= {part.number: own for part, own in compress(zip(space.parts, cut, strict=True), space.trained_parts)}
        offset += blocks
    return math.sqrt(torch.cat([by_part[number] for number in sorted(by_part)]).sum().item())


def clip_coefficient(norm: float, clip_norm: float) -> float:
    """What gradients of this norm are multiplied by; the formula of torch.nn.utils.clip_grad_norm_."""
    return min(1.0, clip_norm / (norm + 1e-6))


def clip_values(runs: list[Tensor], bound: float) -> None:
    """Bring every element into [-bound, bound], as torch.nn.utils.clip_grad_value_ does; NaN stays."""
    for values in runs:
        limit = min(bound, torch.finfo(values.dtype).max)
        values.clamp_(-limit, limit)


def check_finite(norm: float, runs: list[tuple[Space, Tensor]], group: Group, step: int) -> None:
    """Raise NonFiniteGradientError if the norm of ``runs`` is not finite: there is no way to clip by it. Collective."""
    if not math.isfinite(norm):
        raise NonFiniteGradientError(_first_non_finite(runs, group, step, norm))


def _first_non_finite(runs: list[tuple[Space, Tensor]], group: Group, step: int, norm: float) -> str:
    found = None
    for order, (space, values) in enumerate(runs):
        bad = torch.nonzero(~torch.isfinite(values))
        if len(bad):
            found = [order, group.rank * values.numel() + int(bad[0]), space.leaves.origins.not_finite()]
            break
    everyone = group.exchange_json(found, label=f"search for the first non-finite gradient in step {step}")
    places = [place for place in everyone if place is not None]
    if not places:
        return f"the gradient norm of step {step} is {norm}: the sum of squares overflows float64; lower the loss scale"
    order, offset, origins = min(places)
    slot = runs[order][0].layout.slot_at(offset)
    return (
        f"expected finite gradients, got a norm of {norm} in step {step}: the first non-finite one is in parameter "
        f"{slot.name!r} (element {offset - slot.offset}){_computed_by(origins, group)}; nothing was updated, and "
        f"zero_grad() lets you go on"
    )


def _computed_by(ranks: list[int], group: Group) -> str:
    if group.size == 1:
        return ""
    if not ranks:
        return ", but not in any rank's own"
    names = ", ".join(map(str, ranks))
    return f", computed by rank {names}" if len(ranks) == 1 else f", computed by the ranks {names}"
