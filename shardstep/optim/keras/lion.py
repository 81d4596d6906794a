"""Keras's Lion."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, KerasOptimizer, LearningRate
from shardstep.rules.functions import sign
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def lion(
    param: Elements,
    grad: Elements,
    momentum: Elements = zeros,
    average: Elements = state("param"),
    *,
    lr: float,
    beta_1: float,
    beta_2: float,
    weight_decay: float = 0.0,
    clipnorm: float = 0.0,
    clipvalue: float = 0.0,
    grad_factor: float = 1.0,
    iterations: int = 0,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite: bool = False,
) -> tuple[Elements, ...]:
    """Chen et al. 2023 (arXiv 2302.06675).

    In this order::

        θ ← θ − lr · sign(β₁ m + (1 − β₁) g)
        m ← β₂ m + (1 − β₂) g
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    param = param - lr * sign(beta_1 * momentum + (1 - beta_1) * g)
    momentum = beta_2 * momentum + (1 - beta_2) * g
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, momentum, average


class Lion(KerasOptimizer):
    """As keras.optimizers.Lion. See `KerasOptimizer` for the rest."""

    rule = lion

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, learning_rate, common, beta_1=beta_1, beta_2=beta_2)
