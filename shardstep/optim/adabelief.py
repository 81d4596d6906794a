"""AdaBelief: Adam, with the variance around the momentum."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import average, average_of_squares
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions
from shardstep.rules.functions import sqrt
from shardstep.rules.language import Elements, rule, zeros


@rule
def adabelief(
    param: Elements,
    grad: Elements,
    exp_avg: Elements = zeros,
    exp_avg_var: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
) -> tuple[Elements, ...]:
    """Zhuang, Tang, Ding, Tatikonda, Dvornek, Papademetris & Duncan 2020 (arXiv 2010.07468), algorithm 2.

    With gradient g and step count t from 1::

        θ ← θ · (1 − lr · weight_decay)
        m ← β₁ m + (1 − β₁) g
        s ← β₂ s + (1 − β₂) (g − m)² + eps
        θ ← θ − lr / (1 − β₁ᵗ) · m / (√(s / (1 − β₂ᵗ)) + eps)

    The decoupled decay and the eps of 1e-16 are those of its authors' code; its rectification is left out, as in the
    paper.
    """
    param = param * (1 - lr * weight_decay)
    exp_avg = average(exp_avg, grad, betas[0])
    exp_avg_var = average_of_squares(exp_avg_var, grad - exp_avg, betas[1]) + eps
    denominator = sqrt(exp_avg_var / (1 - betas[1] ** step)) + eps
    param = param - lr / (1 - betas[0] ** step) * exp_avg / denominator
    return param, exp_avg, exp_avg_var


class AdaBelief(Optimizer):
    """AdaBelief.

    ``lr`` ≥ 0: step size; ``betas`` in [0, 1): decay of momentum and variance per step; ``eps`` ≥ 0: added to the
    variance in every step, and to its root; ``weight_decay`` ≥ 0: decoupled, multiplied by ``lr``. State:
    ``exp_avg``, ``exp_avg_var``. Raises ConfigError for a value out of range.
    """

    rule = adabelief

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "eps", "weight_decay")
        check_fractions(group, where, "betas")
