"""Adadelta."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.groups import number
from shardstep.optim.moments import average_of_squares, with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, refusal
from shardstep.rules.functions import sqrt
from shardstep.rules.language import Elements, rule, zeros


@rule
def adadelta(
    param: Elements,
    grad: Elements,
    square_avg: Elements = zeros,
    acc_delta: Elements = zeros,
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> tuple[Elements, ...]:
    """Zeiler 2012 (arXiv 1212.5701).

    With gradient g::

        g ← g + weight_decay · θ
        v ← ρ v + (1 − ρ) g²
        d = √(u + eps) / √(v + eps) · g
        u ← ρ u + (1 − ρ) d²
        θ ← θ − lr · d

    Differs from the paper as torch does: it has no lr.
    """
    direction = with_decay(grad, param, weight_decay)
    square_avg = average_of_squares(square_avg, direction, rho)
    delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * direction
    acc_delta = average_of_squares(acc_delta, delta, rho)
    return param - lr * delta, square_avg, acc_delta


class Adadelta(Optimizer):
    """Adadelta, as ``torch.optim.Adadelta``.

    ``lr`` ≥ 0: what the update is multiplied by; ``rho`` in [0, 1]: decay of the two averages per step; ``eps`` ≥ 0:
    added under both roots; ``weight_decay`` ≥ 0. State: ``square_avg``, ``acc_delta``. Raises ConfigError for a
    value out of range.
    """

    rule = adadelta

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "eps", "weight_decay")
        if not 0.0 <= number(group["rho"], "rho", where) <= 1.0:
            raise refusal("0 ≤ rho ≤ 1", where, group["rho"])
