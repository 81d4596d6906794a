"""NAdam: Adam with Nesterov's momentum."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import average, average_of_squares, with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions
from shardstep.rules.functions import sqrt
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def nadam(
    param: Elements,
    grad: Elements,
    mu_product: Elements = state(1.0, shape="tensor"),
    exp_avg: Elements = zeros,
    exp_avg_sq: Elements = zeros,
    *,
    step: int,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
) -> tuple[Elements, ...]:
    """Dozat 2016 (Incorporating Nesterov Momentum into Adam), with the schedule of momentum of Sutskever's.

    With gradient g and step count t from 1, and one product p of all μ so far for each tensor::

        g ← g + weight_decay · θ                        or, if decoupled, θ ← θ · (1 − lr · weight_decay)
        μ(t) = β₁ (1 − 0.96 ^ (t · momentum_decay) / 2)
        p ← p · μ(t)
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        n = (1 − μ(t)) / (1 − p) · g + μ(t + 1) / (1 − p · μ(t + 1)) · m
        θ ← θ − lr · n / (√(v / (1 − β₂ᵗ)) + eps)

    Differs from the paper as torch does: m decays by β₁, not by μ(t).
    """
    direction = grad
    if decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    else:
        direction = with_decay(grad, param, weight_decay)
    mu = betas[0] * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = betas[0] * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    mu_product = mu_product * mu
    exp_avg = average(exp_avg, direction, betas[0])
    exp_avg_sq = average_of_squares(exp_avg_sq, direction, betas[1])
    denominator = sqrt(exp_avg_sq / (1 - betas[1] ** step)) + eps
    ahead = lr * (1 - mu) / (1 - mu_product) * direction + lr * mu_next / (1 - mu_product * mu_next) * exp_avg
    return param - ahead / denominator, mu_product, exp_avg, exp_avg_sq


class NAdam(Optimizer):
    """Adam with Nesterov's momentum, as ``torch.optim.NAdam``.

    ``lr`` ≥ 0: step size; ``betas`` in [0, 1): decay of the two moments per step; ``eps`` ≥ 0: added to the root of the
    second moment; ``weight_decay`` ≥ 0, a part of the gradient or decoupled; ``momentum_decay`` ≥ 0: how fast the
    momentum rises to its full size. State: ``mu_product``, ``exp_avg``, ``exp_avg_sq``. Raises ConfigError for a
    value out of range.
    """

    rule = nadam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "eps", "weight_decay", "momentum_decay")
        check_fractions(group, where, "betas")
