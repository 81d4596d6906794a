"""Keras's Adafactor."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, KerasOptimizer, LearningRate
from shardstep.rules.functions import col_mean, maximum, mean, minimum, row_mean, sqrt
from shardstep.rules.language import Elements, rule, state


@rule
def adafactor(
    param: Elements,
    grad: Elements,
    row: Elements = state(shape="row"),
    column: Elements = state(shape="column"),
    average: Elements = state("param"),
    *,
    lr: float,
    beta_2_decay: float,
    epsilon_1: float,
    epsilon_2: float,
    clip_threshold: float,
    weight_decay: float = 0.0,
    clipnorm: float = 0.0,
    clipvalue: float = 0.0,
    grad_factor: float = 1.0,
    iterations: int = 0,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite: bool = False,
) -> tuple[Elements, ...]:
    """Shazeer & Stern 2018 (arXiv 1804.04235), without a first moment.

    A vector needs no case of its own: its rows or its columns are single elements, and the other mean cancels
    mean(r). Keras also keeps v, of full size; here it is made when it is needed. With t from 1::

        α = max(ε₂, RMS(θ)) · min(lr, 1 / √t),  β = 1 − t^beta_2_decay
        r ← β r + (1 − β) row_mean(g² + ε₁)
        c ← β c + (1 − β) col_mean(g² + ε₁)
        u = g / √(r / mean(r) · c)
        θ ← θ − α · u / max(1, RMS(u) / clip_threshold)
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    t = iterations + 1
    beta = 1 - t**beta_2_decay
    square = g * g + epsilon_1
    row = beta * row + (1 - beta) * row_mean(square)
    column = beta * column + (1 - beta) * col_mean(square)
    update = g / sqrt(row / mean(row) * column)
    alpha = maximum(epsilon_2, sqrt(mean(param * param))) * minimum(lr, 1 / sqrt(t))
    param = param - alpha * (update / maximum(1.0, sqrt(mean(update * update)) / clip_threshold))
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, row, column, average


class Adafactor(KerasOptimizer):
    """As keras.optimizers.Adafactor, where ``relative_step`` changes nothing either: the rate is min(lr, 1 / √t)
    in any case. It looks at rows and columns. See `KerasOptimizer` for the rest.
    """

    rule = adafactor
    signed = ("beta_2_decay",)

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        beta_2_decay: float = -0.8,
        epsilon_1: float = 1e-30,
        epsilon_2: float = 1e-3,
        clip_threshold: float = 1.0,
        relative_step: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            learning_rate,
            common,
            beta_2_decay=beta_2_decay,
            epsilon_1=epsilon_1,
            epsilon_2=epsilon_2,
            clip_threshold=clip_threshold,
        )
