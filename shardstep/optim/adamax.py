"""Adamax: Adam on the infinity norm."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import average, with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions
from shardstep.rules.functions import maximum
from shardstep.rules.language import Elements, rule, zeros


@rule
def adamax(
    param: Elements,
    grad: Elements,
    exp_avg: Elements = zeros,
    exp_inf: Elements = zeros,
    *,
    step: int,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Elements, ...]:
    """Kingma & Ba 2015 (arXiv 1412.6980), section 7.1.

    With gradient g and step count t from 1::

        g ← g + weight_decay · θ
        m ← β₁ m + (1 − β₁) g
        u ← max(β₂ u, |g| + eps)
        θ ← θ − lr / (1 − β₁ᵗ) · m / u

    Differs from the paper as torch does: it has no eps.
    """
    direction = with_decay(grad, param, weight_decay)
    exp_avg = average(exp_avg, direction, betas[0])
    exp_inf = maximum(betas[1] * exp_inf, abs(direction) + eps)
    param = param - lr / (1 - betas[0] ** step) * exp_avg / exp_inf
    return param, exp_avg, exp_inf


class Adamax(Optimizer):
    """Adamax, as ``torch.optim.Adamax``.

    ``lr`` ≥ 0: step size; ``betas`` in [0, 1): decay of the moment and of the norm; ``eps`` ≥ 0: added to each
    gradient's size; ``weight_decay`` ≥ 0. State: ``exp_avg``, ``exp_inf``. Raises ConfigError for a value out of
    range.
    """

    rule = adamax

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "eps", "weight_decay")
        check_fractions(group, where, "betas")
