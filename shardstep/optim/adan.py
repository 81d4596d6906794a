"""Adan: moments of the gradient and of its change."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import average, average_of_squares
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions
from shardstep.rules.functions import fma, sqrt
from shardstep.rules.language import Elements, rule, zeros


@rule
def adan(
    param: Elements,
    grad: Elements,
    exp_avg: Elements = zeros,
    exp_avg_diff: Elements = zeros,
    exp_avg_sq: Elements = zeros,
    pre_grad: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Elements, ...]:
    """Xie, Zhou, Li, Lin & Yan 2022 (arXiv 2208.06677), algorithm 1 without restarts.

    With gradient g, that of the step before h (g itself in the first step), and step count t from 1::

        m ← β₁ m + (1 − β₁) g
        d ← β₂ d + (1 − β₂) (g − h)
        n ← β₃ n + (1 − β₃) (g + β₂ (g − h))²
        u = (m / (1 − β₁ᵗ) + β₂ d / (1 − β₂ᵗ)) / (√(n / (1 − β₃ᵗ)) + eps)
        θ ← (θ − lr · u) / (1 + lr · weight_decay)
        h ← g

    Differs from the paper as its authors' code does: β is what the paper calls 1 − β, and the moments are corrected for
    their bias.
    """
    change = grad - (grad if step == 1 else pre_grad)
    exp_avg = average(exp_avg, grad, betas[0])
    exp_avg_diff = average(exp_avg_diff, change, betas[1])
    exp_avg_sq = average_of_squares(exp_avg_sq, fma(betas[1], change, grad), betas[2])
    denominator = sqrt(exp_avg_sq / (1 - betas[2] ** step)) + eps
    numerator = exp_avg / (1 - betas[0] ** step) + betas[1] / (1 - betas[1] ** step) * exp_avg_diff
    param = (param - lr * numerator / denominator) / (1 + lr * weight_decay)
    return param, exp_avg, exp_avg_diff, exp_avg_sq, grad


class Adan(Optimizer):
    """Adan, with the arguments of its authors' implementation.

    ``lr`` ≥ 0: step size; ``betas``, three in [0, 1): decay of the moments of the gradient, of its change, and of the
    square of both together; ``eps`` ≥ 0: added to the root of the third; ``weight_decay`` ≥ 0: decoupled,
    multiplied by ``lr``. State: ``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq``, ``pre_grad``. Raises ConfigError for
    a value out of range.
    """

    rule = adan

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
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
        check_fractions(group, where, "betas", count=3)
