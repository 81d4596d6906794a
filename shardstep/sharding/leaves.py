"""The gradients of one flat space on this rank: leaves, their sums, and what stands for them in ``.grad``.

[Note: the tensors of leaves]
    leaf     padded numel   the gradient of the current micro-batch; its buffer is kept between steps below stage 2.
    tree     shard numel    partial sums of all ranks' leaves over this rank's run.
    local    padded numel   partial sums of this rank's own leaves (schedule per step).

Nothing here decides when a leaf is complete or sent.
"""

from collections.abc import Sequence, Set
from operator import attrgetter, is_

import torch
from torch import Tensor, nn

from shardstep.config import Precision
from shardstep.errors import SequenceError
from shardstep.layout import Layout
from shardstep.sharding.finite import Origins
from shardstep.sharding.memory import Ledger
from shardstep.sharding.reduce import Tree
from shardstep.sharding.stand_in import StandIn

_grad = attrgetter("grad")


class Leaves:
    """Those of one space, one at a time; see the note above."""

    def __init__(
        self,
        layout: Layout,
        parameters: Sequence[nn.Parameter],
        padded_numel: int,
        precision: Precision,
        ledger: Ledger,
    ) -> None:
        self.tree, self.local = Tree(ledger, precision.sums), Tree(ledger, precision.sums)
        self.origins = Origins()
        self.touched: set[int] = set()
        """The parameters that have got a gradient in this step."""
        self.updated = False
        """Whether the update of this step was made in backward."""
        self.stand_ins: list[StandIn] = []
        """For each parameter, its ``.grad`` from backward to zero_grad(); empty while nothing is trained."""
        self._standing: set[int] = set()
        """The parameters that have been given theirs."""
        self._layout, self._parameters, self._padded_numel = layout, parameters, padded_numel
        self._dtype, self._ledger = precision.reduce, ledger
        self._leaf: Tensor | None = None
        self._kept: Tensor | None = None
        self._written: set[int] = set()

    def keep_buffer(self) -> None:
        """Use one buffer for all leaves of all steps."""
        self._kept = self._ledger.take("gradients", self._padded_numel, self._dtype).zero_()

    def write(self, index: int) -> bool:
        """Move parameter ``index``'s ``.grad`` into the leaf, or add it there; True when none is missing."""
        parameter, slot = self._parameters[index], self._layout.slots[index]
        leaf = self._open()
        grad = parameter.grad
        if grad is None:
            raise SequenceError(
                f"expected the gradient of {slot.name!r} in .grad when autograd has accumulated it, got None: a hook "
                f"that was registered before shard() took it away; leave it there, and let optimizer.step() update"
            )
        part = leaf[slot.offset : slot.end].view(slot.shape)
        values = grad.hand_over() if isinstance(grad, StandIn) else grad
        (part.add_ if index in self._written else part.copy_)(values)
        parameter.grad = self.stand_ins[index]
        self._written.add(index)
        return len(self._written) == len(self._parameters)

    def close(self) -> None:
        """Complete the leaf with zeros and add it to this rank's own ones."""
        leaf = self._open()
        for index in set(range(len(self._parameters))) - self._written:
            slot = self._layout.slots[index]
            leaf[slot.offset : slot.end].zero_()
        self.return_stand_ins(self._standing - self._written)
        self.touched |= self._written
        self._standing |= self._written
        self._written, self._leaf = set(), None
        self.local.push(leaf, home="kept" if leaf is self._kept else "tree")

    def _open(self) -> Tensor:
        if self._leaf is None:
            if self._kept is not None:
                self.tree.settle()
                self.local.settle()
                self._leaf = self._kept
            else:
                self._leaf = self._ledger.take("gradients", self._padded_numel, self._dtype)
                for start, end in (*self._layout.gaps, (self._layout.numel, self._padded_numel)):
                    self._leaf[start:end].zero_()
        return self._leaf

    def kept(self, dtype: torch.dtype) -> Tensor | None:
        """The buffer that is kept between steps, if there is one of this dtype."""
        return self._kept if self._kept is not None and self._kept.dtype == dtype else None

    def drop(self) -> None:
        """Forget every leaf and sum."""
        if self._leaf is not None and self._leaf is not self._kept:
            self._ledger.give("gradients", self._leaf)
        self._leaf = None
        self._standing |= self._written
        self._written.clear()
        self.touched.clear()
        self.updated = False
        self.origins.clear()
        self.tree.clear()
        self.local.clear()

    def drop_stand_ins(self) -> None:
        """Take all stand-ins away; a gradient that autograd has just put in the place of one stays."""
        with torch._C.DisableTorchFunctionSubclass():  # or freed parameters would look at each access
            for parameter, stand_in in zip(self._parameters, self.stand_ins, strict=True):
                stand_in.arrived = None
                if parameter.grad is stand_in:
                    parameter.grad = None
        self._standing.clear()

    def withdraw_stand_ins(self) -> None:
        """Let autograd begin new gradients, but for what has arrived already."""
        with torch._C.DisableTorchFunctionSubclass():
            for index in self._standing:
                parameter, stand_in = self._parameters[index], self.stand_ins[index]
                if parameter.grad is stand_in and stand_in.arrived is None:
                    parameter.grad = None

    def return_stand_ins(self, indices: Set[int] | None = None) -> None:
        """Let parameters that autograd has given nothing since have theirs again."""
        with torch._C.DisableTorchFunctionSubclass():
            for index in self._standing if indices is None else indices:
                if self._parameters[index].grad is None:
                    self._parameters[index].grad = self.stand_ins[index]

    def standing(self) -> tuple[int, int]:
        """How many parameters have been given a stand-in, and how many of them have it still."""
        with torch._C.DisableTorchFunctionSubclass():
            there = sum(map(is_, map(_grad, self._parameters), self.stand_ins))
        return len(self._standing | self._written), there
