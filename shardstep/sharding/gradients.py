"""From a parameter's ``.grad`` to the sum of all leaves on the rank that owns it.

A leaf is filled as autograd delivers gradients. When the last one of a space is there, its runs travel to
their owners (`exchange`) while backward goes on with the next unit. Exchanges begin in one order on all ranks, from the
last unit to the first and the root's at the end: a leaf that is complete before its turn waits, so that ranks which
use different parameters do not wait for one another in a circle. Under the schedule per step, leaves are first
summed locally.
Nothing here knows about modules or optimizers.
"""

from collections.abc import Sequence, Set

import torch

from shardstep.collectives import Group
from shardstep.config import Schedule
from shardstep.errors import ConfigError, RankMismatchError, SequenceError
from shardstep.sharding.agreement import Act, Agreement
from shardstep.sharding.early import EarlyUpdates
from shardstep.sharding.exchange import Exchanges
from shardstep.sharding.finite import is_finite
from shardstep.sharding.memory import Ledger
from shardstep.sharding.scaler import Scaling
from shardstep.sharding.space import Space
from shardstep.sharding.stand_in import StandIn


class Gradients:
    """The leaves of one step over all trained spaces of a model."""

    def __init__(
        self,
        spaces: list[Space],
        group: Group,
        ledger: Ledger,
        schedule: Schedule,
        agreement: Agreement,
        scaling: Scaling | None,
        overlaps: bool,
        traced: bool,
    ) -> None:
        """``overlaps``: whether the schedule per step sends during the last backward pass, where that is known;
        ``traced``: whether ranks are to be named whose gradients are not finite.
        """
        self.schedule, self.scaling = schedule, scaling
        self.leaves = 0
        """Backward passes that this rank has finished since the last step."""
        self.step = 0
        """Optimizer steps taken; names the step in messages."""
        self.most_leaves = 0
        """The most backward passes that this rank has made in one step."""
        self.in_backward = False
        self.early: EarlyUpdates | None = None
        """What is told of each leaf where spaces are updated in backward."""
        self.unscaling = 1.0
        """What this step's gradients are multiplied by because the loss was scaled."""
        self._infinite: bool | None = None
        self._settled = False
        self._spent = self._mixed = self._broken = self._arrived = False
        self._group, self._ledger, self._agreement = group, ledger, agreement
        self._expected_leaves: int | None = None
        self._overlaps = overlaps
        self._usual_leaves: int | None = None
        self._open: set[int] = set()
        self._turn = 0
        self._exchanges = Exchanges(group, ledger, agreement, self._landed, traced=traced)
        self.collect(spaces)

    def collect(self, spaces: list[Space]) -> None:
        """Collect the gradients of these spaces from the next step on; the root's come first among them."""
        for space in (space for space in spaces if not space.leaves.stand_ins):
            names = [slot.name for slot in space.layout.slots]
            pairs = zip(space.parameters, names, strict=True)
            space.leaves.stand_ins = [StandIn(parameter, name, self.unscale) for parameter, name in pairs]
        root = [space for space in spaces if not space.unit_name]
        self._spaces, self._turns = spaces, [*reversed(spaces[len(root) :]), *root]

    def expect(self, leaves: int | None) -> None:
        """This rank's leaves of the step: the schedule per step then sends with the last one. None: the usual ones."""
        if leaves is not None or self._usual_leaves is not None:
            self._expected_leaves = leaves or self._usual_leaves

    def expect_always(self, leaves: int) -> None:
        """The same for this step and all after it."""
        self._expected_leaves = self._usual_leaves = leaves

    def begin_backward(self, repeated: Set[int] = frozenset()) -> None:
        """Open the next leaf; ``repeated``: see `EarlyUpdates.begin`."""
        self._discard_what_was_zeroed()
        self._check_not_broken("another backward()")
        if self._settled:
            raise SequenceError(
                "expected optimizer.step() or optimizer.zero_grad() after the gradients were unscaled, read or set, "
                "got another backward(): their sums are complete, and nothing can be added to them"
            )
        refused = [] if self.early is None else self.early.begin(self._spaces, repeated, self.step, last=self._is_last)
        for space in self._spaces:
            space.leaves.withdraw_stand_ins()
        self._agreement.announce(Act.BACKWARD, self.step, self.leaves, refused)
        self._open, self._turn = {space.tag for space in self._spaces}, 0
        self.in_backward, self._arrived = True, False

    @property
    def _is_last(self) -> bool:
        """Whether the pass that begins completes a step that can be made."""
        leaves = self.leaves + 1
        return self._expected_leaves == leaves and not self._spent and self._is_complete_subtree(leaves)

    def notice_exception(self) -> None:
        """Nobody tells that an exception has left backward(); it has if autograd does not work."""
        if self.in_backward and torch._C._current_graph_task_id() < 0:
            self.leave_backward()

    def catch_up(self, what: str) -> None:
        """Forget what was zeroed. Raises if ``what`` is called inside backward(), or after it was left half done."""
        self.notice_exception()
        if self.in_backward:
            raise SequenceError(f"expected {what} outside backward(), got it inside it, from a hook; call it after")
        self._discard_what_was_zeroed()
        self._check_not_broken(what)

    def prepare_step(self, what: str) -> None:
        """As `catch_up`, and raise if ``what``, a step or a look at gradients, cannot be made of what there is."""
        self.catch_up(what)
        if self._mixed:
            raise SequenceError(
                "expected zero_grad() between optimizer.step() and the next backward(): the step has used up its "
                "gradients, and nothing could be added to them; call optimizer.zero_grad() or model.zero_grad()"
            )

    def _discard_what_was_zeroed(self) -> None:
        """Whoever sets ``p.grad`` to None, as model.zero_grad() does, means the gradient that it stands for.

        A pass that was left before any gradient has arrived has left none a stand-in, whatever was zeroed.
        """
        counts = [space.leaves.standing() for space in self._spaces]
        given, there = sum(given for given, _ in counts), sum(there for _, there in counts)
        if given and not there and (self._arrived or not self._broken):
            self.discard()
        elif there < given and not self._broken:
            raise SequenceError(
                f"expected zero_grad() for all trained parameters of a sharded model or for none, but {given - there} "
                f"of {given} gradients were set to None or replaced; call optimizer.zero_grad()"
            )

    def _check_not_broken(self, what: str) -> None:
        if self._broken:
            self.check_nothing_updated(f"calls {what}")  # zero_grad() would not help
            raise SequenceError(
                f"expected optimizer.zero_grad() after a backward() that was left by an exception, got {what}: what "
                f"there is of this step's gradients is not whole"
            )

    def _check_scaled(self, scaling: Scaling) -> None:
        if not scaling.reached:
            raise SequenceError(
                "expected a loss made of what the model returns, whose gradients the loss scale multiplies, got "
                "gradients that came another way; call the model itself, and multiply a loss that uses parameters only "
                "by sharded.loss_scale and add it to that"
            )
        self.unscaling = 1.0 / scaling.scale

    def arrived(self, space: Space, index: int, *, in_parts: bool) -> None:
        """Take parameter ``index``'s gradient; the last one of a leaf completes it, and it is sent.

        ``in_parts``: more may come, so that the leaf is complete at the end of the backward pass only.
        """
        if space.tag not in self._open:
            raise SequenceError(
                f"the gradient of {space.layout.slots[index].name!r} arrived after the leaf of {space.where} was "
                f"complete; a parameter may receive its gradient once in a backward pass"
            )
        if self.scaling is not None:
            self._check_scaled(self.scaling)
        if not self._arrived:
            self._begin_leaf()
        if space.leaves.write(index) and not in_parts:
            self._complete(space)

    def _begin_leaf(self) -> None:
        self._arrived = True
        told = self.schedule == "per step" and self._overlaps and self._usual_leaves == self._expected_leaves
        if told and self.leaves == self._usual_leaves:
            raise SequenceError(
                f"expected optimizer.step() after {self.leaves} micro-batches, as sharded.expect() was told, got "
                f"another backward(): their sum was sent with the last of them, and what comes after would be added in "
                f"another order; tell how many micro-batches each step has on this rank"
            )
        self._mixed = self._mixed or self._spent
        if self.early is not None and self._expected_leaves is None:
            raise ConfigError(
                "expected to know a step's last micro-batch for update_in_backward=True, got a backward() of a loop "
                "that does not say; take the micro-batches from sharded.micro_batches(), or call sharded.expect(n) "
                "where each step has n of them on every rank"
            )

    def end_backward(self) -> None:
        """Complete the leaves of spaces with unused parameters and wait for what is on its way.

        A pass that gave no parameter a gradient (torch.autograd.grad for other tensors) was no micro-batch.
        """
        if self.scaling is not None:
            self.scaling.reached = False
        if not self._arrived:
            self.in_backward = False
            if self.early is not None:
                self.early.end()
            for space in self._spaces:
                space.leaves.return_stand_ins()
            return
        for space in self._turns:
            if space.tag in self._open:
                self._complete(space)
        self._exchanges.land()
        self._ledger.drop_spare()
        if self.early is not None:
            self.early.end()
        self.leaves += 1
        self.most_leaves = max(self.most_leaves, self.leaves)
        self.in_backward = False

    def check_nothing_updated(self, sentence: str) -> None:
        """Raise a SequenceError if units were updated in backward: what this rank does must wait for step()."""
        if self.early is not None:
            self.early.check(sentence)

    def leave_backward(self) -> None:
        """The pass was left by an exception: what it has gathered, and was to be added to, cannot be used."""
        self.in_backward, self._broken = False, self._arrived or self.leaves > 0
        if self.scaling is not None:
            self.scaling.reached = False

    def finish(self) -> None:
        """Send what the schedule per step has kept back."""
        for space in self._turns:
            if len(space.leaves.local):
                self._launch(space)
        self._exchanges.land()
        self._ledger.drop_spare()

    def unscale(self, factor: float) -> bool:
        """Have the step multiply its gradients by ``factor``; whether any is infinite or NaN anywhere. Collective."""
        if self.scaling is not None:
            raise ConfigError(
                "expected one scaling of the loss, got torch.amp.GradScaler for a model with shard(loss_scale=...); "
                "leave one out"
            )
        if self.early is not None:
            raise ConfigError(
                "expected a loss without a scale for update_in_backward=True, got torch.amp.GradScaler, which has to "
                "know of every overflow before anything is updated; leave one out"
            )
        if self._infinite is None:
            self.announce(Act.UNSCALE)
            self._agreement.confirm()
            self.settle()
            self.unscaling, self._infinite = factor, self._any([not self.are_finite()])[0]
        return self._infinite

    def settle(self) -> None:
        """Complete the sums of all gradients; nothing can be added after that. Collective, after an announcement."""
        self.check_complete_subtrees()
        self.finish()
        for space in self._spaces:
            if not space.leaves.updated:
                space.leaves.tree.total()
        self._settled = True

    @property
    def divisor(self) -> float:
        """What makes means, without the loss's scale, of the sums of all gradients."""
        leaves = self.leaves + self.in_backward
        return leaves * self._group.size / self.unscaling

    def announce(self, act: Act, flags: Sequence[bool] = ()) -> None:
        """Tell the other ranks what is done at this point of the loop."""
        self._agreement.announce(act, self.step, self.leaves, flags)

    def are_finite(self) -> bool:
        """Whether the sums of all gradients are, on this rank."""
        return all(map(is_finite, (space.leaves.tree.total().values for space in self._spaces)))

    def overflowed(self, here: bool, scaling: Scaling) -> bool:
        """Whether any rank has gradients that are not finite under the loss's scale. Collective."""
        anywhere, *scales = self._any([here, *scaling.told()])
        if scaling.differs(scales):
            raise RankMismatchError(
                f"expected the same loss scale on all ranks, but rank {self._group.rank} has {scaling.scale} in step "
                f"{self.step} and another rank has not; load the same LossScaler.state_dict() everywhere"
            )
        return anywhere

    def _any(self, own: list[bool]) -> list[bool]:
        """Which flags any rank has set. Collective."""
        self.announce(Act.UNSCALE, own)
        flags = self._agreement.confirm()
        return own if flags is None else flags

    def discard(self) -> None:
        """Forget all leaves, and allow the next backward pass."""
        self.check_nothing_updated("calls zero_grad()")
        if self.in_backward:
            self.leave_backward()
        self._forget()
        for space in self._spaces:
            space.leaves.drop_stand_ins()
        self._spent = self._mixed = self._broken = False

    def spend(self, *, left_out: bool = False) -> None:
        """The step is done, or left out: its gradients are gone, and what is added before ``discard`` is of no use."""
        if self.scaling is not None:
            self.scaling.scaler.update(left_out)
        self._forget()
        self._expected_leaves = self._usual_leaves
        self.step += not left_out
        self._spent = True

    def _forget(self) -> None:
        self._agreement.confirm()
        self._exchanges.land()
        self.in_backward = False
        if self.early is not None:
            self.early.forget()
        for space in self._spaces:
            space.leaves.drop()
        self.leaves = 0
        self.unscaling, self._infinite, self._settled = 1.0, None, False
        if self.scaling is not None:
            self.scaling.end_step()

    def _complete(self, space: Space) -> None:
        self._open.discard(space.tag)
        space.leaves.close()
        if self.schedule == "per step" and not (self._overlaps and self._expected_leaves == self.leaves + 1):
            return
        while self._turn < len(self._turns) and self._turns[self._turn].tag not in self._open:
            self._launch(self._turns[self._turn])
            self._turn += 1

    def _launch(self, space: Space) -> None:
        if self.early is not None:
            self.early.give(space)
        self._exchanges.launch(space, self.step)

    def _landed(self, space: Space) -> None:
        if self.early is not None:
            self.early.landed(space)

    def check_complete_subtrees(self) -> None:
        """Per step, a rank's own sum must be a complete subtree of the tree over all leaves."""
        if not self._is_complete_subtree(self.leaves):
            raise ConfigError(
                f"expected a power of two micro-batches on each rank for schedule='per step', got {self.leaves}; "
                f"the local sums would not be complete parts of the fixed tree: use schedule='per leaf'"
            )

    def _is_complete_subtree(self, leaves: int) -> bool:
        return self.schedule == "per leaf" or self._group.size == 1 or not leaves & (leaves - 1)
