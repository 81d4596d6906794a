"""Keras's FTRL."""

from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from shardstep.errors import ConfigError
from shardstep.optim.groups import number
from shardstep.optim.keras.apply import averaged, clipped
from shardstep.optim.keras.optimizer import Common, KerasOptimizer, LearningRate
from shardstep.rules.functions import clip, sqrt
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def ftrl(
    param: Elements,
    grad: Elements,
    accumulator: Elements = zeros,
    linear: Elements = zeros,
    average: Elements = state("param"),
    *,
    step: int,
    lr: float,
    learning_rate_power: float,
    initial_accumulator_value: float,
    l1_regularization_strength: float,
    l2_regularization_strength: float,
    l2_shrinkage_regularization_strength: float,
    beta: float,
    weight_decay: float = 0.0,
    clipnorm: float = 0.0,
    clipvalue: float = 0.0,
    grad_factor: float = 1.0,
    iterations: int = 0,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite: bool = False,
) -> tuple[Elements, ...]:
    """McMahan et al. 2013.

    n starts from ``initial_accumulator_value``, and p = −learning_rate_power::

        n₁ = n + g²
        z ← z + g + 2 · shrinkage · θ − (n₁ᵖ − nᵖ) / lr · θ
        θ ← (clip(z, ±l1) − z) / (n₁ᵖ / lr + 2 (l2 + beta / (2 lr)))
        n ← n₁
    """
    g = clipped(grad, grad_factor, clipnorm, clipvalue)
    param = param * (1 - weight_decay * lr)
    before = initial_accumulator_value if step == 1 else accumulator
    accumulator = before + g * g
    if learning_rate_power == -0.5:
        old, new = sqrt(before), sqrt(accumulator)
    else:
        old, new = before ** (-learning_rate_power), accumulator ** (-learning_rate_power)
    shrunk = g + 2 * l2_shrinkage_regularization_strength * param
    linear = linear + (shrunk - (new - old) / lr * param)
    quadratic = new / lr + 2 * (l2_regularization_strength + beta / (2 * lr))
    kept = clip(linear, -l1_regularization_strength, l1_regularization_strength)
    param = (kept - linear) / quadratic
    param, average = averaged(param, average, iterations, use_ema, ema_momentum, ema_overwrite)
    return param, accumulator, linear, average


class Ftrl(KerasOptimizer):
    """As keras.optimizers.Ftrl. See `KerasOptimizer` for the rest."""

    rule = ftrl
    signed = ("learning_rate_power",)

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        learning_rate_power: float = -0.5,
        initial_accumulator_value: float = 0.1,
        l1_regularization_strength: float = 0.0,
        l2_regularization_strength: float = 0.0,
        l2_shrinkage_regularization_strength: float = 0.0,
        beta: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            learning_rate,
            common,
            learning_rate_power=learning_rate_power,
            initial_accumulator_value=initial_accumulator_value,
            l1_regularization_strength=l1_regularization_strength,
            l2_regularization_strength=l2_regularization_strength,
            l2_shrinkage_regularization_strength=l2_shrinkage_regularization_strength,
            beta=beta,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        super().check_group(group, where)
        power = group["learning_rate_power"]
        if not number(power, "learning_rate_power", where) <= 0.0:
            raise ConfigError(f"expected learning_rate_power ≤ 0 in {where}, got {power}; give a value in that range")
