"""Averaged stochastic gradient descent."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero
from shardstep.rules.functions import lerp, maximum, where
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def asgd(
    param: Elements,
    grad: Elements,
    eta: Elements = state(shape="tensor"),
    mu: Elements = state(1.0, shape="tensor"),
    ax: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
) -> tuple[Elements, ...]:
    """Polyak & Juditsky 1992 (doi 10.1137/0330046), in the form of Bottou's.

    With gradient g and step count t from 1, and one eta and one mu for each tensor, which start as lr and 1::

        g ← g + weight_decay · θ
        θ ← θ · (1 − lambd · eta) − eta · g
        ax ← ax + mu · (θ − ax)
        eta ← lr / (1 + lambd · lr · t) ^ alpha
        mu ← 1 / max(1, t − t0)

    As in torch, ax is kept for the user to read: θ itself is not averaged.
    """
    direction = with_decay(grad, param, weight_decay)
    rate = lr if step == 1 else eta
    param = param * (1 - lambd * rate) - rate * direction
    ax = where(mu == 1, param, lerp(ax, param, mu))
    eta = lr / (1 + lambd * lr * step) ** alpha
    mu = 1 / maximum(1.0, step - t0)
    return param, eta, mu, ax


class ASGD(Optimizer):
    """Averaged gradient descent, as ``torch.optim.ASGD``.

    ``lr`` ≥ 0: step size at first; ``lambd``: decay of parameters and of the step size; ``alpha``: power of the latter;
    ``t0``: the step at which averaging begins; ``weight_decay`` ≥ 0. State: ``eta``, ``mu`` and the average ``ax``.
    Raises ConfigError for a value out of range.
    """

    rule = asgd

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lambd=lambd,
            alpha=alpha,
            t0=t0,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "weight_decay")
