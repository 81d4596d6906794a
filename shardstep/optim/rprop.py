"""Rprop: the sign of the gradient, and a step size of each element's own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_tuple, refusal
from shardstep.rules.functions import clip, sign, where
from shardstep.rules.language import Elements, rule, zeros


@rule
def rprop(
    param: Elements,
    grad: Elements,
    prev: Elements = zeros,
    step_size: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
) -> tuple[Elements, ...]:
    """Riedmiller & Braun 1993 (doi 10.1109/ICNN.1993.298623), the variant that takes no step back (iRprop−).

    With gradient g, the step sizes s starting from lr and the gradients before, h, from 0::

        s ← clip(s · η₂, step_sizes) where g h > 0, clip(s · η₁, step_sizes) where g h < 0, else clip(s, step_sizes)
        h ← 0 where g h < 0, else g
        θ ← θ − sign(h) · s

    iRprop− is of Igel & Hüsken 2000 (Improving the Rprop Learning Algorithm).
    """
    product = grad * prev
    factor = where(product > 0, etas[1], where(product < 0, etas[0], 1.0))
    step_size = clip(factor * (lr if step == 1 else step_size), step_sizes[0], step_sizes[1])
    prev = where(product < 0, 0.0, grad)
    return param - sign(prev) * step_size, prev, step_size


class Rprop(Optimizer):
    """Resilient backpropagation, as ``torch.optim.Rprop``; for gradients of the whole data set.

    ``lr`` ≥ 0: step size of every element at first; ``etas``, one in (0, 1) and one above 1: what it is multiplied by
    where the gradient changes its sign or keeps it; ``step_sizes``: bounds of it. State: ``prev``, ``step_size``.
    Raises ConfigError for a value out of range.
    """

    rule = rprop

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            etas=etas,
            step_sizes=step_sizes,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr")
        check_tuple(group, where, "step_sizes")
        low, high = check_tuple(group, where, "etas")
        if not 0.0 < low < 1.0 < high:
            raise refusal("0 < etas[0] < 1 < etas[1]", where, group["etas"])
