"""One flat space of a unit on this rank: parameters of one dtype that are all trained or all frozen.

[Note: the tensors of a space]
    flat     padded numel   the parameters, whole; their ``.data`` are views of it. Freed at stage 3.
    shard    shard numel    this rank's run of the parameters; a view of ``flat`` below stage 3.
    values   owned numel    what the rule's result is written to: ``flat`` at stage 0, else ``shard``.
    master   owned numel    what the rule updates: ``values`` itself, or a wider copy of it.
    state    owned numel    one buffer per named state of the rule, in its declared dtype or the master's;
                            what is kept tensor by tensor is in `tensor_states`.
    leaf     padded numel   the gradient of the current micro-batch; kept between steps below stage 2.
    tree     shard numel    partial sums of all ranks' leaves over this rank's run.
    local    padded numel   partial sums of this rank's own leaves (schedule per step).

A space gathers, frees and holds; when to do so is decided in `hooks` and `step`.
"""

import torch
from torch import Tensor, nn

from shardstep.collectives import Group, Pending
from shardstep.config import Precision, Stage
from shardstep.layout import Layout
from shardstep.rules.ir import State
from shardstep.sharding.freed import FreedParameter
from shardstep.sharding.memory import Ledger
from shardstep.sharding.reduce import Tree
from shardstep.sharding.tensor_states import States, TensorStates, dtype_of, in_all


