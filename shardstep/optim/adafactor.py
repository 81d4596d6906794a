"""Adafactor: second moments of matrices kept as one number for each row and one for each column."""

from collections.abc import Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from shardstep.errors import ConfigError
from shardstep.optim.groups import number
from shardstep.optim.optimizer import Optimizer
from shardstep.rules.functions import col_mean, lerp, maximum, mean, minimum, row_mean, sqrt, where
from shardstep.rules.language import Elements, rule, state, zeros


@rule
def adafactor(
    param: Elements,
    grad: Elements,
    row_var: Elements = state(shape="row"),
    col_var: Elements = state(shape="column"),
    variance: Elements = zeros,
    *,
    step: int,
    ndim: int,
    machine_eps: float,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float, float] = (-1.0, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
) -> tuple[Elements, ...]:
    """Shazeer & Stern 2018 (arXiv 1804.04235), as torch arranges it.

    With gradient G, step count t from 1 and β = t^beta2_decay; R and C are the means over rows and columns, and for
    what is no matrix V is the average itself::

        α ← max(ε₂, rms(θ)) · min(lr, 1 / √t)
        θ ← θ · (1 − lr · weight_decay)
        R ← R + β (mean over each row of G² − R),  C ← C + β (mean over each column of G² − C)
        V ← R Cᵀ / max(mean of R, ε₁)
        U ← G / √max(V, ε₁²)
        θ ← θ − α U / max(1, rms(U) / d)

    ε₁ below zero stands for the rounding unit of what is computed in.
    """
    beta, floor = step**beta2_decay, where(eps[0] < 0, machine_eps, eps[0])
    size = maximum(eps[1], mean(param * param) ** 0.5) * minimum(lr, 1 / step**0.5)
    param = param * (1 - lr * weight_decay)
    if ndim > 1:
        row_var = lerp(row_var, row_mean(grad * grad), beta)
        col_var = lerp(col_var, col_mean(grad * grad), beta)
        estimate = row_var * (col_var / maximum(col_mean(row_var), floor))
    else:
        variance = lerp(variance, grad * grad, beta)
        estimate = variance
    update = grad / sqrt(maximum(estimate, floor * floor))
    param = param - size / maximum(1.0, mean(update * update) ** 0.5 / d) * update
    return param, row_var, col_var, variance


class Adafactor(Optimizer):
    """Adafactor with torch's arguments; ``foreach`` is accepted, and means nothing here.

    ``params``: tensors, (name, tensor) pairs or groups, as for any torch optimizer. ``lr`` ≥ 0: the largest relative
    step size; ``beta2_decay`` ≤ 0: the exponent of the step count in the decay of the averages; ``eps``: the least
    second moment (its root ≥ 0; None: the rounding unit of what the parameter is updated in) and the least scale of a
    parameter (≥ 0); ``d`` ≥ 1: where updates are clipped; ``weight_decay`` ≥ 0: decoupled, multiplied by ``lr``.
    State, float32 for low-precision parameters and otherwise of the parameter's dtype: ``row_var`` and ``col_var`` for
    parameters of two dimensions or more, ``variance`` for the others.

    Raises ConfigError for a value out of range, OwnershipError for a parameter given twice.
    """

    rule = adafactor

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        given = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, **given, foreach=foreach, maximize=maximize)

    def hypers_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        first, second = group["eps"]
        return {**group, "eps": (-1.0 if first is None else first, second)}

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        eps = group["eps"]
        if not isinstance(eps, tuple | list) or len(eps) != 2:
            raise ConfigError(f"expected eps to be None or a number, and a number, in {where}, got {eps!r}; give both")
        least = {"lr": group["lr"], "eps[1]": eps[1], "weight_decay": group["weight_decay"]}
        if eps[0] is not None:
            least["eps[0]"] = eps[0]
        for name, value in least.items():
            if not number(value, name, where) >= 0.0:
                raise ConfigError(f"expected {name} ≥ 0 in {where}, got {value}; give a value in that range")
        if not number(group["beta2_decay"], "beta2_decay", where) <= 0.0:
            raise ConfigError(f"expected beta2_decay ≤ 0 in {where}, got {group['beta2_decay']}; give a negative one")
        if not number(group["d"], "d", where) >= 1.0:
            raise ConfigError(f"expected d ≥ 1 in {where}, got {group['d']}; give a value in that range")
