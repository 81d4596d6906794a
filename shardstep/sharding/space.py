"""One flat space of a unit on this rank: parameters of one dtype and rule, all trained or all frozen.

[Note: the tensors of a space]
    flat     padded numel   the parameters, whole; their ``.data`` are views of it. Freed at stage 3.
    shard    shard numel    this rank's run of the parameters; a view of ``flat`` below stage 3.
    values   owned numel    what the rule's result is written to: ``flat`` at stage 0, else ``shard``.
    master   owned numel    what the rule updates: ``values`` itself, or a wider copy of it.
    state    owned numel    one buffer per named state of the rule, in its declared dtype or what the rule computes
                            in; scales of 8-bit states have one entry for each 256 elements;
                            what is kept tensor by tensor is in `tensor_states`.
    averages owned numel    one buffer per `shardstep.Average` of the model, in what the rule computes in.

Its gradients are `leaves`. A space gathers, frees and holds; when to do so is decided in `hooks` and `step`.
"""

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import accumulate

import torch
from torch import Tensor, nn

from shardstep.collectives import Group, Pending
from shardstep.config import Precision, Stage
from shardstep.layout import Layout, Slot
from shardstep.optim.states import begin
from shardstep.rules.binding import scales_among, stored_arrays
from shardstep.rules.ir import State
from shardstep.sharding.arriving import ArrivingParameter
from shardstep.sharding.first_values import Source, put
from shardstep.sharding.freed import FreedParameter
from shardstep.sharding.leaves import Leaves
from shardstep.sharding.loans import Loan
from shardstep.sharding.memory import Ledger
from shardstep.sharding.ownership import Place
from shardstep.sharding.tensor_states import States, TensorStates, cut, in_all, in_some
from shardstep.sharding.units import Part
from shardstep.types import SCALED_NUMEL


