"""Adam and AdamW."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.optim.moments import average, average_of_squares, with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions, refusal
from shardstep.rules.functions import maximum, sqrt
from shardstep.rules.language import Elements, rule, zeros


@rule
def adam(
    param: Elements,
    grad: Elements,
    exp_avg: Elements = zeros,
    exp_avg_sq: Elements = zeros,
    max_exp_avg_sq: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
) -> tuple[Elements, ...]:
    """Kingma & Ba 2015 (arXiv 1412.6980); amsgrad: Reddi, Kale & Kumar 2018 (arXiv 1904.09237).

    Rounded as torch's fused kernel rounds all but the last few elements of an array. With gradient g and step
    count t from 1::

        g ← g + weight_decay · θ                        or, if decoupled, θ ← θ · (1 − lr · weight_decay)
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        u ← v                                           or, with amsgrad, u ← max(u, v)
        θ ← θ − lr / (1 − β₁ᵗ) · m / (√u / √(1 − β₂ᵗ) + eps)

    Differs from the papers as torch does: there is a weight decay, and amsgrad keeps the corrections of bias.
    """
    direction = grad
    if decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    else:
        direction = with_decay(grad, param, weight_decay)
    exp_avg = average(exp_avg, direction, betas[0])
    exp_avg_sq = average_of_squares(exp_avg_sq, direction, betas[1])
    second = exp_avg_sq
    if amsgrad:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        second = max_exp_avg_sq
    denominator = sqrt(second) / sqrt(1 - betas[1] ** step) + eps
    param = param - lr / (1 - betas[0] ** step) * exp_avg / denominator
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


@rule
def adamw(
    param: Elements,
    grad: Elements,
    exp_avg: Elements = zeros,
    exp_avg_sq: Elements = zeros,
    max_exp_avg_sq: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = True,
) -> tuple[Elements, ...]:
    """Loshchilov & Hutter 2019 (arXiv 1711.05101): Adam, with weight decay that does not pass through the moments.

    Rounded as `adam`::

        θ ← θ · (1 − lr · weight_decay)
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        u ← v                                           or, with amsgrad, u ← max(u, v)
        θ ← θ − lr / (1 − β₁ᵗ) · m / (√u / √(1 − β₂ᵗ) + eps)

    Differs from the paper as torch does: the decay is scaled by lr, where the paper scales both by a schedule.
    """
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = adam(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        decoupled_weight_decay=decoupled_weight_decay,
    )
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


class Adam(Optimizer):
    """Adam, as ``torch.optim.Adam``.

    ``lr`` ≥ 0: step size; ``betas`` in [0, 1): decay of the two moments per step; ``eps`` ≥ 0: added to the root of the
    second moment; ``weight_decay`` ≥ 0; ``amsgrad``: divide by the largest second moment so far. State: ``exp_avg``,
    ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq``. Raises ConfigError for a value out of range.
    """

    rule = adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "eps", "weight_decay")
        check_fractions(group, where, "betas")


class AdamW(Adam):
    """AdamW, as ``torch.optim.AdamW``: `Adam` whose weight decay is multiplied by ``lr`` and not averaged."""

    rule = adamw

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        super().check_group(group, where)
        if not group["decoupled_weight_decay"]:
            raise refusal("decoupled_weight_decay=True of AdamW", where, group["decoupled_weight_decay"])


class AdamW8bit(AdamW):
    """AdamW whose two moments take 8 bits an element, and a float32 scale for each 256 elements of a tensor.

    Dettmers et al. 2022 (arXiv 2110.02861): 2.03 bytes of state a parameter instead of 8. Arguments and equations are
    AdamW's, computed in float32 (float64 for float64 parameters). It is meant for the large tensors of a model; where
    few elements decide, as in an embedding or a norm, the paper keeps 32 bits. Takes state dicts of AdamW, and AdamW
    takes its.
    """

    rule = replace(
        adamw.stored(exp_avg="dynamic8", exp_avg_sq="dynamic8_unsigned", max_exp_avg_sq="dynamic8_unsigned"),
        name="adamw8bit",
    )