class Space:
    """See the note above. ``tag`` numbers the space among all of a model's."""

    def __init__(
        self,
        unit_name: str,
        tag: int,
        layout: Layout,
        parameters: list[nn.Parameter],
        stage: Stage,
        precision: Precision,
        group: Group,
        ledger: Ledger,
    ) -> None:
        self.unit_name, self.tag, self.layout, self.parameters = unit_name, tag, layout, parameters
        self.stage, self.precision = stage, precision
        self.trained = parameters[0].requires_grad
        self.shard_numel = layout.shard_numel(group.size)
        self.padded_numel = layout.padded_numel(group.size)
        self.steps = [0] * len(parameters)
        self.touched: set[int] = set()
        self.tree = Tree(ledger, precision.master)
        self.local = Tree(ledger, precision.master)
        self.state: dict[str, Tensor] = {}
        self.declared: tuple[State, ...] = ()
        """The states in ``state``."""
        self.is_whole = True
        self.held = 0
        """How many ``gathered`` blocks keep the parameters whole."""
        self._group, self._ledger = group, ledger
        self._classes = [type(parameter) for parameter in parameters]
        self._gathering: Pending | None = None
        self._leaf: Tensor | None = None
        self._kept_leaf: Tensor | None = None
        self._written: set[int] = set()
        self._place(stage, precision)

    def _place(self, stage: Stage, precision: Precision) -> None:
        """Move the parameters into the flat space, as rank 0 has them, and keep what this rank owns."""
        group, take = self._group, self._ledger.take
        whole = torch.zeros(self.padded_numel, dtype=precision.master, device=self._ledger.device)
        for slot, parameter in zip(self.layout.slots, self.parameters, strict=True):
            whole[slot.offset : slot.end].view(slot.shape).copy_(parameter.detach())
        group.broadcast(whole, label=f"broadcast of the first values of {self.where}")
        self.flat = take("parameters", self.padded_numel, precision.params).copy_(whole)
        own = slice(group.rank * self.shard_numel, (group.rank + 1) * self.shard_numel)
        self.owned = own if stage.shard_state else slice(0, self.padded_numel)
        self.shard = self.flat[own]
        if stage.shard_params:
            self.shard = take("parameters", self.shard_numel, precision.params).copy_(self.shard)
        self.values = self.shard if stage.shard_state else self.flat
        self.master = self.values
        if self.trained and precision.master != precision.params:
            owned_numel = self.values.numel()
            self.master = take("state", owned_numel, precision.master).copy_(whole[self.owned])
        if self.trained and not stage.shard_grads:
            self._kept_leaf = take("gradients", self.padded_numel, precision.reduce).zero_()
        for slot, parameter in zip(self.layout.slots, self.parameters, strict=True):
            parameter.data = self.flat[slot.offset : slot.end].view(slot.shape)
            parameter.grad = None
        self.free()

    @property
    def where(self) -> str:
        """How messages name this space."""
        return f"unit {self.unit_name!r}" if self.unit_name else "the root unit"

    @property
    def communicates(self) -> bool:
        """Whether gathering and freeing the parameters does anything (it does not in a ``gathered`` block)."""
        return self.stage.shard_params and not self.held

    @property
    def _flat_bytes(self) -> int:
        return self.padded_numel * self.precision.params.itemsize

    # - parameters: gathered and freed

    def start_gather(self, phase: str) -> None:
        """Begin to make the parameters whole; no-op when they are, or are already on their way."""
        if self.is_whole or self._gathering is not None:
            return
        self.flat.untyped_storage().resize_(self._flat_bytes)
        self._ledger.count("parameters", self._flat_bytes)
        label = f"gather of {self.where} for {phase}"
        self._gathering = self._group.all_gather(self.flat, self.shard, tag=2 * self.tag, label=label)

    def finish_gather(self) -> None:
        """Wait until the parameters are whole."""
        if self._gathering is None:
            return
        self._gathering.wait()
        self._gathering = None
        self.is_whole = True
        for parameter, whole_class in zip(self.parameters, self._classes, strict=True):
            parameter.__class__ = whole_class

    def free(self) -> None:
        """Give the whole parameters' memory back, if they are sharded; what is on its way is waited for."""
        if not self.communicates:
            return
        self.finish_gather()
        if not self.is_whole:
            return
        self.is_whole = False
        self.flat.untyped_storage().resize_(0)
        self._ledger.count("parameters", -self._flat_bytes)
        for slot, parameter in zip(self.layout.slots, self.parameters, strict=True):
            parameter.__class__ = FreedParameter
            parameter.shardstep_name, parameter.shardstep_unit = slot.name, self.unit_name  # type: ignore[attr-defined]

    def publish(self, phase: str) -> Pending | None:
        """Begin to send the updated shard to every rank that keeps the parameters whole (stages 1 and 2)."""
        if self.stage.shard_params or not self.stage.shard_state:
            return None
        label = f"gather of {self.where} for {phase}"
        return self._group.all_gather(self.flat, self.shard, tag=2 * self.tag, label=label)

    def keep_writes(self) -> None:
        """Take over values that the user wrote into the whole parameters, where they differ."""
        own = self.flat[self.owned]
        if self.values.data_ptr() != own.data_ptr():
            self.values.copy_(own)
        if self.master is not self.values:
            unchanged = self.master.to(own.dtype) == own
            torch.where(unchanged, self.master, own.to(self.master.dtype), out=self.master)

    # - gradients: one leaf at a time

    def write_leaf(self, index: int) -> bool:
        """Move parameter ``index``'s ``.grad`` into the leaf; True when that was the last one missing."""
        parameter, slot = self.parameters[index], self.layout.slots[index]
        leaf = self._open_leaf()
        assert parameter.grad is not None
        leaf[slot.offset : slot.end].view(slot.shape).copy_(parameter.grad)
        parameter.grad = None
        self._written.add(index)
        return len(self._written) == len(self.parameters)

    def close_leaf(self) -> None:
        """Complete the leaf with zeros and add it to this rank's own leaves."""
        leaf = self._open_leaf()
        for index in set(range(len(self.parameters))) - self._written:
            slot = self.layout.slots[index]
            leaf[slot.offset : slot.end].zero_()
        self.touched |= self._written
        self._written, self._leaf = set(), None
        self.local.push(leaf, home="kept" if leaf is self._kept_leaf else "tree")

    def _open_leaf(self) -> Tensor:
        if self._leaf is None:
            if self._kept_leaf is not None:
                self.tree.settle()
                self.local.settle()
                self._leaf = self._kept_leaf
            else:
                self._leaf = self._ledger.take("gradients", self.padded_numel, self.precision.reduce)
                for start, end in (*self.layout.gaps, (self.layout.numel, self.padded_numel)):
                    self._leaf[start:end].zero_()
        return self._leaf

    def kept_leaf(self, dtype: torch.dtype) -> Tensor | None:
        """The leaf buffer that is kept between steps, if there is one of this dtype."""
        return self._kept_leaf if self._kept_leaf is not None and self._kept_leaf.dtype == dtype else None

    def drop_gradients(self) -> None:
        """Forget every leaf and partial sum."""
        if self._leaf is not None and self._leaf is not self._kept_leaf:
            self._ledger.give("gradients", self._leaf)
        self._leaf = None
        self._written.clear()
        self.touched.clear()
        self.tree.clear()
        self.local.clear()
        for parameter in self.parameters:
            parameter.grad = None

    # - optimizer state

    def make_state(self, states: States) -> None:
        """Allocate and start the states of each parameter over what this rank owns."""
        self.declared = in_all(states)
        for declared in self.declared:
            dtype = dtype_of(declared, self.precision.master)
            self.state[declared.name] = self._ledger.take("state", self.master.numel(), dtype)
            self.start_state(declared)
        owned = [self.owned] * self._group.size
        if self.stage.shard_state:
            owned = [slice(r * self.shard_numel, (r + 1) * self.shard_numel) for r in range(self._group.size)]
        self.by_tensor = TensorStates(self.layout, states, self.master, owned, self._group, self._ledger)

    def start_state(self, declared: State) -> None:
        """Let a state begin anew."""
        if isinstance(declared.start, str):
            self.state[declared.name].copy_(self.master)
        else:
            self.state[declared.name].fill_(declared.start)

    def whole(self, run: Tensor, label: str) -> Tensor:
        """The whole flat space of which ``run`` is what this rank owns (values, master or a state)."""
        if run.numel() == self.padded_numel:
            return run
        flat = torch.empty(self.padded_numel, dtype=run.dtype, device=run.device)
        self._group.all_gather(flat, run, tag=2 * self.tag, label=f"gather of {self.where} for {label}").wait()
        return flat
