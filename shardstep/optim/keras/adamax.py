"""Keras's Adamax."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, KerasOptimizer, LearningRate
from shardstep.rules.functions import maximum
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def adamax(
    param: Elements,
    grad: Elements,
    momentum: Elements = zeros,
    infinity_norm: Elements = zeros,
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
    """Kingma & Ba 2015 (arXiv 1412.6980), section 7.1.

    With ε added after the maximum, and t from 1::

        m ← β₁ m + (1 − β₁) g
        u ← max(β₂ u, |g|)
        θ ← θ − lr · m / ((1 − β₁ᵗ) (u + ε))
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    momentum = beta_1 * momentum + (1 - beta_1) * g
    infinity_norm = maximum(beta_2 * infinity_norm, abs(g))
    param = param - lr * momentum / ((1 - beta_1 ** (iterations + 1)) * (infinity_norm + epsilon))
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, momentum, infinity_norm, average


class Adamax(KerasOptimizer):
    """As keras.optimizers.Adamax. See `KerasOptimizer` for the rest."""

    rule = adamax

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