class Space:
    """See the note above. ``tag`` numbers the space among all of a model's; ``parts`` are those of its `SpacePlan`;
    ``source`` has its first values.
    """

    def __init__(
        self,
        unit_name: str,
        tag: int,
        layout: Layout,
        parts: tuple[Part, ...],
        parameters: list[nn.Parameter],
        stage: Stage,
        precision: Precision,
        group: Group,
        ledger: Ledger,
        source: Source,
    ) -> None:
        self.unit_name, self.tag, self.layout, self.parts, self.parameters = unit_name, tag, layout, parts, parameters
        self.stage, self.precision = stage, precision
        self.trained = parameters[0].requires_grad
        self.frozen = set[int]() if self.trained else set(range(len(parameters)))
        """Those of the parameters that are not trained: all or none, until some of them join the optimizer."""
        self.shard_numel = layout.shard_numel(group.size)
        self.padded_numel = layout.padded_numel(group.size)
        self.steps = [0] * len(parameters)
        self.leaves = Leaves(layout, parameters, self.padded_numel, precision, ledger)
        self.state: dict[str, Tensor] = {}
        self.averages: list[Tensor] = []
        self.declared: tuple[State, ...] = ()
        """The states in ``state``."""
        self.set_states = set[tuple[int, str]]()
        """States of parameters that were set by name, and so do not begin as the parameter."""
        self.is_whole = True
        self.is_arriving = False
        """Whether a step has left new parameters on their way."""
        self.held = 0
        """How many ``gathered`` blocks keep the parameters whole."""
        self.exchanged = False
        """Whether the parameters have changed places with an average."""
        self._group, self._ledger = group, ledger
        self._freed_class, self._arriving_class = FreedParameter.of(self), ArrivingParameter.of(self)
        self.late: Callable[[], bool] = _never
        """What gathers the parameters when a forward uses them while they are freed."""
        self.loan: Loan | None = None
        """Where a shard of the parameters is lent to the peers."""
        self._gathering: Pending | None = None
        self._kept_values: Tensor | None = None
        self.seed = _seed_of(precision, layout)
        """Of the noise that new parameters are rounded with."""
        self._place(source)
        self.places: list[Place] = []
        """Where each parameter is put together, if its rule has matrix products."""
        self.by_tensor = self._tensor_states([()] * len(parameters))

    def _place(self, source: Source) -> None:
        """Keep what this rank owns of the first values, and let the parameters be views of the flat space."""
        rank, take, precision = self._group.rank, self._ledger.take, self.precision
        own = slice(rank * self.shard_numel, (rank + 1) * self.shard_numel)
        whole = slice(0, self.padded_numel)
        self.owned = own if self.stage.shard_state else whole
        kept = own if self.stage.shard_params else whole
        stored = take("parameters", kept.stop - kept.start, precision.params)
        first = stored if precision.master == precision.params else torch.empty_like(stored, dtype=precision.master)
        source.fill(first.zero_(), kept.start, self.layout, self.parameters, self.where)
        if first is not stored:
            stored.copy_(first)
        self.flat = take("parameters", self.padded_numel, precision.params) if self.stage.shard_params else stored
        self.shard = stored if self.stage.shard_params else self.flat[own]
        self.values = self.shard if self.stage.shard_state else self.flat
        self.master = self.values
        if self.trained:
            self._begin_training(first[self.owned.start - kept.start :][: self.values.numel()])
        for slot, parameter in zip(self.layout.slots, self.parameters, strict=True):
            put(parameter, self.flat[slot.offset : slot.end].view(slot.shape))
            parameter.grad = None
        self._classes = [type(parameter) for parameter in self.parameters]
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
            self.leaves.keep_buffer()

    def lend(self, addresses: Sequence[int], tag: int) -> Loan:
        """Let the peers take this rank's shard from now on; ``addresses``: where each rank has its own."""
        self.loan = Loan(self.shard, addresses, self.where, tag, self._group)
        return self.loan

    @property
    def where(self) -> str:
        """How messages name this space."""
        return f"unit {self.unit_name!r}" if self.unit_name else "the root unit"

    @property
    def trained_parts(self) -> list[bool]:
        """For each part whether any parameter in it is trained; there is more of the space where others are."""
        ends = accumulate(part.tensors for part in self.parts)
        pairs = zip(self.parts, ends, strict=True)
        return [not self.frozen.issuperset(range(end - part.tensors, end)) for part, end in pairs]

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
            tag, ordered = 2 * self.tag, not self._group.lends  # where shards are lent, ranks may gather differently
            self._gathering = self._group.all_gather(self.flat, self.shard, tag=tag, label=label, ordered=ordered)

    def finish_gather(self) -> None:
        """Wait until the parameters are whole."""
        if self._gathering is None:
            return
        self._gathering.wait()
        self._gathering = None
        if self.loan is not None:
            self.loan.arrived()
        self.is_whole, self.is_arriving = True, False
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
        for parameter in self.parameters:
            parameter.__class__ = self._freed_class

    def gather_late(self) -> bool:
        """Make the parameters whole for a forward that uses them outside their unit; False when none is running."""
        return self.late()

    def name_of(self, parameter: nn.Parameter) -> str:
        return next(s.name for s, own in zip(self.layout.slots, self.parameters, strict=True) if own is parameter)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of the whole parameters."""
        begin = self.flat.data_ptr() if self.is_whole else 0
        return begin <= tensor.data_ptr() < begin + self._flat_bytes if begin else False

    def publish(self, phase: str, *, together: bool = True) -> Pending | None:
        """Begin to send the updated shard to every rank that keeps the parameters whole (stages 1 and 2).

        ``together``: all ranks are going to wait for it in the same order.
        """
        torch.clear_autocast_cache()  # or a region around several steps would compute with casts of old values
        if self.stage.shard_params or not self.stage.shard_state:
            return None
        label = f"gather of {self.where} for {phase}"
        return self._group.all_gather(self.flat, self.shard, tag=2 * self.tag, label=label, together=together)

    def arrive_later(self, published: Pending) -> None:
        """Let whoever needs the parameters wait for what is published, instead of the caller."""
        self._gathering, self.is_whole, self.is_arriving = published, False, True
        self._group.leave(published)
        for parameter in self.parameters:
            parameter.__class__ = self._arriving_class

    def arrive(self) -> None:
        """Wait for what a step has left on its way, and until every peer has this rank's shard."""
        if self.is_arriving:
            self.finish_gather()

    def keep_writes(self) -> None:
        """Take over values that the user wrote into the whole parameters, where they differ."""
        torch.clear_autocast_cache()
        own = self.flat[self.owned]
        if self.values.data_ptr() != own.data_ptr():
            self.values.copy_(own)
        if self.master is not self.values:
            unchanged = self.master.to(own.dtype) == own
            torch.where(unchanged, self.master, own.to(self.master.dtype), out=self.master)

    # - optimizer state

    def make_state(self, states: States, places: list[Place]) -> None:
        """Allocate and start those states of each parameter that are not there yet, over what this rank owns.

        Collective where there are some already, and ``places`` are new.
        """
        self.declared, self.places = in_all(states), places
        for declared in self.declared:
            if declared.name not in self.state:
                for array in stored_arrays(declared):
                    numel, dtype = self.master.numel() // array.per, array.dtype or self.precision.compute
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

    def follow(self, indices: Iterable[int]) -> None:
        """Let states that begin as their parameter be what it is now, of those never updated; but not what was set."""
        for index in (index for index in indices if not self.steps[index]):
            own, _ = cut(self.layout.slots[index], self.owned)
            for declared in (*self.declared, *self.by_tensor.declared_of(index)):
                if not isinstance(declared.start, str) or (index, declared.name) in self.set_states:
                    continue
                if declared in self.declared:
                    names = [array.name for array in stored_arrays(declared)]
                    arrays = {name: self.state[name][self.entries(name, own.start, own.stop)] for name in names}
                else:
                    arrays = self.by_tensor.of(index, elements=True)
                begin(declared, arrays, self.master[own])

    # - averages

    def make_average(self) -> int:
        """Allocate one more average over what this rank owns; its number."""
        self.averages.append(self._ledger.take("state", self.master.numel(), self.precision.compute))
        return len(self.averages) - 1

    def exchange(self, number: int) -> None:
        """Let the parameters and average ``number`` change places on this rank; the same again undoes it, to the bit.

        (But a NaN in parameters that have a wider master may come back as another NaN.) Parameters in 16 bits without
        a master are copied meanwhile; the average stays where it is.
        """
        self.exchanged = not self.exchanged
        if self.values.dtype != self.averages[number].dtype and self.master is self.values:
            kept, self._kept_values = self._kept_values, self.values.clone() if self.exchanged else None
            self.values.copy_(self.averages[number] if kept is None else kept)
            return
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
        self.arrive()  # one message with this tag at a time
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


def _never() -> bool:
    return False


def _seed_of(precision: Precision, layout: Layout) -> int | None:
    """Another one for every space, since noise is a function of the place in one."""
    if precision.rounding != "stochastic":
        return None
    named = blake2b(f"{precision.seed} {layout.slots[0].name}".encode(), digest_size=8)
    return int.from_bytes(named.digest(), "little")
