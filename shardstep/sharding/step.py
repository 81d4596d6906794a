"""optimizer.step() as the engine sees it: check, reduce, clip, hand out flat segments, publish.

`Step` is the optimizer's `FlatSource`: it never knows which rule runs, only where its numbers lie.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Literal

from torch import Tensor, nn

from shardstep.collectives import Group, Pending
from shardstep.errors import RuleError
from shardstep.optim import Combined, Optimizer
from shardstep.sharding.access import check_writable
from shardstep.sharding.agreement import Act, Agreement
from shardstep.sharding.buffers import Buffers
from shardstep.sharding.clip import Clipping, check_finite, clip_values, global_norm
from shardstep.sharding.combination import Combination, Key
from shardstep.sharding.gradients import Gradients
from shardstep.sharding.memory import Ledger, return_holes
from shardstep.sharding.nonfinite import NonFiniteTrace
from shardstep.sharding.ownership import Gathering, Place
from shardstep.sharding.space import Space
from shardstep.sharding.states import gather_states, scatter_states
from shardstep.sharding.unfreezing import Unfreezing
from shardstep.sharding.updates import Gradient, SpaceUpdate, joined, neighbours, segment_of, tensors_of
from shardstep.types import Batch, Segment, Update, Whole

Publishing = list[tuple[Space, Pending]]
"""What is being published."""


class Step:
    """The flat shards of a model, as its optimizer updates them."""

    def __init__(
        self,
        optimizer: Optimizer | Combined,
        spaces: list[Space],
        gradients: Gradients,
        agreement: Agreement,
        buffers: Buffers,
        clipping: Clipping,
        trace: NonFiniteTrace | None,
        unfreezing: Unfreezing,
        group: Group,
        ledger: Ledger,
        overlaps: bool,
    ) -> None:
        """``overlaps``: whether updated parameters are left on their way when the step is done."""
        self.grad_norm: float | None = None
        """The norm of the last step's mean gradient, before clipping; None when nothing clips."""
        self.skipped = 0
        """Steps left out because gradients overflowed under the loss's scale."""
        self.left_out = False
        self._optimizer, self._spaces, self._gradients = optimizer, spaces, gradients
        self._agreement, self._buffers, self._clipping = agreement, buffers, clipping
        self._trace, self._unfreezing, self._group, self._ledger = trace, unfreezing, group, ledger
        self._overlaps = overlaps
        self._rules = {space.tag: optimizer.rule_of(space.parameters[0]) for space in spaces}

    # - FlatSource

    def batches(self, *, per_tensor: bool, whole: Set[int]) -> Iterator[Batch]:
        """What this rank updates, space by space; each is published as soon as it is updated. Then one batch for each
        rule of ``whole``, so that its tensors are put together at all owners at the same time.
        """
        check_writable(self._spaces, "optimizer.step()")
        updates = self._begin()
        publishing: Publishing = []
        single = [update for update in updates if update.rule not in whole]
        if single:
            self._begin_gradient(single[0])
        for update, following in zip(single, [*single[1:], None], strict=False):
            if following is not None:
                self._begin_gradient(following)
            if not update.made:
                self._cut(update, per_tensor)
                yield Batch(update.segments, update.tensors, update.combination)
                self._finish(update)
            publishing += self._publish(update.space, f"publishing step {self._gradients.step}")
        for rule in sorted(whole):
            together = [update for update in updates if update.rule == rule]
            for update in together:
                self._begin_gradient(update)
            for update in together:
                self._cut(update, per_tensor=True)
            owners = self._owners(together) if self._group.size > 1 else None
            segments = [segment for update in together for segment in update.segments]
            tensors = [tensor for update in together for tensor in update.tensors]
            yield Batch(segments, tensors, joined(together), owners)
            if owners is not None:
                owners.release()
            for update in together:
                self._finish(update)
                publishing += self._publish(update.space, f"publishing step {self._gradients.step}")
        if updates:
            self._end(publishing)

    # - one space in backward

    def is_computable(self) -> bool:
        """Whether the hyper-parameters have values in the rules, whatever is going to be touched."""
        groups = self._group_of_each()
        try:
            for space in self._spaces:
                own = zip(space.parameters, space.steps, space.layout.slots, strict=True)
                known = [(groups.get(id(parameter)), steps, slot.shape) for parameter, steps, slot in own]
                tensors = [Update(group, steps + 1, shape) for group, steps, shape in known if group is not None]
                self._optimizer.check_update(tensors)
        except RuleError:
            return False
        return True

    def update(self, space: Space) -> None:
        """Update a space before step(), and give its gradient back; `EarlyUpdates` says when. step() publishes it."""
        update = self._update(space, self._group_of_each())
        total = space.leaves.tree.total().values
        update.gradient, update.scale = Gradient(total, None, taken=False), self._clipped([total])
        self._cut(update, self._optimizer.elementwise[update.rule])
        self._optimizer.update(Batch(update.segments, update.tensors, update.combination))
        self._finish(update)
        space.leaves.tree.clear()

    # - between steps

    def between_steps(self, call: Literal["train()", "eval()"]) -> Iterator[list[tuple[nn.Parameter, Segment]]]:
        """What this rank owns of each parameter that has been updated, space by space; published as after a step."""
        check_writable(self._spaces, f"optimizer.{call}")
        self._announce(Act.TRAIN if call == "train()" else Act.EVALUATE)
        groups, publishing = self._group_of_each(), Publishing()
        for space in self._spaces:
            counted = zip(space.parameters, space.steps, strict=True)
            keys = [(groups[id(parameter)], steps) if steps else None for parameter, steps in counted]
            space.arrive()
            yield [
                (space.parameters[run.index], segment_of(space, space.master, run, 1.0))
                for run in tensors_of(space, keys)
                if run.index is not None
            ]
            publishing += self._publish(space, f"publishing what optimizer.{call} made")
        for _, published in publishing:
            published.wait()

    def include(self, parameters: Sequence[nn.Parameter]) -> None:
        """Train parameters of the model that were frozen so far. Collective."""
        self._spaces = self._unfreezing.train(parameters, self._optimizer.states_of, self._optimizer.rule_of)
        self._rules = {space.tag: self._optimizer.rule_of(space.parameters[0]) for space in self._spaces}

    def discard(self) -> None:
        self._gradients.discard()

    def whole_state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Every parameter's whole state in its own shape, on every rank, with its ``step``. Collective."""
        self._announce(Act.READ_WHOLE)
        return gather_states(self._spaces)

    def adopt_state(self, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Cut rank 0's whole states into what each rank owns; a parameter without one starts anew. Collective."""
        scatter_states(self._spaces, state, self._group)

    def check_adoptable(self) -> None:
        self._gradients.check_nothing_updated("loads a state dict into the optimizer")

    def write_parameters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Replace parameters (and masters) by whole ``values``; every rank gives the same. Collective."""
        check_writable(self._spaces, "the replacement of parameters")
        self._announce(Act.READ_WHOLE)
        for space in self._spaces:
            whole = space.whole(space.master, "writing parameters")
            for slot, parameter in zip(space.layout.slots, space.parameters, strict=True):
                if parameter in values:
                    whole[slot.offset : slot.end].view(slot.shape).copy_(values[parameter])
            space.master.copy_(whole[space.owned])
            space.values.copy_(space.master)
            for _, published in self._publish(space, "writing parameters"):
                published.wait()

    # - the parts of a step

    def _begin(self) -> list[SpaceUpdate]:
        """Agree with the other ranks, sum the leaves, and say what is to be updated; nothing if there are none."""
        self._gradients.prepare_step("optimizer.step()")
        groups = self._group_of_each()
        self._unfreezing.check_not_trained(groups)
        self.left_out = False
        self._agree()
        if not self._gradients.leaves:
            return []
        if self._gradients.early is not None:
            self._gradients.early.check_hypers()
        updates = [self._update(space, groups) for space in self._spaces]
        remaining = [update for update in updates if not update.made]
        for update in remaining:
            self._optimizer.check_update(update.tensors)
        self._gradients.settle()
        scale = self._scale([update.space for update in remaining])
        if scale is None:
            self._leave_out()
            return []
        for update in updates:
            update.scale = scale
        return updates

    def _leave_out(self) -> None:
        """Change nothing but the loss's scale and the buffers, which forward has written."""
        self.left_out = True
        self.skipped += 1
        self._buffers.follow_rank_0()
        self._gradients.spend(left_out=True)

    def _update(self, space: Space, groups: dict[int, int]) -> SpaceUpdate:
        keys = self._keys(space, groups)
        combination = Combination(space, keys, self._group, self._gradients.step)
        return SpaceUpdate(space, self._rules[space.tag], keys, combination, space.leaves.updated)

    def _cut(self, update: SpaceUpdate, per_tensor: bool) -> None:
        """Make the segments of an update."""
        runs = tensors_of(update.space, update.keys) if per_tensor else neighbours(update.space, update.keys)
        values = update.wait()
        update.space.arrive()  # if no forward has used it: peers may still be taking what is about to be overwritten
        update.segments = [
            segment_of(update.space, values, run, update.scale * self._optimizer.grad_sign(run.group)) for run in runs
        ]
        update.space.follow(update.space.leaves.touched)
        if self._trace is not None:
            self._trace.remember(update.space, update.segments)

    def _finish(self, update: SpaceUpdate) -> None:
        """Count steps, and give back what an update needed."""
        space = update.space
        for index in space.leaves.touched:
            space.steps[index] += 1
        if self._trace is not None:
            self._trace.look(space, update.segments)
        if update.gradient is not None and update.gradient.taken:
            self._ledger.give("gradients", update.gradient.values)

    def _publish(self, space: Space, phase: str) -> Publishing:
        """Begin to send what this rank has changed to those that keep the parameters whole."""
        space.free()  # whole from a forward without a backward, and no longer what the shards hold
        published = space.publish(phase, together=not self._overlaps)
        return [] if published is None else [(space, published)]

    def _end(self, publishing: Publishing) -> None:
        for space, published in publishing:
            if self._overlaps:
                space.arrive_later(published)
            else:
                published.wait()
        self._buffers.follow_rank_0()
        self._gradients.spend()
        return_holes(self._gradients.step)
        self._group.whereabouts.at("before its first forward", "", self._gradients.step)
        if self._trace is not None:
            self._trace.raise_if_found(self._gradients.step - 1)

    def _owners(self, updates: list[SpaceUpdate]) -> Gathering:
        tensors, at = list[Whole](), list[Place]()
        for update in updates:
            space = update.space
            slots = zip(space.layout.slots, update.keys, space.places, strict=True)
            for index, (slot, key, place) in enumerate(slots):
                if key is not None and slot.numel:  # one rank has no segment of what is empty
                    scale = update.scale * self._optimizer.grad_sign(key[0])
                    mine = place.owner == self._group.rank
                    squares = space.by_tensor.of(index, elements=False) if mine else {}
                    tensors.append(Whole(*key, slot.shape, space.precision.compute, scale, slot.offset, squares))
                    at.append(place)
        last = 2 * max(space.tag for space in self._spaces) + 1
        return Gathering(tensors, at, self._group, self._ledger, (last + 1, last + 2), self._gradients.step)

    def _agree(self) -> None:
        """Compare the count of micro-batches, and learn which parameters and buffers any rank has touched."""
        own = [index in space.leaves.touched for space in self._spaces for index in range(len(space.parameters))]
        own += self._buffers.changed()
        self._agreement.announce(Act.STEP, self._gradients.step, self._gradients.leaves, own)
        flags = self._agreement.confirm()
        if flags is None:
            return
        for space in self._spaces:
            space.leaves.touched = {index for index in range(len(space.parameters)) if flags[index]}
            flags = flags[len(space.parameters) :]
        self._buffers.mark(flags[: len(self._buffers.owners)])

    def _announce(self, act: Act) -> None:
        self._agreement.announce(act, self._gradients.step, self._gradients.leaves)
        self._agreement.confirm()

    def _scale(self, spaces: Sequence[Space]) -> float | None:
        """The one factor of this step's gradient sums: their mean, without the loss's scale, clipped.

        None where a loss scaler has the step left out because they have overflowed.
        """
        gradients, group = self._gradients, self._group
        runs = [(space, space.leaves.tree.total().values) for space in spaces]
        norm = None if self._clipping.by_norm is None else global_norm(runs, group, gradients.step)
        self.grad_norm = None if norm is None else norm / gradients.divisor
        if gradients.scaling is not None:
            finite = gradients.are_finite() if norm is None else math.isfinite(norm)
            if gradients.overflowed(not finite, gradients.scaling):
                return None
        elif norm is not None:
            check_finite(norm, runs, group, gradients.step)
        return self._clipped([values for _, values in runs])

    def _clipped(self, runs: list[Tensor]) -> float:
        """Clip by value, where the step does so; the factor that makes clipped means of these sums."""
        leaves = self._gradients.divisor
        if self._clipping.value is not None:
            clip_values(runs, self._clipping.value * leaves)
        return self._clipping.factor(self.grad_norm) / leaves

    def _group_of_each(self) -> dict[int, int]:
        groups = enumerate(self._optimizer.param_groups)
        return {id(parameter): index for index, group in groups for parameter in group["params"]}

    def _begin_gradient(self, update: SpaceUpdate) -> None:
        """Begin to gather the gradient that an update is made with."""
        if not update.made:
            update.gradient = self._gradient(update.space)

    def _gradient(self, space: Space) -> Gradient:
        """The gradient sum over what this rank owns: its run, or the whole where the state is not sharded."""
        total = space.leaves.tree.total().values
        if total.numel() == space.master.numel():
            return Gradient(total, None, taken=False)
        flat, taken = space.leaves.kept(total.dtype), False
        if flat is None:
            flat, taken = self._ledger.take("gradients", space.padded_numel, total.dtype), True
        label = f"gather of the gradients of {space.where} in step {self._gradients.step}"
        return Gradient(flat, self._group.all_gather(flat, total, tag=2 * space.tag + 1, label=label), taken)

    def _keys(self, space: Space, groups: dict[int, int]) -> list[Key]:
        """The group of each touched parameter, and its count of steps with this update."""
        keys: list[Key] = [None] * len(space.parameters)
        for index in space.leaves.touched:
            keys[index] = (groups[id(space.parameters[index])], space.steps[index] + 1)
        return keys
