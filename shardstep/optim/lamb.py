"""LAMB: Adam, with an update as long as each tensor's parameters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import average, average_of_squares
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions
from shardstep.rules.functions import fma, norm, sqrt, where
from shardstep.rules.language import Elements, rule, zeros


@rule
def lamb(
    param: Elements,
    grad: Elements,
    exp_avg: Elements = zeros,
    exp_avg_sq: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> tuple[Elements, ...]:
    """You, Li, Reddi, Hseu, Kumar, Bhojanapalli et al. 2020 (arXiv 1904.00962), algorithm 2.

    With gradient g, step count t from 1, and norms over each tensor::

        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        u = m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + eps) + weight_decay · θ
        θ ← θ − lr · ‖θ‖ / ‖u‖ · u

    The paper's φ is the identity here, and the ratio of norms is 1 where one of them is 0.
    """
    exp_avg = average(exp_avg, grad, betas[0])
    exp_avg_sq = average_of_squares(exp_avg_sq, grad, betas[1])
    update = exp_avg / (1 - betas[0] ** step) / (sqrt(exp_avg_sq / (1 - betas[1] ** step)) + eps)
    update = fma(weight_decay, param, update)
    size, change = norm(param), norm(update)
    ratio = where((size > 0) and (change > 0), size / change, 1.0)
    return param - lr * ratio * update, exp_avg, exp_avg_sq


class LAMB(Optimizer):
    """LAMB, for large batches.

    ``lr`` ≥ 0: length of the update over that of the parameters; ``betas`` in [0, 1): decay of the two moments per
    step; ``eps`` ≥ 0: added to the root of the second moment; ``weight_decay`` ≥ 0: a part of the update. State:
    ``exp_avg``, ``exp_avg_sq``. Raises ConfigError for a value out of range.
    """

    rule = lamb

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
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
