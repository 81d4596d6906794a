"""One flat space of a unit on this rank: parameters of one dtype and rule, all trained or all frozen.

[Note: the tensors of a space]
    flat     padded numel   the parameters, whole; their ``.data`` are views of it. Freed at stage 3.
    shard    shard numel    this rank's run of the parameters; a view of ``flat`` below stage 3.
    values   owned numel    what the rule's result is written to: ``flat`` at stage 0, else ``shard``.
    master   owned numel    what the rule updates: ``values`` itself, or a wider copy of it.
    state    owned numel    one buffer per named state of the rule, in its declared dtype or the master's; scales of
                            8-bit states have one entry for each 256 elements;
                            what is kept tensor by tensor is in `tensor_states`.
    averages owned numel    one buffer per `shardstep.Average` of the model, in the master's dtype.
    leaf     padded numel   the gradient of the current micro-batch; kept between steps below stage 2.
    tree     shard numel    partial sums of all ranks' leaves over this rank's run.
    local    padded numel   partial sums of this rank's own leaves (schedule per step).

A space gathers, frees and holds; when to do so is decided in `hooks` and `step`.
"""

import torch
from torch import Tensor, nn

from shardstep.collectives import Group, Pending
from shardstep.config import Precision, Stage
from shardstep.layout import Layout, Slot
from shardstep.optim.states import begin
from shardstep.rules.binding import scales_among, stored_arrays
from shardstep.rules.ir import State
from shardstep.sharding.freed import FreedParameter
from shardstep.sharding.loans import Loan
from shardstep.sharding.memory import Ledger
from shardstep.sharding.ownership import Place
from shardstep.sharding.reduce import Tree
from shardstep.sharding.stand_in import StandIn
from shardstep.sharding.tensor_states import States, TensorStates, in_all, in_some
from shardstep.types import SCALED_NUMEL


