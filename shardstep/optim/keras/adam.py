"""Keras's Adam and AdamW, which are one rule."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from shardstep.errors import ConfigError
from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, CommonButDecay, KerasOptimizer, LearningRate
from shardstep.rules.functions import maximum, sqrt
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def adam(
    param: Elements,
    grad: Elements,
    momentum: Elements = zeros,
    velocity: Elements = zeros,
    velocity_hat: Elements = zeros,
    average: Elements = state("param"),
    *,
    lr: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    amsgrad: bool = False,
    weight_decay: float = 0.0,
    clipnorm: float = 0.0,
    clipvalue: float = 0.0,
    grad_factor: float = 1.0,
    iterations: int = 0,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite: bool = False,
) -> tuple[Elements, ...]:
    """Kingma & Ba 2015 (arXiv 1412.6980), with the "epsilon hat" of its section 2 and, with ``amsgrad``, the maximum
    of Reddi et al. 2018. With t from 1::

        θ ← θ · (1 − weight_decay · lr)
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        θ ← θ − lr √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)        (amsgrad: the largest v so far)
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    t = iterations + 1
    momentum = beta_1 * momentum + (1 - beta_1) * g
    velocity = beta_2 * velocity + (1 - beta_2) * (g * g)
    if amsgrad:
        velocity_hat = maximum(velocity_hat, velocity)
        largest = velocity_hat
    else:
        largest = velocity
    alpha = lr * sqrt(1 - beta_2**t) / (1 - beta_1**t)
    param = param - alpha * momentum / (sqrt(largest) + epsilon)
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, momentum, velocity, velocity_hat, average


class Adam(KerasOptimizer):
    """As keras.optimizers.Adam; its ``weight_decay`` is decoupled. See `KerasOptimizer` for the rest."""

    rule = adam

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, learning_rate, common, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, amsgrad=amsgrad)


class AdamW(KerasOptimizer):
    """As keras.optimizers.AdamW: Adam with ``weight_decay`` from the start. See `KerasOptimizer` for the rest."""

    rule = adam

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        **common: Unpack[CommonButDecay],
    ) -> None:
        if weight_decay is None:
            raise ConfigError("expected weight_decay to be a number for AdamW, got None; give one, or use Adam")
        given: Common = {**common, "weight_decay": weight_decay}
        super().__init__(params, learning_rate, given, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, amsgrad=amsgrad)
