"""Lion: the sign of a momentum."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import average
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions
from shardstep.rules.functions import sign
from shardstep.rules.language import Elements, rule, zeros


@rule
def lion(
    param: Elements,
    grad: Elements,
    exp_avg: Elements = zeros,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> tuple[Elements, ...]:
    """Chen, Liang, Huang, Real, Wang, Liu et al. 2023 (arXiv 2302.06675), algorithm 2.

    With gradient g::

        c = β₁ m + (1 − β₁) g
        m ← β₂ m + (1 − β₂) g
        θ ← θ · (1 − lr · weight_decay) − lr · sign(c)
    """
    direction = sign(average(exp_avg, grad, betas[0]))
    exp_avg = average(exp_avg, grad, betas[1])
    return param * (1 - lr * weight_decay) - lr * direction, exp_avg


class Lion(Optimizer):
    """Lion, with the arguments of its authors' implementation.

    ``lr`` ≥ 0: step size, some ten times smaller than Adam's; ``betas`` in [0, 1): share of the momentum in the
    direction, and its decay per step; ``weight_decay`` ≥ 0: decoupled, multiplied by ``lr``. State: ``exp_avg``.
    Raises ConfigError for a value out of range.
    """

    rule = lion

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
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
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "weight_decay")
        check_fractions(group, where, "betas")
