"""AdamW: Adam with weight decay that does not pass through the moments."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.optim.optimizer import ParamsT

from shardstep.errors import ConfigError
from shardstep.optim.optimizer import Optimizer, number
from shardstep.rules.functions import fma, lerp, sqrt
from shardstep.rules.language import Elements, rule, zeros


@rule
def adamw(
    param: Elements,
    grad: Elements,
    exp_avg: Elements = zeros,
    exp_avg_sq: Elements = zeros,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Elements, ...]:
    """Loshchilov & Hutter 2019 (arXiv 1711.05101), on the Adam of Kingma & Ba 2015 (arXiv 1412.6980).

    Rounded as torch's fused kernel rounds all but the last few elements of an array. With gradient g and step
    count t from 1, in torch's arrangement (the decay is scaled by lr)::

        θ ← θ · (1 − lr · weight_decay)
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        θ ← θ − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)
    """
    param = param * (1 - lr * weight_decay)
    exp_avg = lerp(exp_avg, grad, 1 - betas[0])
    exp_avg_sq = fma((1 - betas[1]) * grad, grad, betas[1] * exp_avg_sq)
    denominator = sqrt(exp_avg_sq) / sqrt(1 - betas[1] ** step) + eps
    param = param - lr / (1 - betas[0] ** step) * exp_avg / denominator
    return param, exp_avg, exp_avg_sq


class AdamW(Optimizer):
    """AdamW with the first five arguments of torch's; it has no ``amsgrad`` and no ``maximize``.

    ``params``: tensors, (name, tensor) pairs or groups, as for any torch optimizer. ``lr`` ≥ 0: step size;
    ``betas`` in [0, 1): decay of the two moments per step; ``eps`` ≥ 0: added to the root of the second
    moment; ``weight_decay`` ≥ 0: decoupled, multiplied by ``lr``. State, float32 for low-precision parameters
    and otherwise of the parameter's dtype: ``exp_avg``, ``exp_avg_sq``.

    Raises ConfigError for a value out of range, OwnershipError for a parameter given twice.
    """

    rule = adamw

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not number(group[name], name, where) >= 0.0:
                raise ConfigError(f"expected {name} ≥ 0 in {where}, got {group[name]}; give a value in that range")
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ConfigError(f"expected betas to be two numbers in {where}, got {betas!r}; give (beta1, beta2)")
        for index, beta in enumerate(betas):
            if not 0.0 <= number(beta, f"betas[{index}]", where) < 1.0:
                raise ConfigError(f"expected 0 ≤ betas[{index}] < 1 in {where}, got {beta}; give a value in that range")
        for flag in ("amsgrad", "maximize"):
            if group.get(flag):
                raise ConfigError(
                    f"expected {flag}=False in {where}, got {group[flag]}; this AdamW does not have that variant"
                )


class AdamW8bit(AdamW):
    """AdamW whose two moments take 8 bits an element, and a float32 scale for each 256 elements of a tensor.

    Dettmers et al. 2022 (arXiv 2110.02861): 2.03 bytes of state a parameter instead of 8. Arguments and equations are
    AdamW's, computed in float32 (float64 for float64 parameters). It is meant for the large tensors of a model; where
    few elements decide, as in an embedding or a norm, the paper keeps 32 bits. Takes state dicts of AdamW, and AdamW
    takes its.
    """

    rule = replace(adamw.stored(exp_avg="dynamic8", exp_avg_sq="dynamic8_unsigned"), name="adamw8bit")
