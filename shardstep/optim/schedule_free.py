"""Schedule-free AdamW: no schedule of the learning rate, an average of the iterates in its place."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import ParamsT

from shardstep.errors import SequenceError
from shardstep.optim.groups import number
from shardstep.optim.moments import average_of_squares, with_decay
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.ranges import check_at_least_zero, check_fractions, refusal
from shardstep.optim.states import as_real
from shardstep.rules.compiled import compile_rule
from shardstep.rules.functions import lerp, sqrt, where
from shardstep.rules.language import Elements, Rule, rule, state, zeros
from shardstep.types import Batch, FlatSource, Segment


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

    The average, x = θ + (1 − 1 / β₁) (z − θ), is what the model is to be used with: ``optimizer.eval()`` makes the
    parameters x and ``optimizer.train()`` makes them y again, to the bit, sharded or not. Arranged as in its authors'
    code, which keeps y and z, where the paper keeps x and z.
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


@rule
def back_from_x(
    param: Elements,
    grad: Elements,
    z: Elements = state("param"),
    y: Elements = state("param"),
    x: Elements = state("param"),
    *,
    weight: float,
) -> tuple[Elements, ...]:
    """y again, as it was kept, where the parameter is still the x that was made of it; from what was written since
    towards z elsewhere.
    """
    written = lerp(param, z, weight)
    return where(param == x, y, where(x != x, where(param != param, y, written), written)), z, y, x


class AdamWScheduleFree(Optimizer):
    """Schedule-free AdamW, with the arguments and the methods of its authors' implementation.

    Call ``eval()`` before the model is evaluated or saved and ``train()`` before training goes on: in between, the
    parameters are the average of the iterates. ``train()`` brings back the very bits that there were, except in
    elements that have been written since: they are kept while the parameters are the average, which takes the bytes of
    the parameters (of their masters) once more. Sharded, each rank keeps what it owns, and every rank calls both.

    ``lr`` ≥ 0: step size, without a scheduler; ``betas``: in (0, 1) the weight of the average in the point where
    gradients are taken, in [0, 1) the decay of the second moment; ``eps`` ≥ 0: added to its root; ``weight_decay`` ≥ 0;
    ``warmup_steps`` ≥ 0: steps in which lr rises; ``r`` and ``weight_lr_power``: how much later steps and those with a
    larger lr weigh in the average. State: ``z``, ``exp_avg_sq``; in the groups ``k``, ``lr_max``, ``weight_sum`` and
    ``train_mode``. Raises ConfigError for a value out of range.
    """

    rule = adamw_schedule_free
    _kept: dict[Tensor, Tensor] | None = None
    """What was y of each parameter that is the average now, as far as it is held here."""

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
        made = False
        try:
            super().step()
            made = not self.left_out
        finally:  # a step that is not made changes nothing
            for group, values in zip(self.param_groups, before, strict=True):
                group.update({"k": group["k"] + 1} if made else values)
        return loss

    @torch.no_grad()
    def eval(self) -> None:
        """Make the parameters the average of the iterates, x. Nothing happens where they are so already.

        Sharded, every rank must call it, and inside ``gathered`` or ``average.applied()`` it raises SequenceError.
        """
        kept = self._kept = self._kept or {}
        for held in self._held("eval()"):
            kept.update({param: segment.param.clone() for param, segment in held})
            self._run(towards_z, [segment for _, segment in held], self._to_x)
        for group in self.param_groups:
            group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Make the parameters y again: the bits that ``eval`` found, but for elements written since then.

        Sharded, every rank must call it, and inside ``gathered`` or ``average.applied()`` it raises SequenceError.
        """
        kept = self._kept or {}
        for held in self._held("train()"):
            found = [(segment, kept[param]) for param, segment in held if param in kept]
            again = [replace(segment, param=y.clone(), low=None) for segment, y in found]
            self._run(towards_z, again, self._to_x)
            pairs = zip(found, again, strict=True)
            back = [replace(own, state={**own.state, "y": y, "x": x.param}) for (own, y), x in pairs]
            self._run(back_from_x, back, self._to_y)
            self._run(towards_z, [segment for param, segment in held if param not in kept], self._to_y)
        self._kept = None
        for group in self.param_groups:
            group["train_mode"] = True

    def attach(self, source: FlatSource) -> None:
        super().attach(source)
        self._kept = None  # it was of whole tensors

    @property
    def _to_x(self) -> list[float]:
        return [1 - 1 / group["betas"][0] for group in self.param_groups]

    @property
    def _to_y(self) -> list[float]:
        return [1 - group["betas"][0] for group in self.param_groups]

    def _held(self, call: Literal["train()", "eval()"]) -> Iterator[list[tuple[Tensor, Segment]]]:
        """What is held here of the parameters that a call changes, to be changed before the next is asked for."""
        source = self._held_alone() if self._source is None else self._source.between_steps(call)
        for held in source:
            yield [pair for pair in held if self.param_groups[pair[1].group]["train_mode"] == (call == "eval()")]

    def _held_alone(self) -> Iterator[list[tuple[Tensor, Segment]]]:
        """Every parameter that has been updated, whole."""
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                z = self.state.get(param, {}).get("z")
                if z is not None:
                    real = as_real(param.detach())
                    values = real.contiguous()
                    yield [(param, Segment(index, 1, values, values, {"z": as_real(z)}, None, 1.0))]
                    real.copy_(values)
                    increment_version([param])  # autograd cannot see what a kernel writes

    def _run(self, rule: Rule, segments: list[Segment], weights: list[float]) -> None:
        hypers = [{"weight": weight} for weight in weights]
        compile_rule(rule).update(Batch(segments, [], lambda sums, _: sums), hypers)


def _weigh(group: dict[str, Any]) -> None:
    """Put what the averages of this step need into the group."""
    rate, count = number(group["lr"], "lr", "a parameter group"), group["k"] + 1
    group["lr_max"] = max(rate * min(1.0, count / (group["warmup_steps"] or 1)), group["lr_max"])
    group["weight_sum"] += count ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
