"""LARS: momentum, with a rate of each tensor's own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero
from shardstep.rules.functions import fma, norm, where
from shardstep.rules.language import Elements, rule, zeros


@rule
def lars(
    param: Elements,
    grad: Elements,
    momentum_buffer: Elements = zeros,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
) -> tuple[Elements, ...]:
    """You, Gitman & Ginsburg 2017 (arXiv 1708.03888), algorithm 1.

    With gradient g, and norms over each tensor::

        r = trust_coefficient · ‖θ‖ / (‖g‖ + weight_decay · ‖θ‖)
        b ← momentum · b + lr · r · (g + weight_decay · θ)
        θ ← θ − b

    The paper does not say what r is where a norm is 0: it is 1 here.
    """
    size, change = norm(param), norm(grad)
    ratio = where((size > 0) and (change > 0), trust_coefficient * size / (change + weight_decay * size), 1.0)
    momentum_buffer = fma(momentum, momentum_buffer, lr * ratio * fma(weight_decay, param, grad))
    return param - momentum_buffer, momentum_buffer


class LARS(Optimizer):
    """LARS, for large batches.

    ``lr`` ≥ 0: step size for all tensors, multiplied by each tensor's own rate; ``momentum`` ≥ 0; ``weight_decay`` ≥ 0;
    ``trust_coefficient`` ≥ 0: how far a tensor moves in a step, over its length. State: ``momentum_buffer``. Raises
    ConfigError for a value out of range.
    """

    rule = lars

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0,
        trust_coefficient: float = 1e-3,
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
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "momentum", "weight_decay", "trust_coefficient")
