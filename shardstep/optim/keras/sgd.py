"""Keras's SGD."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, KerasOptimizer, LearningRate
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def sgd(
    param: Elements,
    grad: Elements,
    momentum_buffer: Elements = zeros,
    average: Elements = state("param"),
    *,
    lr: float,
    momentum: float,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clipnorm: float = 0.0,
    clipvalue: float = 0.0,
    grad_factor: float = 1.0,
    iterations: int = 0,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite: bool = False,
) -> tuple[Elements, ...]:
    """The learning rate is inside the momentum buffer, so that a step keeps the rate it was taken with.

    Without momentum, ``nesterov`` is ignored::

        m ← momentum · m − lr · g
        θ ← θ + m                       with nesterov: θ + momentum · m − lr · g
        θ ← θ − lr · g                  without momentum
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    if momentum > 0:
        momentum_buffer = momentum * momentum_buffer - lr * g
        move = momentum * momentum_buffer - lr * g if nesterov else momentum_buffer
        param = param + move
    else:
        param = param - lr * g
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, momentum_buffer, average


class SGD(KerasOptimizer):
    """As keras.optimizers.SGD. See `KerasOptimizer` for the rest."""

    rule = sgd

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, learning_rate, common, momentum=momentum, nesterov=nesterov)
