"""optimizer.step() as the engine sees it: check, reduce, clip, hand out flat segments, publish.

`Step` is the optimizer's `FlatSource`: it never knows which rule runs, only where its numbers lie.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardstep.collectives import Group, Pending
from shardstep.errors import SequenceError
from shardstep.optim import Optimizer
from shardstep.rules.binding import cut_states
from shardstep.sharding.agreement import Act, Agreement
from shardstep.sharding.buffers import Buffers
from shardstep.sharding.clip import global_norm
from shardstep.sharding.combination import Combination, Key
from shardstep.sharding.gradients import Gradients
from shardstep.sharding.memory import Ledger
from shardstep.sharding.nonfinite import NonFiniteTrace
from shardstep.sharding.space import Space
from shardstep.sharding.tensor_states import part
from shardstep.sharding.unfreezing import Unfreezing
from shardstep.types import Batch, Segment, Update


@dataclass
class _Gradient:
    """The gradient over what this rank owns of a space, possibly still on its way."""

    values: Tensor
    pending: Pending | None
    taken: bool

    def wait(self) -> Tensor:
        if self.pending is not None:
            self.pending.wait()
        return self.values


class Step:
    """The flat shards of a model, as its optimizer updates them."""

    def __init__(
        self,
        optimizer: Optimizer,
        spaces: list[Space],
        gradients: Gradients,
        agreement: Agreement,
        buffers: Buffers,
        clip: Callable[[float], float] | None,
        trace: NonFiniteTrace | None,
        unfreezing: Unfreezing,
        group: Group,
        ledger: Ledger,
    ) -> None:
        self.grad_norm: float | None = None
        """The norm of the last step's mean gradient, before clipping; None when nothing clips."""
        self._optimizer, self._spaces, self._gradients = optimizer, spaces, gradients
        self._agreement, self._buffers, self._clip = agreement, buffers, clip
        self._trace, self._unfreezing, self._group, self._ledger = trace, unfreezing, group, ledger

    # - FlatSource

    def batches(self, *, per_tensor: bool) -> Iterator[Batch]:
        """Everything that this rank updates, space by space; each is published as soon as it is updated."""
        self._check_not_held("optimizer.step()")
        groups = self._group_of_each()
        self._unfreezing.check_not_trained(groups)
        self._agree()
        if not self._gradients.leaves:
            return
        keys_of_each = [self._keys(space, groups) for space in self._spaces]
        for space, keys in zip(self._spaces, keys_of_each, strict=True):
            self._optimizer.check_update(_updates(space, keys))
        self._gradients.check_complete_subtrees()
        self._gradients.finish()
        for space in self._spaces:
            space.tree.total()
        scale = self._scale()
        publishing: list[Pending] = []
        coming = self._gradient(self._spaces[0])
        for space, following, keys in zip(self._spaces, [*self._spaces[1:], None], keys_of_each, strict=True):
            gradient, coming = coming, self._gradient(following) if following else coming
            runs = _tensors(space, keys) if per_tensor else _neighbours(space, keys)
            values = gradient.wait()
            segments = [self._segment(space, values, run, scale) for run in runs]
            if self._trace is not None:
                self._trace.remember(segments)
            yield Batch(segments, _updates(space, keys), Combination(space, keys, self._group, self._gradients.step))
            for index in space.touched:
                space.steps[index] += 1
            if self._trace is not None:
                self._trace.look(space, segments)
            if gradient.taken:
                self._ledger.give("gradients", gradient.values)
            space.free()  # whole from a forward without a backward, and no longer what the shards hold
            if (published := space.publish(f"publishing step {self._gradients.step}")) is not None:
                publishing.append(published)
        for pending in publishing:
            pending.wait()
        self._buffers.follow_rank_0()
        self._gradients.spend()
        if self._trace is not None:
            self._trace.raise_if_found(self._gradients.step - 1)

    def include(self, parameters: Sequence[nn.Parameter]) -> None:
        """Train parameters of the model that were frozen so far. Collective."""
        self._spaces = self._unfreezing.train(parameters, self._optimizer.states_of)

    def discard(self) -> None:
        self._gradients.discard()

    def whole_state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Every parameter's whole state in its own shape, on every rank, with its ``step``. Collective."""
        self._announce_reading()
        states: dict[nn.Parameter, dict[str, Tensor]] = {}
        for space in self._spaces:
            whole = {name: space.whole(run, f"state {name!r}") for name, run in space.state.items()}
            for slot, parameter, steps in zip(space.layout.slots, space.parameters, space.steps, strict=True):
                if steps:
                    cut = {name: space.of_slot(slot, name, flat).clone() for name, flat in whole.items()}
                    states[parameter] = {"step": torch.tensor(float(steps)), **cut}
            for declared in space.by_tensor.declared:
                for index, values in space.by_tensor.whole(declared, f"state {declared.name!r} of {space.where}"):
                    if space.steps[index]:
                        states[space.parameters[index]][declared.name] = values
        return states

    def adopt_state(self, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Cut rank 0's whole states into what each rank owns; a parameter without one starts anew. Collective."""
        for space in self._spaces:
            steps = torch.tensor([int(state[p]["step"]) if p in state else 0 for p in space.parameters])
            steps = steps.to(self._ledger.device)
            self._group.broadcast(steps, label=f"broadcast of the step counts of {space.where}")
            space.steps = steps.tolist()
            for declared in space.declared:
                space.start_state(declared)
            for name, run in space.state.items() if any(space.steps) else ():
                flat = self._whole_from_rank_0(space, name, state)
                run.copy_(flat[space.entries(name, space.owned.start, space.owned.stop)])
            for declared in space.by_tensor.declared:
                space.by_tensor.start(declared)
                if any(space.steps):
                    found = ((index, state.get(p, {}).get(declared.name)) for index, p in enumerate(space.parameters))
                    given = {index: values for index, values in found if values is not None}
                    space.by_tensor.adopt(declared, given, f"broadcast of state {declared.name!r} of {space.where}")

    def write_parameters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Replace parameters (and masters) by whole ``values``; every rank gives the same. Collective."""
        self._check_not_held("the replacement of parameters")
        self._announce_reading()
        for space in self._spaces:
            whole = space.whole(space.master, "writing parameters")
            for slot, parameter in zip(space.layout.slots, space.parameters, strict=True):
                if parameter in values:
                    whole[slot.offset : slot.end].view(slot.shape).copy_(values[parameter])
            space.master.copy_(whole[space.owned])
            space.values.copy_(space.master)
            space.free()
            if (published := space.publish("writing parameters")) is not None:
                published.wait()

    def _whole_from_rank_0(self, space: Space, name: str, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> Tensor:
        flat = space.whole(space.state[name], f"state {name!r}").clone()
        for slot, parameter in zip(space.layout.slots, space.parameters, strict=True):
            if name in state.get(parameter, {}):  # groups may differ in which states they have
                space.of_slot(slot, name, flat).copy_(state[parameter][name])
        self._group.broadcast(flat, label=f"broadcast of state {name!r} of {space.where}")
        return flat

    # - the parts of a step

    def _check_not_held(self, what: str) -> None:
        if any(space.held for space in self._spaces):
            raise SequenceError(
                f"expected {what} outside 'with shardstep.gathered(model):', got it inside: what it "
                "writes would be overwritten by the whole values at the end of the block"
            )

    def _agree(self) -> None:
        """Compare the count of micro-batches, and learn which parameters and buffers any rank has touched."""
        own = [index in space.touched for space in self._spaces for index in range(len(space.parameters))]
        own += self._buffers.changed()
        self._agreement.announce(Act.STEP, self._gradients.step, self._gradients.leaves, own)
        flags = self._agreement.confirm()
        if flags is None:
            return
        for space in self._spaces:
            space.touched = {index for index in range(len(space.parameters)) if flags[index]}
            flags = flags[len(space.parameters) :]
        self._buffers.mark(flags)

    def _announce_reading(self) -> None:
        self._agreement.announce(Act.READ_WHOLE, self._gradients.step, self._gradients.leaves)
        self._agreement.confirm()

    def _scale(self) -> float:
        """The one factor of this step's gradient sums: their mean, without the loss's scale, clipped."""
        leaves = self._gradients.leaves * self._group.size / self._gradients.unscaling
        if self._clip is None:
            return 1.0 / leaves
        runs = [(space, space.tree.total().values) for space in self._spaces]
        self.grad_norm = global_norm(runs, self._group, self._gradients.step) / leaves
        return self._clip(self.grad_norm) / leaves

    def _group_of_each(self) -> dict[int, int]:
        groups = enumerate(self._optimizer.param_groups)
        return {id(parameter): index for index, group in groups for parameter in group["params"]}

    def _gradient(self, space: Space) -> _Gradient:
        """The gradient sum over what this rank owns: its run, or the whole where the state is not sharded."""
        total = space.tree.total().values
        if total.numel() == space.master.numel():
            return _Gradient(total, None, taken=False)
        flat, taken = space.kept_leaf(total.dtype), False
        if flat is None:
            flat, taken = self._ledger.take("gradients", space.padded_numel, total.dtype), True
        label = f"gather of the gradients of {space.where} in step {self._gradients.step}"
        return _Gradient(flat, self._group.all_gather(flat, total, tag=2 * space.tag + 1, label=label), taken)

    def _keys(self, space: Space, groups: dict[int, int]) -> list[Key]:
        """The group of each touched parameter, and its count of steps with this update."""
        keys: list[Key] = [None] * len(space.parameters)
        for index in space.touched:
            keys[index] = (groups[id(space.parameters[index])], space.steps[index] + 1)
        return keys

    def _segment(self, space: Space, gradient: Tensor, run: "_Run", scale: float) -> Segment:
        low = space.values if space.master is not space.values else None
        part = slice(run.start - space.owned.start, run.stop - space.owned.start)
        state = cut_states(space.state, part.start, part.stop)
        tensor_state: dict[str, Tensor] = {}
        if run.index is None:
            shape, start = None, 0
        else:
            slot = space.layout.slots[run.index]
            shape, start = slot.shape, run.start - slot.offset
            state |= space.by_tensor.of(run.index, elements=True)
            tensor_state = space.by_tensor.of(run.index, elements=False)
        return Segment(
            group=run.group,
            step=run.step,
            param=space.master[part],
            grad=gradient[part],
            state=state,
            low=None if low is None else low[part],
            grad_scale=scale,
            offset=run.start,
            shape=shape,
            start=start,
            tensor_state=tensor_state,
        )


def _updates(space: Space, keys: list[Key]) -> list[Update]:
    """Every parameter of a space that is updated, on this rank or another."""
    slots = zip(space.layout.slots, keys, strict=True)
    return [Update(*key, slot.shape) for slot, key in slots if key is not None]


@dataclass
class _Run:
    """Elements [start, stop) of a flat space, with one step count and the hyper-parameters of one group.

    ``index``: the parameter that they belong to, if it is one.
    """

    group: int
    step: int
    start: int
    stop: int
    index: int | None


def _neighbours(space: Space, keys: list[Key]) -> Iterator[_Run]:
    """Runs of neighbouring parameters that are updated alike; untouched ones stay out."""
    for key, start, stop in space.layout.runs(keys, space.owned.start, min(space.owned.stop, space.layout.numel)):
        if key is not None:
            yield _Run(*key, start, stop, None)


def _tensors(space: Space, keys: list[Key]) -> Iterator[_Run]:
    """What this rank owns of each touched parameter, without the gaps between them."""
    for index, (slot, key) in enumerate(zip(space.layout.slots, keys, strict=True)):
        start, stop = part(slot, space.owned)
        if key is not None and start < stop:
            yield _Run(*key, slot.offset + start, slot.offset + stop, index)
