"""Schedule-free AdamW: no schedule of the learning rate, an average of the iterates in its place."""

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardstep.errors import ConfigError, SequenceError
from shardstep.optim.groups import number
from shardstep.optim.moments import average_of_squares, with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions, refusal
from shardstep.rules.binding import compute_dtype
from shardstep.rules.compiled import compile_rule
from shardstep.rules.functions import lerp, sqrt
from shardstep.rules.language import Elements, rule, state, zeros
from shardstep.types import Batch, Segment, Update


@rule
def adamw_schedule_free(
    param: Elements,
    grad: Elements,
    z: Elements = state("param"),
    exp_avg_sq: Elements = zeros,
    *,
    step: int,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: float = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    k: float = 0,
    lr_max: float = -1.0,
    weight_sum: float = 0.0,
) -> tuple[Elements, ...]:
    """Defazio, Yang, Mehta, Mishchenko, Khaled & Cutkosky 2024 (arXiv 2405.15682), algorithm 1.

    θ is the point y where gradients are taken, while training. With gradient g, the count k of updates before this one
    and the step count t from 1, both the same for a tensor that gets a gradient in every step::

        γ = lr · min(1, (k + 1) / warmup_steps)
        w = (k + 1) ^ r · lr_max ^ weight_lr_power,     lr_max the largest γ so far
        c = w / weight_sum,                             weight_sum the sum of w so far
        v ← β₂ v + (1 − β₂) g²
        u = g / (√(v / (1 − β₂ᵗ)) + eps) + weight_decay · θ
        θ ← (1 − c) θ + c z + γ (β₁ (1 − c) − 1) u
        z ← z − γ u

    The average, x = θ + (1 − 1 / β₁) (z − θ), is what the model is to be used with. Arranged as in its authors' code,
    which keeps y and z, where the paper keeps x and z.
    """
    rate = lr * (k + 1) / warmup_steps if k < warmup_steps else lr
    share = (k + 1) ** r * lr_max**weight_lr_power / weight_sum if weight_sum > 0 else 0.0
    exp_avg_sq = average_of_squares(exp_avg_sq, grad, betas[1])
    update = with_decay(grad / (sqrt(exp_avg_sq / (1 - betas[1] ** step)) + eps), param, weight_decay)
    param = lerp(param, z, share) + rate * (betas[0] * (1 - share) - 1) * update
    return param, z - rate * update, exp_avg_sq


@rule
def towards_z(param: Elements, grad: Elements, z: Elements = state("param"), *, weight: float) -> tuple[Elements, ...]:
    """From y to the average x by 1 − 1 / β₁, and from x to y by 1 − β₁."""
    return lerp(param, z, weight), z


class AdamWScheduleFree(Optimizer):
    """Schedule-free AdamW, with the arguments and the methods of its authors' implementation.

    Call ``eval()`` before the model is evaluated or saved and ``train()`` before training goes on: in between, the
    parameters are the average of the iterates. ``train()`` brings back the very bits that there were: they are kept
    while the parameters are the average, which takes the parameters' bytes once more.

    ``lr`` ≥ 0: step size, without a scheduler; ``betas``: in (0, 1) the weight of the average in the point where
    gradients are taken, in [0, 1) the decay of the second moment; ``eps`` ≥ 0: added to its root; ``weight_decay`` ≥ 0;
    ``warmup_steps`` ≥ 0: steps in which lr rises; ``r`` and ``weight_lr_power``: how much later steps and those with a
    larger lr weigh in the average. State: ``z``, ``exp_avg_sq``; in the groups ``k``, ``lr_max``, ``weight_sum`` and
    ``train_mode``. Raises ConfigError for a value out of range.
    """

    rule = adamw_schedule_free
    _kept: dict[Tensor, tuple[int, Tensor]] | None = None
    """For each parameter that is the average now: its version then, and what it was before."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults["train_mode"] = True
        for group in self.param_groups:
            group.setdefault("train_mode", True)

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_at_least_zero(group, where, "lr", "eps", "weight_decay", "warmup_steps")
        check_fractions(group, where, "betas")
        if group["betas"][0] == 0:
            raise refusal("0 < betas[0]", where, group["betas"][0])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from the gradients there are. Raises SequenceError after ``eval()``."""
        if not all(group["train_mode"] for group in self.param_groups):
            raise SequenceError(
                "expected step() while training, got it after eval(): the parameters are the average of the iterates, "
                "where no gradients are to be taken; call optimizer.train() before the forward"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        before = [{"lr_max": group["lr_max"], "weight_sum": group["weight_sum"]} for group in self.param_groups]
        for group in self.param_groups:
            _weigh(group)
        try:
            super().step()
        except BaseException:  # a step that cannot be made changes nothing
            for group, values in zip(self.param_groups, before, strict=True):
                group.update(values)
            raise
        for group in self.param_groups:
            group["k"] += 1
        return loss

    @torch.no_grad()
    def eval(self) -> None:
        """Make the parameters the average of the iterates, x. Nothing happens where they are so already."""
        self._check_alone("eval")
        kept = self._kept = self._kept or {}
        for group in self.param_groups:
            if group["train_mode"]:
                for param in self._averaged(group):
                    before = param.detach().clone()
                    self._move(param, 1 - 1 / group["betas"][0])
                    kept[param] = param._version, before
                group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Make the parameters y again: the bits that ``eval`` found, but for parameters written since then."""
        self._check_alone("train")
        kept = self._kept or {}
        for group in self.param_groups:
            if not group["train_mode"]:
                for param in self._averaged(group):
                    version, before = kept.pop(param, (None, param))
                    if version == param._version:
                        param.copy_(before)
                    else:
                        self._move(param, 1 - group["betas"][0])
                group["train_mode"] = True

    def _check_alone(self, method: str) -> None:
        if self.attached:
            raise ConfigError(
                f"expected {method}() of an optimizer that holds its own state, got a sharded one; "
                f"gather the state by state_dict() and evaluate on one rank"
            )

    def _averaged(self, group: Mapping[str, Any]) -> list[Tensor]:
        """The parameters that have been updated."""
        return [param for param in group["params"] if "z" in self.state[param]]

    def _move(self, param: Tensor, weight: float) -> None:
        """Move a parameter towards its z, with the same bits as everywhere: by a kernel."""
        values = param.detach().to(compute_dtype(param), memory_format=torch.contiguous_format, copy=True).view(-1)
        segment = Segment(0, 1, values, values, {"z": self.state[param]["z"].view(-1)}, None, 1.0)
        compile_rule(towards_z).update(Batch([segment], [Update(0, 1, ())], lambda sums, _: sums), [{"weight": weight}])
        param.copy_(values.view(param.shape))


def _weigh(group: dict[str, Any]) -> None:
    """Put what the averages of this step need into the group."""
    rate, count = number(group["lr"], "lr", "a parameter group"), group["k"] + 1
    group["lr_max"] = max(rate * min(1.0, count / (group["warmup_steps"] or 1)), group["lr_max"])
    group["weight_sum"] += count ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
