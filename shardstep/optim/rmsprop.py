"""RMSprop, plain or centered, with momentum."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import average, average_of_squares, with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero
from shardstep.rules.functions import fma, maximum, sqrt
from shardstep.rules.language import Elements, rule, zeros


@rule
def rmsprop(
    param: Elements,
    grad: Elements,
    square_avg: Elements = zeros,
    momentum_buffer: Elements = zeros,
    grad_avg: Elements = zeros,
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
) -> tuple[Elements, ...]:
    """Tieleman & Hinton 2012 (Coursera, lecture 6.5); centered and with momentum: Graves 2013 (arXiv 1308.0850).

    With gradient g::

        g ← g + weight_decay · θ
        v ← alpha · v + (1 − alpha) g²
        a ← alpha · a + (1 − alpha) g, if centered
        d = g / (√v + eps)                              or, if centered, g / (√(v − a²) + eps)
        b ← momentum · b + d
        θ ← θ − lr · b                                  or, without momentum, θ ← θ − lr · d

    Differs from Graves as torch does: eps is outside of the root, and lr not a part of the buffer. Where rounding makes
    v − a² negative, it is 0 here, and torch gives NaN.
    """
    direction = with_decay(grad, param, weight_decay)
    square_avg = average_of_squares(square_avg, direction, alpha)
    variance = square_avg
    if centered:
        grad_avg = average(grad_avg, direction, alpha)
        variance = maximum(fma(-grad_avg, grad_avg, square_avg), 0.0)
    denominator = sqrt(variance) + eps
    if momentum != 0:
        momentum_buffer = momentum * momentum_buffer + direction / denominator
        param = param - lr * momentum_buffer
    else:
        param = param - lr * direction / denominator
    return param, square_avg, momentum_buffer, grad_avg


class RMSprop(Optimizer):
    """RMSprop, as ``torch.optim.RMSprop``.

    ``lr`` ≥ 0: step size; ``alpha`` ≥ 0: decay of the averages per step; ``eps`` ≥ 0: added to the root;
    ``weight_decay`` ≥ 0; ``momentum`` ≥ 0; ``centered``: divide by the standard deviation. State: ``square_avg``,
    with a momentum ``momentum_buffer``, if centered ``grad_avg``. Raises ConfigError for a value out of range.
    """

    rule = rmsprop

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "eps", "momentum", "weight_decay", "alpha")
