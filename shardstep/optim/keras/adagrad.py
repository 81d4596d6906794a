"""Keras's Adagrad and Adadelta."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, KerasOptimizer, LearningRate
from shardstep.rules.functions import sqrt
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def adagrad(
    param: Elements,
    grad: Elements,
    accumulator: Elements = zeros,
    average: Elements = state("param"),
    *,
    step: int,
    lr: float,
    initial_accumulator_value: float,
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
    """Duchi et al. 2011.

    With ε inside the root; a starts from ``initial_accumulator_value``::

        a ← a + g²
        θ ← θ − lr · g / √(a + ε)
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    accumulator = (initial_accumulator_value if step == 1 else accumulator) + g * g
    param = param - lr * g / sqrt(accumulator + epsilon)
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, accumulator, average


@rule
def adadelta(
    param: Elements,
    grad: Elements,
    accumulated_grad: Elements = zeros,
    accumulated_delta_var: Elements = zeros,
    average: Elements = state("param"),
    *,
    lr: float,
    rho: float,
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
    """Zeiler 2012 (arXiv 1212.5701).

    With ε inside both roots::

        a ← ρ a + (1 − ρ) g²
        δ = √(d + ε) · g / √(a + ε)
        d ← ρ d + (1 − ρ) δ²
        θ ← θ − lr · δ
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    accumulated_grad = rho * accumulated_grad + (1 - rho) * (g * g)
    delta = sqrt(accumulated_delta_var + epsilon) * g / sqrt(accumulated_grad + epsilon)
    accumulated_delta_var = rho * accumulated_delta_var + (1 - rho) * (delta * delta)
    param = param - lr * delta
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, accumulated_grad, accumulated_delta_var, average


class Adagrad(KerasOptimizer):
    """As keras.optimizers.Adagrad. See `KerasOptimizer` for the rest."""

    rule = adagrad

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: float = 1e-7,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, learning_rate, common, initial_accumulator_value=initial_accumulator_value, epsilon=epsilon
        )


class Adadelta(KerasOptimizer):
    """As keras.optimizers.Adadelta. See `KerasOptimizer` for the rest."""

    rule = adadelta

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        rho: float = 0.95,
        epsilon: float = 1e-7,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, learning_rate, common, rho=rho, epsilon=epsilon)
