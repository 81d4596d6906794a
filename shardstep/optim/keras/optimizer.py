"""What all of Keras's optimizers have in common: their arguments, the count of iterations, and what a step does around
the rule. Nothing here knows any one of them, and nothing imports Keras.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias, TypedDict, overload

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from shardstep.block_sums import block_sums
from shardstep.errors import ConfigError, NonFiniteGradientError
from shardstep.optim.groups import number
from shardstep.optim.optimizer import Optimizer
from shardstep.types import BLOCK_NUMEL

LearningRate: TypeAlias = float | Callable[[int], Any]
"""A number, or a function of the count of finished steps, such as a Keras LearningRateSchedule."""


class CommonButDecay(TypedDict, total=False):
    """Keras's arguments that every one of its optimizers takes; None and 0 are the same."""

    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None


class Common(CommonButDecay, total=False):
    """All of them; AdamW takes the last one at another place."""

    weight_decay: float | None


_OF_THE_OPTIMIZER = ("global_clipnorm", "ema_overwrite_frequency")
"""Arguments that have no meaning for a single group."""

_COMMON = CommonButDecay.__annotations__.keys() | Common.__annotations__.keys()

_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")


class KerasOptimizer(Optimizer):
    """An optimizer with Keras's arguments and formulae. One step is, as in ``keras.optimizers``::

        clip the gradients → θ ← θ · (1 − weight_decay · lr) → the update → average ← θ → perhaps θ ← average

    ``learning_rate``: a number, which the groups keep as ``lr`` so that torch's schedulers drive it (and
    ``optimizer.learning_rate`` reads and sets it); or a function of the count of finished steps, such as a Keras
    LearningRateSchedule, which then overrules them. ``weight_decay``: decoupled, for every optimizer; exclude
    parameters from it by a group of their own. Only one of ``clipnorm`` (of each parameter's gradient), ``clipvalue``
    (of each element) and ``global_clipnorm`` (of all gradients together) may be given. ``use_ema``: keep a moving
    average of the parameters in the state ``average``, by ``ema_momentum``; every ``ema_overwrite_frequency`` steps,
    and by :meth:`finalize_variable_values`, it replaces them. ``iterations`` counts the optimizer's steps, also for
    parameters that had no gradient in some of them.

    Groups may give any of these but ``global_clipnorm`` and ``ema_overwrite_frequency``. Keras's
    ``gradient_accumulation_steps``, ``loss_scale_factor`` and ``name`` do not exist: micro-batches add up by
    themselves. Where the global norm is not finite, a step raises NonFiniteGradientError; Keras makes every parameter
    NaN.
    """

    fractions: ClassVar[tuple[str, ...]] = ("beta_1", "beta_2", "rho", "momentum", "ema_momentum")
    """Hyper-parameters from 0 to 1."""

    signed: ClassVar[tuple[str, ...]] = ()
    """Hyper-parameters that may be negative."""

    def __init__(
        self, params: ParamsT, learning_rate: LearningRate, common: Common, **hyperparameters: float | bool
    ) -> None:
        unknown = common.keys() - _COMMON
        if unknown:
            raise ConfigError(
                f"expected arguments of Keras's {type(self).__name__}, got {sorted(unknown)}; shardstep has of those "
                f"that all optimizers share {sorted(_COMMON)}"
            )
        given = {**common, **hyperparameters}
        self._schedule = learning_rate if callable(learning_rate) else None
        self.global_clipnorm = number(given.pop("global_clipnorm", None) or 0.0, "global_clipnorm", "the optimizer")
        self.ema_overwrite_frequency = _frequency(given.pop("ema_overwrite_frequency", None))
        lr = learning_rate if self._schedule is None else float(self._schedule(0))
        super().__init__(params, lr=lr, **_without_none(given))

    @property
    def iterations(self) -> int:
        """Steps taken."""
        return int(self.param_groups[0]["iterations"])

    @property
    def learning_rate(self) -> float:
        """The first group's; set it, or give a function of the count of steps, for all groups."""
        return float(self.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        self._schedule = learning_rate if callable(learning_rate) else None
        for index, group in enumerate(self.param_groups):
            lr = learning_rate if self._schedule is None else float(self._schedule(self.iterations))
            self.check_group({**group, "lr": lr}, f"parameter group {index}")
            group["lr"] = lr

    @property
    def clip(self) -> Callable[[float], float] | None:
        return self._factor if self.global_clipnorm > 0 else None

    def _factor(self, grad_norm: float) -> float:
        return self.global_clipnorm * min(1.0 / grad_norm if grad_norm else math.inf, 1.0 / self.global_clipnorm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            where = f"parameter group {len(self.param_groups)}"
            misplaced = [name for name in _OF_THE_OPTIMIZER if name in param_group]
            if misplaced:
                raise ConfigError(f"expected {misplaced} for the whole optimizer, got it in {where}; move it there")
            param_group = _without_none(param_group)
            if "learning_rate" in param_group:
                param_group["lr"] = param_group.pop("learning_rate")
        super().add_param_group(param_group)

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        for name in self.rule.hyperparameters:
            value = group[name]
            if name in self.fractions and not 0.0 <= number(value, name, where) <= 1.0:
                raise ConfigError(f"expected 0 ≤ {name} ≤ 1 in {where}, got {value}; give a value in that range")
            if name not in self.signed and not number(value, name, where) >= 0.0:
                raise ConfigError(f"expected {name} ≥ 0 in {where}, got {value}; give a value in that range")
        clipping = {**group, "global_clipnorm": self.global_clipnorm}
        given = [name for name in _CLIPPING if clipping[name]]
        if len(given) > 1:
            raise ConfigError(f"expected only one of {', '.join(_CLIPPING)} in {where}, got {given}; choose one")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from the gradients there are. ``closure`` is called first, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        iterations = self.iterations
        every = self.ema_overwrite_frequency
        factor = self._factor(self._grad_norm()) if self.global_clipnorm > 0 and not self.attached else 1.0
        for group in self.param_groups:
            group["iterations"] = iterations  # one that was added later starts there too
            group["grad_factor"] = factor
            group["ema_overwrite"] = every > 0 and (iterations + 1) % every == 0
            if self._schedule is not None:
                group["lr"] = float(self._schedule(iterations))
        super().step()
        for group in self.param_groups if not self.left_out else ():
            self.advance(group)
        return loss

    def advance(self, group: dict[str, Any]) -> None:
        """Count a step that ``group`` has taken."""
        group["iterations"] += 1

    def _grad_norm(self) -> float:
        total = 0.0
        for param in (param for group in self.param_groups for param in group["params"] if param.grad is not None):
            flat = param.grad.detach().reshape(-1)
            total += float(block_sums(nn.functional.pad(flat, (0, -flat.numel() % BLOCK_NUMEL))).sum())
        norm = math.sqrt(total)
        if not math.isfinite(norm):
            raise NonFiniteGradientError(
                f"expected finite gradients for global_clipnorm, got a norm of {norm} in step {self.iterations}; "
                f"nothing was updated, and zero_grad() lets you go on"
            )
        return norm

    def finalize_variable_values(self) -> None:
        """Replace the parameters by their moving averages, with ``use_ema``. Every rank must call it."""
        if "average" not in self.state_names:
            return
        if self._source is None:
            with torch.no_grad():
                for param, state in self.state.items():
                    param.copy_(state["average"])
        else:
            averages = {param: state["average"] for param, state in self._source.whole_state().items()}
            self._source.write_parameters(averages)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_schedule", *_OF_THE_OPTIMIZER)}
        return {**super().__getstate__(), **own}


def _frequency(given: object) -> int:
    if given is None:
        return 0
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ConfigError(f"expected ema_overwrite_frequency to be a positive integer or None, got {given!r}")
    return given


def _without_none(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: 0.0 if value is None else value for name, value in group.items()}
