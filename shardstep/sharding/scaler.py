"""Loss scaling: how large the gradients of low-precision outputs are made, so that they do not underflow.

`LossScaler` is the number and how it moves from step to step, for the user to keep. `Scaling` is the engine's: it
multiplies what goes back through a model's outputs, and keeps one scale for all micro-batches of a step. Scales are
powers of two, so that scaling and its inverse round nothing. Nothing here looks at gradients or communicates.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardstep.errors import ConfigError
from shardstep.sharding.nested import mapped

_BITS = 12
"""Of the exponent of a float64, from -2048 on."""


class LossScaler:
    """A dynamic loss scale: doubled after ``window`` good steps in a row, halved when gradients overflow.

    A step whose gradients overflow anywhere is left out on all ranks. The first ``hysteresis`` - 1 overflows leave the
    scale as it is; the next ones halve it, down to ``minimum``; only doubling renews the patience. All scales are
    powers of two. Raises ConfigError for arguments that are not. Each model needs one of its own: it counts that
    model's steps.
    """

    def __init__(
        self, initial_scale: float = 2.0**16, window: int = 1000, hysteresis: int = 2, minimum: float = 1.0
    ) -> None:
        self._minimum, self._window, self._hysteresis = _checked_scale(minimum, "minimum"), window, hysteresis
        for name, count in (("window", window), ("hysteresis", hysteresis)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ConfigError(f"expected {name} to be a positive integer, got {count!r}")
        self._is_static = False
        self._good_steps, self._patience = 0, hysteresis
        self._scale = _checked_scale(initial_scale, "initial_scale")
        self._check_minimum(self._scale)

    @classmethod
    def static(cls, scale: float) -> "LossScaler":
        """A scale that stays what it is; steps whose gradients overflow are left out all the same."""
        scaler = cls(scale, minimum=_checked_scale(scale, "a static loss scale"))
        scaler._is_static = True
        return scaler

    @property
    def scale(self) -> float:
        """What the loss of the next step is multiplied by."""
        return self._scale

    def update(self, overflowed: bool) -> None:
        """Count a step, made or left out. The engine calls it."""
        if self._is_static:
            return
        if overflowed:
            self._good_steps = 0
            if self._patience > 1:
                self._patience -= 1
            else:
                self._scale = max(self._scale / 2, self._minimum)
            return
        self._good_steps += 1
        if self._good_steps == self._window:
            self._good_steps, self._patience = 0, self._hysteresis
            self._scale *= 2

    def state_dict(self) -> dict[str, float]:
        """The scale and its counts, to go on from."""
        return {"scale": self._scale, "good_steps": self._good_steps, "patience": self._patience}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Go on from a ``state_dict()``, on every rank from the same; it takes effect with the next step.

        Raises ConfigError, before anything has changed, if it does not fit.
        """
        if not isinstance(state_dict, Mapping) or state_dict.keys() != self.state_dict().keys():
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ConfigError(f"expected what LossScaler.state_dict() gives, got {got}; load one of those")
        scale = _checked_scale(state_dict["scale"], "the loaded scale")
        self._check_minimum(scale)
        for name in ("good_steps", "patience"):
            count = state_dict[name]
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ConfigError(f"expected {name} to be 0 or a positive integer in the state dict, got {count!r}")
        self._scale = scale
        self._good_steps = min(int(state_dict["good_steps"]), self._window - 1)
        self._patience = min(int(state_dict["patience"]), self._hysteresis)

    def __repr__(self) -> str:
        if self._is_static:
            return f"LossScaler.static({self._scale})"
        return (
            f"LossScaler(scale={self._scale}, window={self._window}, hysteresis={self._hysteresis}, "
            f"minimum={self._minimum}, good_steps={self._good_steps}, patience={self._patience})"
        )

    def _check_minimum(self, scale: float) -> None:
        if scale < self._minimum:
            raise ConfigError(f"expected a loss scale of at least the minimum {self._minimum}, got {scale}")


