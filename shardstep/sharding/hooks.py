"""When units are gathered and freed: hooks on their modules' forward, outputs and parameters.

Forward: gather the unit, begin to gather the next ones in declared order, free it after. Backward: the same from the
other end; a unit is freed when backward reaches another one and is done with it (see the note in `calls`). What
backward begins with, the root and as many of the last units as are whole at once anyway, stays whole over the turn.
A module that runs out of the declared order is gathered late, and so is a unit whose parameters another one uses; the
latter is remembered, and both are gathered together from then on. A call of a part of the root unit, outside the
model's own forward, gathers the root. This room decides when; `Space` and `Gradients` do it.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from shardstep.collectives import Whereabouts
from shardstep.errors import CollectiveError, ConfigError
from shardstep.sharding.agreement import Act, Agreement
from shardstep.sharding.attached import Attached
from shardstep.sharding.calls import Call, Calls, Live
from shardstep.sharding.early import EarlyUpdates
from shardstep.sharding.entrances import After, Before, rest_of_root
from shardstep.sharding.gradients import Gradients
from shardstep.sharding.nested import in_dtype
from shardstep.sharding.outputs import tensors_at, tensors_in, written_attributes
from shardstep.sharding.scaler import Scaling
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
        scaling: Scaling | None,
        whereabouts: Whereabouts,
    ) -> None:
        self._units, self._gradients, self._agreement, self._attached = units, gradients, agreement, attached
        self._prefetch, self._input_dtype, self._scaling = prefetch, input_dtype, scaling
        self._whereabouts = whereabouts
        self._calls, self._live = Calls(len(units)), Live()
        self._task = -1
        """The number that autograd has given to this backward pass."""
        self._pinned: set[int] = set()
        """Units that are freed when backward is over, and not before."""
        self._attributes: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        """For each module of a unit the attributes in which it leaves tensors, as found in its first forward."""
        self._lost = self._differentiable = self._kept = False
        """``_differentiable``: this backward pass makes a graph of its own; ``_kept``: the one before did, and what
        was gathered for it stays."""
        for order, unit in enumerate(units):
            self._install(order, unit)
        if any(unit.stage.shard_params for unit in units):
            for module in rest_of_root(units):
                self._hook(0, module, inner=True)

    def _install(self, order: int, unit: Unit) -> None:
        for module in unit.modules:
            self._hook(order, module, inner=False)
        for space in unit.spaces:
            space.late = partial(self._gather_late, order)
            for index in range(len(space.parameters) if space.trained else 0):
                self.await_gradient(space, index)

    def _hook(self, order: int, module: nn.Module, *, inner: bool) -> None:
        module.register_forward_pre_hook(Before(self, order, inner), prepend=True, with_kwargs=True)
        module.register_forward_hook(After(self), always_call=True)

    def await_gradient(self, space: Space, index: int) -> None:
        """Collect what autograd accumulates for a parameter from now on."""
        hooked: Any = space.parameters[index]  # torch leaves this untyped
        order = next(order for order, unit in enumerate(self._units) if space in unit.spaces)
        hooked.register_post_accumulate_grad_hook(self._arrival(order, space, index))

    # - forward

    def runs_another(self, module: nn.Module) -> bool:
        """Whether a forward of the model is running, and not one of this module that was the last to begin."""
        return bool(self._calls.running) and self._calls.running[-1].module is not module

    def before_forward(self, order: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        outermost, in_backward = not self._calls.running, self._is_in_backward()
        enters = self._calls.enter(order, module, repeats=in_backward).enters
        self._whereabouts.enter_forward(self._units[order].where, self._gradients.step)
        if outermost and not in_backward:
            self._begin_forward()
        ahead = range(0)
        if self._units[order].has(module):
            ahead = self._before(order) if in_backward else self._after(order)
        if outermost and in_backward:
            self._free_done(None, {order, *self._calls.needs[order], *ahead})
        self._gather(order, ahead, "backward" if in_backward else "forward")
        return self._inputs(order, enters, args, kwargs)

    def _inputs(self, order: int, enters: bool, args: Any, kwargs: Any) -> Any:
        """What the module is called with instead; None for what it was given."""
        scaling = self._scaling if enters else None
        input_dtype = self._input_dtype if order == 0 else None
        if scaling is not None:
            args, kwargs = scaling.inputs(args, kwargs)
        if input_dtype is not None:
            args, kwargs = in_dtype((args, kwargs), input_dtype)
        return None if scaling is None and input_dtype is None else (args, kwargs)

    def _is_in_backward(self) -> bool:
        """Whether this forward is a part of a backward pass (a checkpoint's); if so, that pass has begun."""
        if torch._C._current_graph_task_id() >= 0:
            self._enter_backward()
        else:
            self._gradients.notice_exception()
        return self._gradients.in_backward

    def _begin_forward(self) -> None:
        self._attached.check()
        if any(map(_communicates, self._units)):
            self._agreement.announce(Act.FORWARD, self._gradients.step, self._gradients.leaves)
        else:
            self._agreement.check(Act.FORWARD)

    def after_forward(self, module: nn.Module, output: Any) -> Any:
        """What the module returns instead; None for what it has returned."""
        call = self._calls.leave(module)
        if call is not None:
            self._whereabouts.leave_forward()
        if call is None or self._lost:
            return None
        self._after_call(call, output)
        return self._scaling.outputs(output) if call.enters and self._scaling is not None else None

    def _after_call(self, call: Call, output: Any) -> None:
        leaving, hidden = self._what_leaves(call, output)
        turning = torch.is_grad_enabled() and self._expect_backward(call, leaving, hidden=hidden)
        is_complete = self._units[call.order].complete(call.module)
        if self._gradients.in_backward or self._kept:
            return
        needed = self._calls.busy() | self._pinned
        done = [call.order, *self._calls.needs[call.order]] if is_complete else []
        for order in done if self._calls.running else range(len(self._units)):
            if order not in needed and not (turning and self._begins_backward(order)):
                self._units[order].free()

    def _what_leaves(self, call: Call, output: Any) -> tuple[list[Tensor], bool]:
        """The tensors that leave a module, and whether there may be more that cannot be found."""
        tensors, hidden = tensors_in(output)
        unit = self._units[call.order]
        if unit.stage.shard_params and unit.has(call.module):
            if call.module not in self._attributes and torch.is_grad_enabled():
                self._attributes[call.module] = written_attributes(call.module)
            tensors += tensors_at(self._attributes.get(call.module, []))
            self._keep_what_leaves(call.order, tensors)
        return tensors, hidden

    def _expect_backward(self, call: Call, leaving: list[Tensor], *, hidden: bool) -> bool:
        """Have backward gather the unit when it reaches one of its outputs; False when it never will."""
        reached = [tensor for tensor in leaving if tensor.requires_grad and tensor.grad_fn is not None]
        for tensor in reached:
            hooked: Any = tensor  # torch leaves this untyped
            hooked.register_hook(partial(self._before_backward, call))
        if hidden:
            self._pinned.add(call.order)
        return hidden or bool(reached)

    def _keep_what_leaves(self, order: int, tensors: list[Tensor]) -> None:
        """A view of a parameter among the outputs keeps the unit whole where the output is used."""
        mine = self._units[order].spaces
        if any(space.holds(tensor) for tensor in tensors if _has_memory(tensor) for space in mine):
            if self._calls.running:
                self._calls.note_use(order)
            else:
                self._pinned.add(order)

    def _gather_late(self, order: int) -> bool:
        """Gather a unit whose parameters are used outside it; False when no module of the model is running."""
        if not self._calls.running and torch._C._current_graph_task_id() < 0:
            return False
        if self._calls.running:
            self._calls.note_use(order)
        else:
            self._pinned.add(order)
        in_backward = self._is_in_backward()
        if in_backward:
            self._live.reached(order, 0, 0)
        self._gather(order, (), "backward" if in_backward else "forward")
        return True

    def _begins_backward(self, order: int) -> bool:
        return begins_backward(order, len(self._units), self._prefetch)

    def add_entry(self, name: str) -> None:
        """Treat a method of the model as its forward is treated."""
        root = self._units[0].modules[0]
        method = getattr(root, name, None)
        if not callable(method) or isinstance(method, nn.Module):
            raise ConfigError(f"expected the name of a method of {type(root).__name__} to be an entry, got {name!r}")

        def entry(*args: Any, **kwargs: Any) -> Any:
            if self._calls.running:
                return method(*args, **kwargs)
            output = None
            try:
                args, kwargs = self.before_forward(0, root, args, kwargs) or (args, kwargs)
                output = method(*args, **kwargs)
            finally:
                changed = self.after_forward(root, output)
            return output if changed is None else changed

        setattr(root, name, entry)

    # - backward

    def _before_backward(self, call: Call, grad: Tensor) -> None:
        self._enter_backward()
        if call.order:  # the root's begins with that of the last unit
            self._whereabouts.at("backward", self._units[call.order].where, self._gradients.step)
        self._differentiable = self._differentiable or torch.is_grad_enabled()
        task = torch._C._current_graph_task_id()
        needed = {call.order, *self._calls.needs[call.order]}
        for order in needed:
            self._live.reached(order, call.start, task)
        ahead = range(0)
        if call.reached_by != task and self._units[call.order].has(call.module):
            call.reached_by = task  # later outputs may be from inside units that come long after those ahead
            ahead = self._before(call.order)
        self._free_done(call, needed.union(ahead))
        self._gather(call.order, ahead, "backward")

    def _free_done(self, call: Call | None, needed: set[int]) -> None:
        """Free what this pass is done with when it reaches ``call``, or a part of it runs forward again."""
        if not self._differentiable and not self._kept:
            task = torch._C._current_graph_task_id()
            for order in self._live.take_done(call, task, needed | self._pinned):
                self._units[order].free()
                if self._gradients.early is not None:
                    self._gradients.early.done(self._units[order].spaces)

    def _arrival(self, order: int, space: Space, index: int) -> Callable[[Tensor], None]:
        """The hook of a parameter. torch hides what such a hook refers to from Python's garbage collection, so a strong
        reference back to the parameter would keep the whole model for ever.
        """
        weak_self, weak_space = weakref.ref(self), weakref.ref(space)

        def arrived(_: Tensor) -> None:
            hooks, owner = weak_self(), weak_space()
            if hooks is not None and owner is not None:  # else model and optimizer are gone
                hooks._arrived(order, owner, index)

        return arrived

    def _arrived(self, order: int, space: Space, index: int) -> None:
        if not self._gradients.in_backward:
            self._enter_backward()
        nested = torch._C._current_graph_task_id() != self._task
        self._gradients.arrived(space, index, in_parts=nested and self._calls.are_several(order))

    def _enter_backward(self) -> None:
        if not self._gradients.in_backward:
            self._gradients.begin_backward(self._repeated())
            self._differentiable, self._task = False, torch._C._current_graph_task_id()
            self._live.begin_pass([order for order, unit in enumerate(self._units) if unit.is_whole])
            Variable._execution_engine.queue_callback(self._after_backward)

    def _repeated(self) -> set[int]:
        """The tags of spaces that may be needed again after all their gradients have arrived; all, if graphs stay."""
        if self._gradients.early is None:
            return set()
        keeps_graph = self._kept or torch._C._autograd._get_current_graph_task_keep_graph()
        repeated = range(len(self._units)) if keeps_graph else self._calls.repeated
        return {space.tag for order in repeated for space in self._units[order].spaces}

    def _after_backward(self) -> None:
        self._gradients.end_backward()
        self._whereabouts.at("after a backward", "", self._gradients.step)
        self._calls.end_backward()
        self._kept = self._differentiable
        if not self._kept:
            self._pinned.clear()
            for unit in self._units:
                unit.free()

    # - both

    def _after(self, order: int) -> range:
        return range(order + 1, min(order + 1 + self._prefetch, len(self._units)))

    def _before(self, order: int) -> range:
        position = order or len(self._units)
        return range(position - 1, max(position - self._prefetch, 1) - 1, -1)

    def _gather(self, order: int, ahead: Iterable[int], direction: str) -> None:
        wanted = [order, *self._calls.needs[order]]
        if self._gradients.early is not None and self._gradients.in_backward:
            ahead = self._check_use(self._gradients.early, wanted, ahead)
        awaits = any(self._units[other].is_freed for other in wanted)
        if not awaits and not any(_communicates(self._units[other]) for other in (*wanted, *ahead)):
            return
        if any(self._units[other].is_freed for other in (*wanted, *ahead)):
            self._gather_freed(wanted, ahead, f"{direction} of step {self._gradients.step}")
        if self._gradients.in_backward:
            self._live.add([*wanted, *ahead])

    def _gather_freed(self, wanted: list[int], ahead: Iterable[int], phase: str) -> None:
        try:
            self._agreement.confirm()  # first: what peers lend may be what they are updating until they come here too
            for other in wanted:
                self._units[other].start_gather(phase)
            for other in ahead:
                self._units[other].start_gather(phase, ahead=True)
            for other in wanted:
                self._units[other].finish_gather()
        except CollectiveError:
            self._lost = True  # what is on its way may never arrive: nothing must wait for it on the way out
            raise

    def _check_use(self, early: EarlyUpdates, wanted: Iterable[int], ahead: Iterable[int]) -> list[int]:
        """What may still be gathered ahead. Raises if what is needed now may have been updated."""
        for order in wanted:
            early.check_use(self._units[order].spaces)
        return [order for order in ahead if not early.is_given(self._units[order].spaces)]


def begins_backward(order: int, units: int, prefetch: int) -> bool:
    """Whether backward begins with this unit: the root, or one of the last ``1 + prefetch`` in declared order."""
    return order == 0 or order >= units - 1 - prefetch


def _has_memory(tensor: Tensor) -> bool:
    """Whether it has an address: not what transforms of functions and compilers trace with."""
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _communicates(unit: Unit) -> bool:
    return any(space.communicates for space in unit.spaces)