class Space:
    """See the note above. ``tag`` numbers the space among all of a model's; ``parts`` are those of its `SpacePlan`."""

    def __init__(
        self,
        unit_name: str,
        tag: int,
        layout: Layout,
        parts: tuple[tuple[int, int], ...],
        parameters: list[nn.Parameter],
        stage: Stage,
        precision: Precision,
        group: Group,
        ledger: Ledger,
    ) -> None:
        self.unit_name, self.tag, self.layout, self.parts, self.parameters = unit_name, tag, layout, parts, parameters
        self.stage, self.precision = stage, precision
        self.trained = parameters[0].requires_grad
        self.shard_numel = layout.shard_numel(group.size)
        self.padded_numel = layout.padded_numel(group.size)
        self.steps = [0] * len(parameters)
        self.touched: set[int] = set()
        self.tree = Tree(ledger, precision.master)
        self.local = Tree(ledger, precision.master)
        self.state: dict[str, Tensor] = {}
        self.averages: list[Tensor] = []
        self.declared: tuple[State, ...] = ()
        """The states in ``state``."""
        self.is_whole = True
        self.held = 0
        """How many ``gathered`` blocks keep the parameters whole."""
        self.exchanged = False
        """Whether the parameters have changed places with an average."""
        self._group, self._ledger = group, ledger
        self._classes = [type(parameter) for parameter in parameters]
        self.loan: Loan | None = None
        """Where a shard of the parameters is lent to the peers."""
        self._gathering: Pending | None = None
        self._leaf: Tensor | None = None
        self._kept_leaf: Tensor | None = None
        self._written: set[int] = set()
        self.stand_ins: list[StandIn] = []
        """For each parameter, its ``.grad`` from backward to step; empty while nothing is trained."""
        self._place(stage, precision)
        self.places: list[Place] = []
        """Where each parameter is put together, if its rule has matrix products."""
        self.by_tensor = self._tensor_states([()] * len(parameters))

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
        if self.trained:
            self._begin_training(whole[self.owned])
        for slot, parameter in zip(self.layout.slots, self.parameters, strict=True):
            parameter.data = self.flat[slot.offset : slot.end].view(slot.shape)
            parameter.grad = None
        self.free()

    def train(self) -> None:
        """Train parameters that were frozen so far; the master starts from what is stored."""
        self.trained = True
        self._begin_training(self.values)

    def _begin_training(self, first: Tensor) -> None:
        """Make what an update needs; ``first`` are the master's first values."""
        precision, take = self.precision, self._ledger.take
        if precision.master != precision.params:
            self.master = take("state", self.values.numel(), precision.master).copy_(first)
        if not self.stage.shard_grads:
            self._kept_leaf = take("gradients", self.padded_numel, precision.reduce).zero_()

    def lend(self, tag: int) -> Loan:
        """Let the peers take this rank's shard from now on."""
        self.loan = Loan(self.shard, self.where, tag, self._group)
        self.loan.lend()
        return self.loan

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

    def start_gather(self, phase: str, *, ahead: bool = False) -> None:
        """Begin to make the parameters whole; no-op when they are, or are already on their way.

        ``ahead``: they may not be needed; then nothing begins that peers would have to join.
        """
        if self.is_whole or self._gathering is not None or (ahead and self.loan is not None and self.loan.used):
            return
        self.flat.untyped_storage().resize_(self._flat_bytes)
        self._ledger.count("parameters", self._flat_bytes)
        label = f"gather of {self.where} for {phase}"
        self._gathering = None if self.loan is None else self.loan.take(self.flat, label)
        if self._gathering is None:
            self._gathering = self._group.all_gather(self.flat, self.shard, tag=2 * self.tag, label=label)

    def finish_gather(self) -> None:
        """Wait until the parameters are whole."""
        if self._gathering is None:
            return
        self._gathering.wait()
        self._gathering = None
        if self.loan is not None:
            self.loan.arrived()
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
        grad = parameter.grad
        assert grad is not None
        leaf[slot.offset : slot.end].view(slot.shape).copy_(grad.hand_over() if isinstance(grad, StandIn) else grad)
        parameter.grad = self.stand_ins[index]
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
        with torch._C.DisableTorchFunctionSubclass():  # or freed parameters would look at each access
            for parameter, stand_in in zip(self.parameters, self.stand_ins, strict=True):
                parameter.grad = stand_in.arrived = None

    def withdraw_stand_ins(self) -> None:
        """Let autograd begin new gradients, but for what has arrived already."""
        with torch._C.DisableTorchFunctionSubclass():
            for parameter, stand_in in zip(self.parameters, self.stand_ins, strict=True):
                if parameter.grad is stand_in and stand_in.arrived is None:
                    parameter.grad = None

    # - optimizer state

    def make_state(self, states: States, places: list[Place]) -> None:
        """Allocate and start those states of each parameter that are not there yet, over what this rank owns.

        Collective where there are some already, and ``places`` are new.
        """
        self.declared, self.places = in_all(states), places
        for declared in self.declared:
            if declared.name not in self.state:
                for array in stored_arrays(declared):
                    numel, dtype = self.master.numel() // array.per, array.dtype or self.precision.master
                    self.state[array.name] = self._ledger.take("state", numel, dtype)
                self.start_state(declared)
        if self.by_tensor.declared != in_some(states) or self.by_tensor.owners != self._owners:
            before, self.by_tensor = self.by_tensor, self._tensor_states(states)
            self.by_tensor.take_over(before)

    def _tensor_states(self, states: States) -> TensorStates:
        owned = [self.owned] * self._group.size
        if self.stage.shard_state:
            owned = [slice(r * self.shard_numel, (r + 1) * self.shard_numel) for r in range(self._group.size)]
        return TensorStates(self.layout, states, self.master, owned, self._owners, self._group, self._ledger)

    @property
    def _owners(self) -> list[int]:
        return [place.owner for place in self.places] or [0] * len(self.parameters)

    def start_state(self, declared: State) -> None:
        """Let a state begin anew."""
        begin(declared, self.state, self.master)

    # - averages

    def make_average(self) -> None:
        """Allocate one more average over what this rank owns."""
        self.averages.append(self._ledger.take("state", self.master.numel(), self.precision.master))

    def exchange(self, number: int) -> None:
        """Let the parameters and average ``number`` change places on this rank; the same again undoes it, to the bit.

        (But a NaN in parameters that have a wider master may come back as another NaN.)
        """
        self.exchanged = not self.exchanged
        if self.master is not self.values:
            self.master, self.averages[number] = self.averages[number], self.master
            self.values.copy_(self.master)
            return
        one, other = (run.view(torch.int64) for run in (self.values, self.averages[number]))
        one ^= other  # three exclusive ors swap two buffers without a third one
        other ^= one
        one ^= other

    def whole(self, run: Tensor, label: str) -> Tensor:
        """The whole flat space of which ``run`` is what this rank owns (values, master or an array of a state)."""
        if self.values.numel() == self.padded_numel:
            return run
        flat = torch.empty(run.numel() * self._group.size, dtype=run.dtype, device=run.device)
        self._group.all_gather(flat, run, tag=2 * self.tag, label=f"gather of {self.where} for {label}").wait()
        return flat

    def entries(self, name: str, start: int, stop: int) -> slice:
        """Those of the array ``name`` that hold elements [start, stop)."""
        per = SCALED_NUMEL if name in scales_among(self.state) else 1
        return slice(start // per, -(-stop // per))

    def of_slot(self, slot: Slot, name: str, flat: Tensor) -> Tensor:
        """What the whole array ``name`` holds of a parameter: in its shape, but for scales."""
        part = flat[self.entries(name, slot.offset, slot.end)]
        return part if name in scales_among(self.state) else part.view(slot.shape)
