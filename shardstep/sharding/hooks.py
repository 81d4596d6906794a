"""When units are gathered and freed: hooks on their modules' forward, outputs and parameters.

Forward: gather the unit, begin to gather the next ones in declared order, free it after. Backward: the same
from the other end; a unit is freed as soon as its leaf is complete. What backward begins with, the root and as
many of the last units as are whole at once anyway, stays whole over the turn. A module that runs out of the
declared order is gathered late, and nothing else changes. This room decides when; `Space` and `Gradients` do it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from shardstep.errors import CollectiveError
from shardstep.sharding.agreement import Act, Agreement
from shardstep.sharding.attached import Attached
from shardstep.sharding.gradients import Gradients
from shardstep.sharding.space import Space
from shardstep.sharding.unit import Unit


class Hooks:
    """Drives the units of one model; installed once."""

    def __init__(
        self,
        units: list[Unit],
        gradients: Gradients,
        agreement: Agreement,
        attached: Attached,
        prefetch: int,
        input_dtype: torch.dtype | None,
    ) -> None:
        self._units, self._gradients, self._agreement, self._attached = units, gradients, agreement, attached
        self._prefetch, self._input_dtype = prefetch, input_dtype
        self._depth = 0
        self._lost = False
        self._ready = [0] * len(units)
        for order, unit in enumerate(units):
            self._install(order, unit)

    def _install(self, order: int, unit: Unit) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return self._before_forward(order, args, kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._after_forward(order, output, unit.complete(module))

        for module in unit.modules:
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            module.register_forward_hook(after, always_call=True)
        for space in unit.spaces:
            for index in range(len(space.parameters) if space.trained else 0):
                self.await_gradient(space, index)

    def await_gradient(self, space: Space, index: int) -> None:
        """Collect what autograd accumulates for a parameter from now on."""
        order = next(order for order, unit in enumerate(self._units) if space in unit.spaces)
        hooked: Any = space.parameters[index]  # torch leaves this untyped
        hooked.register_post_accumulate_grad_hook(self._arrival(order, space, index))

    # - forward

    def _before_forward(self, order: int, args: Any, kwargs: Any) -> Any:
        self._depth += 1
        if self._depth == 1 and not self._gradients.in_backward:
            self._begin_forward()
        self._gather(order, self._units[order + 1 : order + 1 + self._prefetch], "forward")
        if order == 0 and self._input_dtype is not None:
            return _cast(args, self._input_dtype), _cast(kwargs, self._input_dtype)
        return None

    def _begin_forward(self) -> None:
        self._attached.check()
        if any(map(_communicates, self._units)):
            self._agreement.announce(Act.FORWARD, self._gradients.step, self._gradients.leaves)

    def _after_forward(self, order: int, output: Any, is_complete: bool) -> None:
        self._depth -= 1
        if self._lost:
            return
        unit = self._units[order]
        turning = torch.is_grad_enabled() and self._expect_backward(order, output)
        if self._gradients.in_backward:
            return
        if is_complete and not (turning and self._begins_backward(order)):
            unit.free()
        if self._depth == 0:
            for other, unit in enumerate(self._units):
                if not (turning and self._begins_backward(other)):
                    unit.free()

    def _expect_backward(self, order: int, output: Any) -> bool:
        """Have backward gather the unit when it reaches one of its outputs; False when it never will."""
        reached = [tensor for tensor in tensors_in(output) if tensor.requires_grad and tensor.grad_fn is not None]
        for tensor in reached:
            hooked: Any = tensor  # torch leaves this untyped
            hooked.register_hook(lambda grad: self._before_backward(order))
        return bool(reached)

    def _begins_backward(self, order: int) -> bool:
        return begins_backward(order, len(self._units), self._prefetch)

    # - backward

    def _before_backward(self, order: int) -> None:
        self._enter_backward()
        position = order or len(self._units)
        ahead = self._units[max(position - self._prefetch, 1) : position]
        self._gather(order, ahead[::-1], "backward")

    def _arrival(self, order: int, space: Space, index: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            self._enter_backward()
            if self._gradients.arrived(space, index):
                self._ready[order] += 1
                unit = self._units[order]
                if self._ready[order] == len(unit.spaces):
                    unit.free()

        return arrived

    def _enter_backward(self) -> None:
        if not self._gradients.in_backward:
            self._gradients.begin_backward()
            self._ready = [0] * len(self._units)
            Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self._gradients.end_backward()
        for unit in self._units:
            unit.free()

    # - both

    def _gather(self, order: int, ahead: list[Unit], direction: str) -> None:
        unit = self._units[order]
        if not _communicates(unit) and not any(map(_communicates, ahead)):
            return
        phase = f"{direction} of step {self._gradients.step}"
        try:
            self._agreement.confirm()  # first: what peers lend may be what they are updating until they come here too
            unit.start_gather(phase)
            for other in ahead:
                other.start_gather(phase, ahead=True)
            unit.finish_gather()
        except CollectiveError:
            self._lost = True  # what is on its way may never arrive: nothing must wait for it on the way out
            raise


def begins_backward(order: int, units: int, prefetch: int) -> bool:
    """Whether backward begins with this unit: the root, or one of the last ``1 + prefetch`` in declared order."""
    return order == 0 or order >= units - 1 - prefetch


def _communicates(unit: Unit) -> bool:
    return any(space.communicates for space in unit.spaces)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The same arguments with floating-point tensors in ``dtype``; containers of other kinds stay as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
