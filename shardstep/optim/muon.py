"""Muon: momentum whose direction is made nearly orthogonal, for the matrices of a network's hidden layers."""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.errors import ConfigError
from shardstep.optim.groups import number
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_matrix
from shardstep.rules.functions import bfloat16, lerp, maximum, norm, sqrt
from shardstep.rules.language import Elements, inline, rule, zeros

MOST_STEPS: Final = 10
"""Of the Newton-Schulz iteration: it is written out."""


@inline
def polynomial(gram: Elements, coefficients: Elements) -> Elements:
    """b S + c S²."""
    return bfloat16(coefficients[1] * gram + coefficients[2] * (gram @ gram))


@inline
def tall(x: Elements, coefficients: Elements) -> Elements:
    """One step for more rows than columns: a X + X (b S + c S²) with S = Xᵀ X."""
    return bfloat16(coefficients[0] * x + x @ polynomial(bfloat16(x.T @ x), coefficients))


@inline
def wide(x: Elements, coefficients: Elements) -> Elements:
    """One step for at least as many columns: a X + (b S + c S²) X with S = X Xᵀ."""
    return bfloat16(coefficients[0] * x + polynomial(bfloat16(x @ x.T), coefficients) @ x)


@rule
def muon(
    param: Elements,
    grad: Elements,
    momentum_buffer: Elements = zeros,
    *,
    rows: int,
    columns: int,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: bool = False,
) -> tuple[Elements, ...]:
    """Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), in torch's arrangement; ``adjust_lr_fn`` here is
    whether it is that of Liu et al. 2025 (arXiv 2502.16982), which matches AdamW's RMS.

    With gradient G, buffer B, coefficients (a, b, c) and n × m parameters Θ; all that is between X and Θ is rounded to
    bfloat16, as torch's is::

        B ← μ B + (1 − μ) G
        X ← (1 − μ) G + μ B, or B without nesterov
        X ← X / max(‖X‖, eps)
        ns_steps times: S = X Xᵀ and X ← a X + (b S + c S²) X         (for n > m the same with S = Xᵀ X from the right)
        Θ ← (1 − lr · weight_decay) Θ − lr · r · X          r = √max(1, n / m), or 0.2 √max(n, m)
    """
    momentum_buffer = lerp(momentum_buffer, grad, 1 - momentum)
    update = lerp(momentum_buffer, grad, 1 - momentum) if nesterov else momentum_buffer
    x = bfloat16(update)
    x = bfloat16(x / maximum(bfloat16(norm(x)), eps))
    for done in range(MOST_STEPS):
        if done < ns_steps:
            x = tall(x, ns_coefficients) if rows > columns else wide(x, ns_coefficients)
    ratio = 0.2 * sqrt(maximum(rows, columns)) if adjust_lr_fn else sqrt(maximum(1, rows / columns))
    return param * (1 - lr * weight_decay) - lr * ratio * x, momentum_buffer


class Muon(Optimizer):
    """Muon with torch's arguments, for parameters of two dimensions; the others are AdamW's work: see `Combined`.

    ``params``: tensors, (name, tensor) pairs or groups. ``lr`` ≥ 0: step size; ``weight_decay`` ≥ 0: decoupled,
    multiplied by ``lr``; ``momentum`` in [0, 1); ``ns_coefficients``, ``ns_steps`` (at most 10) and ``eps``: of the
    Newton-Schulz iteration, which runs in bfloat16; ``adjust_lr_fn``: "original" (None is the same) or
    "match_rms_adamw". State: ``momentum_buffer``.

    Raises ConfigError for a value out of range and for a parameter that is no matrix.
    """

    rule = muon

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn or "original",
        )

    def hypers_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**group, "adjust_lr_fn": group["adjust_lr_fn"] == "match_rms_adamw"}

    def check_parameter(self, param: Tensor, where: str) -> None:
        check_matrix(param, where, "Muon")

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        for name in ("lr", "weight_decay", "momentum", "eps"):
            if not number(group[name], name, where) >= 0.0:
                raise ConfigError(f"expected {name} ≥ 0 in {where}, got {group[name]}; give a value in that range")
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ConfigError(
                f"expected adjust_lr_fn to be 'original' or 'match_rms_adamw' in {where}, got "
                f"{group['adjust_lr_fn']!r}; choose one of them"
            )
        coefficients = group["ns_coefficients"]
        if not isinstance(coefficients, tuple | list) or len(coefficients) != 3:
            raise ConfigError(
                f"expected ns_coefficients to be three numbers in {where}, got {coefficients!r}; give three"
            )
        for index, coefficient in enumerate(coefficients):
            number(coefficient, f"ns_coefficients[{index}]", where)
        steps = group["ns_steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= MOST_STEPS:
            raise ConfigError(f"expected 0 to {MOST_STEPS} ns_steps in {where}, got {steps!r}; give a whole number")
