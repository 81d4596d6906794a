"""Adagrad."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero
from shardstep.rules.functions import fma, sqrt
from shardstep.rules.language import Elements, rule, zeros


@rule
def adagrad(
    param: Elements,
    grad: Elements,
    sum: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
) -> tuple[Elements, ...]:
    """Duchi, Hazan & Singer 2011 (Adaptive Subgradient Methods, JMLR 12).

    Rounded as torch's fused kernel rounds all but the last few elements of an array. With gradient g and step
    count t from 1, the sum s starting from initial_accumulator_value::

        g ← g + weight_decay · θ
        s ← s + g²
        θ ← θ − lr / (1 + (t − 1) · lr_decay) · g / (√s + eps)

    Differs from the paper as torch does: it has no lr_decay, and its δ is eps.
    """
    direction = with_decay(grad, param, weight_decay)
    sum = fma(direction, direction, initial_accumulator_value if step == 1 else sum)
    param = param - lr / (1 + (step - 1) * lr_decay) * direction / (sqrt(sum) + eps)
    return param, sum


class Adagrad(Optimizer):
    """Adagrad, as ``torch.optim.Adagrad``.

    ``lr`` ≥ 0: step size; ``lr_decay`` ≥ 0: how fast it falls; ``weight_decay`` ≥ 0; ``initial_accumulator_value`` ≥ 0:
    where the sum of squares starts; ``eps`` ≥ 0: added to its root. State: ``sum``, from the first step on. Raises
    ConfigError for a value out of range.
    """

    rule = adagrad

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")
