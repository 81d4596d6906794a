"""Keras's RMSprop."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, KerasOptimizer, LearningRate
from shardstep.rules.functions import sqrt
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def rmsprop(
    param: Elements,
    grad: Elements,
    velocity: Elements = zeros,
    momentum_buffer: Elements = zeros,
    average_gradient: Elements = zeros,
    average: Elements = state("param"),
    *,
    lr: float,
    rho: float,
    momentum: float,
    epsilon: float,
    centered: bool = False,
    weight_decay: float = 0.0,
    clipnorm: float = 0.0,
    clipvalue: float = 0.0,
    grad_factor: float = 1.0,
    iterations: int = 0,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite: bool = False,
) -> tuple[Elements, ...]:
    """Tieleman & Hinton 2012.

    With ε inside the root, and the learning rate inside the momentum buffer::

        v ← ρ v + (1 − ρ) g²
        d = v + ε                       centered: a ← ρ a + (1 − ρ) g, d = v − a² + ε
        b ← momentum · b + lr · g / √d
        θ ← θ − b
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    velocity = rho * velocity + (1 - rho) * (g * g)
    if centered:
        average_gradient = rho * average_gradient + (1 - rho) * g
        denominator = velocity - average_gradient * average_gradient + epsilon
    else:
        denominator = velocity + epsilon
    increment = lr * g / sqrt(denominator)
    if momentum > 0:
        momentum_buffer = momentum * momentum_buffer + increment
        increment = momentum_buffer
    param = param - increment
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, velocity, momentum_buffer, average_gradient, average


class RMSprop(KerasOptimizer):
    """As keras.optimizers.RMSprop. See `KerasOptimizer` for the rest."""

    rule = rmsprop

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        rho: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 1e-7,
        centered: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, learning_rate, common, rho=rho, momentum=momentum, epsilon=epsilon, centered=centered)
