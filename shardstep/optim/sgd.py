"""Stochastic gradient descent, with momentum."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, refusal
from shardstep.rules.functions import fma
from shardstep.rules.language import Elements, rule, zeros


@rule
def sgd(
    param: Elements,
    grad: Elements,
    momentum_buffer: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Elements, ...]:
    """Sutskever, Martens, Dahl & Hinton 2013 (On the importance of initialization and momentum in deep learning).

    Rounded as torch's fused kernel rounds all but the last few elements of an array. With gradient g and step
    count t from 1::

        g ← g + weight_decay · θ
        b ← g in the first step, then momentum · b + (1 − dampening) · g
        θ ← θ − lr · b                                  or, with nesterov, θ ← θ − lr · (g + momentum · b)

    Without momentum, b is g and no state is kept. Differs from the paper as torch does: lr is not a part of the
    buffer, so a change of lr acts at once.
    """
    direction = with_decay(grad, param, weight_decay)
    if momentum != 0:
        later = fma(1 - dampening, direction, momentum * momentum_buffer)
        momentum_buffer = direction if step == 1 else later
        direction = fma(momentum, momentum_buffer, direction) if nesterov else momentum_buffer
    return fma(-lr, direction, param), momentum_buffer


class SGD(Optimizer):
    """Gradient descent, as ``torch.optim.SGD``.

    ``lr`` ≥ 0: step size; ``momentum`` ≥ 0; ``dampening`` of the momentum; ``weight_decay`` ≥ 0; ``nesterov``: look one
    step of momentum ahead, which needs a momentum and no dampening. State: ``momentum_buffer`` where there is a
    momentum. Raises ConfigError for a value out of range.
    """

    rule = sgd

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            got = f"momentum={group['momentum']} and dampening={group['dampening']}"
            raise refusal("momentum > 0 and dampening = 0 with nesterov", where, got)