def scaler_of(loss_scale: "LossScaler | float | None") -> LossScaler | None:
    """What ``shard(loss_scale=...)`` means."""
    if loss_scale is None or isinstance(loss_scale, LossScaler):
        return loss_scale
    if not isinstance(loss_scale, int | float):
        raise ConfigError(
            f"expected loss_scale to be a shardstep.LossScaler, a power of two or None, got {loss_scale!r}"
        )
    return LossScaler.static(_checked_scale(loss_scale, "loss_scale"))


def _checked_scale(scale: Any, name: str) -> float:
    known = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale) and scale > 0
    if not known or math.frexp(scale)[0] != 0.5:
        raise ConfigError(
            f"expected {name} to be a power of two, so that scaling rounds nothing, got {scale!r}; give one such as "
            f"{2.0 ** round(math.log2(scale)) if known else 65536.0}"
        )
    return float(scale)


class Scaling:
    """The scale of one step: into the gradients at a model's outputs, and out again at its inputs."""

    def __init__(self, scaler: LossScaler) -> None:
        self.scaler = scaler
        self.reached = False
        """Whether the backward pass that is running has come through a model's outputs."""
        self._of_step: float | None = None

    @property
    def scale(self) -> float:
        """The same for all micro-batches of a step."""
        if self._of_step is None:
            self._of_step = self.scaler.scale
        return self._of_step

    @property
    def present(self) -> float:
        """The scale of the step that is under way or begins next."""
        return self.scaler.scale if self._of_step is None else self._of_step

    def end_step(self) -> None:
        """The next micro-batch begins a new step, with the scaler's scale; but not one that has used this one's."""
        if not self.reached:
            self._of_step = None

    def inputs(self, args: Any, kwargs: Any) -> Any:
        """What a model is called with, so that the scale does not leave through it."""
        return mapped((args, kwargs), self._input) if torch.is_grad_enabled() else (args, kwargs)

    def outputs(self, output: Any) -> Any:
        """What a model returns, so that the scale comes in through it."""
        return mapped(output, self._output) if torch.is_grad_enabled() else output

    def told(self) -> list[bool]:
        """The scale as flags, of which `differs` can tell whether all ranks have set the same."""
        number = math.frexp(self.scale)[1] + 2 ** (_BITS - 1)
        bits = [bool(number >> bit & 1) for bit in range(_BITS)]
        return [*bits, *(not bit for bit in bits)]

    @staticmethod
    def differs(flags: list[bool]) -> bool:
        """Whether any two ranks told different scales; ``flags``: what any of them has set."""
        return any(one and other for one, other in zip(flags[:_BITS], flags[_BITS : 2 * _BITS], strict=True))

    def _output(self, tensor: Tensor) -> Tensor:
        """In float32 or wider, with gradients that are scaled on their way back."""
        if not (tensor.requires_grad and tensor.is_floating_point()):
            return tensor
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        scaled: Tensor = _Scaled.apply(tensor, self, dtype, False)  # type: ignore[no-untyped-call]
        return scaled

    def _input(self, tensor: Tensor) -> Tensor:
        """With gradients that go on without the scale."""
        if not (tensor.requires_grad and tensor.is_floating_point()):
            return tensor
        scaled: Tensor = _Scaled.apply(tensor, self, tensor.dtype, True)  # type: ignore[no-untyped-call]
        return scaled


FLAGS = 2 * _BITS
"""How many `Scaling.told` gives."""


class _Scaled(torch.autograd.Function):
    """The same values in ``dtype``; their gradients times the scale, or divided by it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scaling: Scaling, dtype: torch.dtype, divide: bool) -> Tensor:
        ctx.scaling, ctx.dtype, ctx.divide = scaling, tensor.dtype, divide
        return tensor.detach() if tensor.dtype == dtype else tensor.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        scale = 1.0 / ctx.scaling.scale if ctx.divide else ctx.scaling.scale
        ctx.scaling.reached |= not ctx.divide
        wide = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32))
        return (wide * scale).to(ctx.dtype), None, None, None
