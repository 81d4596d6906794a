"""Keras's LAMB."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, KerasOptimizer, LearningRate
from shardstep.rules.functions import norm, sqrt, where
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def lamb(
    param: Elements,
    grad: Elements,
    momentum: Elements = zeros,
    velocity: Elements = zeros,
    average: Elements = state("param"),
    *,
    lr: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float = 0.0,
    clipnorm: float = 0.0,
    clipvalue: float = 0.0,
    grad_factor: float = 1.0,
    iterations: int = 0,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite: bool = False,
) -> tuple[Elements, ...]:
    """You et al. 2020 (arXiv 1904.00962), but the decay comes first and is no part of the update.

    The ratio of norms is 1 where one of them is 0; t counts from 1::

        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        u = m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)
        θ ← θ − ‖θ‖ / ‖u‖ · lr · u
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    t = iterations + 1
    momentum = beta_1 * momentum + (1 - beta_1) * g
    velocity = beta_2 * velocity + (1 - beta_2) * (g * g)
    update = momentum / (1 - beta_1**t) / (sqrt(velocity / (1 - beta_2**t)) + epsilon)
    size, change = norm(param), norm(update)
    ratio = where((size > 0) and (change > 0), size / change, 1.0)
    param = param - ratio * lr * update
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, momentum, velocity, average


class Lamb(KerasOptimizer):
    """As keras.optimizers.Lamb. See `KerasOptimizer` for the rest."""

    rule = lamb

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, learning_rate, common, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)
