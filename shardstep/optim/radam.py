"""RAdam: Adam that waits for its second moment."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import average, average_of_squares, with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions
from shardstep.rules.functions import sqrt
from shardstep.rules.language import Elements, rule, zeros


@rule
def radam(
    param: Elements,
    grad: Elements,
    exp_avg: Elements = zeros,
    exp_avg_sq: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
) -> tuple[Elements, ...]:
    """Liu, Jiang, He, Chen, Liu, Gao & Han 2020 (arXiv 1908.03265).

    With gradient g and step count t from 1::

        g ← g + weight_decay · θ                        or, if decoupled, θ ← θ · (1 − lr · weight_decay)
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        ρ∞ = 2 / (1 − β₂) − 1
        ρ = ρ∞ − 2 t β₂ᵗ / (1 − β₂ᵗ)
        r = √((ρ − 4) (ρ − 2) ρ∞ / ((ρ∞ − 4) (ρ∞ − 2) ρ))
        θ ← θ − lr / (1 − β₁ᵗ) · r · √(1 − β₂ᵗ) · m / (√v + eps)  where ρ > 5, else θ ← θ − lr / (1 − β₁ᵗ) · m

    Differs from the paper as torch does: the bound of ρ is 5, not 4, and eps is added.
    """
    direction = grad
    if decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    else:
        direction = with_decay(grad, param, weight_decay)
    exp_avg = average(exp_avg, direction, betas[0])
    exp_avg_sq = average_of_squares(exp_avg_sq, direction, betas[1])
    rate = lr / (1 - betas[0] ** step)
    longest = 2 / (1 - betas[1]) - 1
    length = longest - 2 * step * betas[1] ** step / (1 - betas[1] ** step)
    if length > 5:
        rectified = sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        param = param - rate * rectified * sqrt(1 - betas[1] ** step) * exp_avg / (sqrt(exp_avg_sq) + eps)
    else:
        param = param - rate * exp_avg
    return param, exp_avg, exp_avg_sq


class RAdam(Optimizer):
    """Rectified Adam, as ``torch.optim.RAdam``.

    ``lr`` ≥ 0: step size; ``betas`` in [0, 1): decay of the two moments per step; ``eps`` ≥ 0: added to the root of the
    second moment; ``weight_decay`` ≥ 0, a part of the gradient or decoupled. State: ``exp_avg``, ``exp_avg_sq``.
    Raises ConfigError for a value out of range.
    """

    rule = radam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "eps", "weight_decay")
        check_fractions(group, where, "betas")
