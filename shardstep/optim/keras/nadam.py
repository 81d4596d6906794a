"""Keras's Nadam."""

from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, KerasOptimizer, LearningRate
from shardstep.rules.functions import sqrt
from shardstep.rules.language import Elements, rule, state, zeros
from shardstep.rules.scalars.arithmetic import power


@rule
def nadam(
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
    u_product: float = 1.0,
    weight_decay: float = 0.0,
    clipnorm: float = 0.0,
    clipvalue: float = 0.0,
    grad_factor: float = 1.0,
    iterations: int = 0,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite: bool = False,
) -> tuple[Elements, ...]:
    """Dozat 2016.

    With t from 1; the product P of all μ is one number of the optimizer, kept in its groups::

        μₜ = β₁ (1 − ½ · 0.96ᵗ),  P ← P · μₜ
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        m̂ = μₜ₊₁ m / (1 − P μₜ₊₁) + (1 − μₜ) g / (1 − P)
        θ ← θ − lr · m̂ / (√(v / (1 − β₂ᵗ)) + ε)
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    t = iterations + 1
    now, following = beta_1 * (1 - 0.5 * 0.96**t), beta_1 * (1 - 0.5 * 0.96 ** (t + 1))
    product = u_product * now
    momentum = beta_1 * momentum + (1 - beta_1) * g
    velocity = beta_2 * velocity + (1 - beta_2) * (g * g)
    ahead = following * momentum / (1 - product * following) + (1 - now) * g / (1 - product)
    param = param - lr * ahead / (sqrt(velocity / (1 - beta_2**t)) + epsilon)
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, momentum, velocity, average


class Nadam(KerasOptimizer):
    """As keras.optimizers.Nadam. See `KerasOptimizer` for the rest."""

    rule = nadam

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

    def advance(self, group: dict[str, Any]) -> None:
        group["u_product"] *= group["beta_1"] * (1 - 0.5 * power(0.96, group["iterations"] + 1))
        super().advance(group)
