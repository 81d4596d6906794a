"""States of a space that are kept tensor by tensor, beside those that run through the whole flat space.

They are those with one value for each row, each column or the tensor, which every rank keeps whole (a rank updates
those of the tensors that it owns a part of, and for a reader, whoever owns the first element has the right ones); those
of pairs of rows or of columns, which the owner of the whole tensor alone keeps (see `ownership`); and those of elements
that only some of the parameters have, of which a rank keeps what it owns.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from shardstep.collectives import Group
from shardstep.errors import ConfigError
from shardstep.layout import Layout, Slot
from shardstep.rules.binding import CODED, compute_dtype, stored_arrays
from shardstep.rules.ir import SQUARE, State
from shardstep.rules.view import state_shape
from shardstep.sharding.memory import Ledger

States = Sequence[tuple[State, ...]]
"""Those of each parameter of a space."""


def in_all(states: States) -> tuple[State, ...]:
    """The states of elements that every parameter has: they run through the flat space."""
    return tuple(d for d in states[0] if d.shape == "element" and all(d in of_one for of_one in states))


def in_some(states: States) -> tuple[State, ...]:
    """The others, each once."""
    found = dict.fromkeys(declared for of_one in states for declared in of_one)
    return tuple(declared for declared in found if declared not in in_all(states))


def dtype_of(declared: State, compute: torch.dtype) -> torch.dtype:
    """What it is stored in: one number for a tensor, in float32 as torch keeps ``step``."""
    return stored_arrays(declared)[0].dtype or (torch.float32 if declared.shape == "tensor" else compute)


def part(slot: Slot, owned: slice) -> tuple[int, int]:
    """The elements of a parameter, from its first, that lie in a run of the flat space."""
    start, stop = max(slot.offset, owned.start), min(slot.end, owned.stop)
    return (start - slot.offset, stop - slot.offset) if start < stop else (0, 0)


def cut(slot: Slot, run: slice) -> tuple[slice, slice]:
    """Where a run of the flat space has elements of a parameter: in the run, and in the parameter."""
    start, stop = part(slot, run)
    first = max(slot.offset + start - run.start, 0)
    return slice(first, first + stop - start), slice(start, stop)


def kept_numel(declared: State, slot: Slot, owned: slice, is_owner: bool) -> int:
    """How many values of a parameter's state a rank keeps. ``is_owner``: of the whole tensor."""
    if declared.shape in SQUARE and not is_owner:
        return 0
    if declared.shape != "element":
        return prod(state_shape(declared.shape, slot.shape))
    start, stop = part(slot, owned)
    return stop - start


class TensorStates:
    """Those of one space. ``owned``: the run of the flat space that each rank owns; ``owners``: the rank that owns each
    whole tensor.
    """

    def __init__(
        self,
        layout: Layout,
        states: States,
        master: Tensor,
        owned: list[slice],
        owners: list[int],
        group: Group,
        ledger: Ledger,
    ) -> None:
        self.declared, self.owners = in_some(states), owners
        self._slots, self._states, self._master = layout.slots, states, master
        self._owned, self._group, self._ledger = owned, group, ledger
        for declared in self.declared:
            if dtype_of(declared, compute_dtype(master)) in CODED:
                raise ConfigError(
                    f"expected the state {declared.name!r}, which is stored in 8 bits, for every parameter of a unit, "
                    f"but {layout.slots[0].name!r} and others beside it differ in having it; store it in another dtype"
                )
        self._buffers = {declared.name: self._take(declared) for declared in self.declared}
        for declared in self.declared:
            self.start(declared)

    def declared_of(self, index: int) -> tuple[State, ...]:
        """The states of a parameter that are kept here."""
        return tuple(declared for declared in self.declared if declared in self._states[index])

    def of(self, index: int, *, elements: bool) -> dict[str, Tensor]:
        """What this rank keeps of a parameter's states: those of elements, or the others; flat, or one number."""
        wanted = [d for d in self.declared_of(index) if (d.shape == "element") == elements]
        cuts = {declared.name: self._cut(declared, self._group.rank)[index] for declared in wanted}
        return {name: self._buffers[name][cut] for name, cut in cuts.items()}

    def take_over(self, before: "TensorStates") -> None:
        """Go on with the values of what there was already, which gives back its memory. Collective, since tensors may
        have got other owners.
        """
        for declared in before.declared:
            buffer, old = self._buffers.get(declared.name), before._buffers[declared.name]
            if buffer is not None and declared.shape in SQUARE:
                cuts = self._cut(declared, self._group.rank)
                for index, values in before.whole(declared, f"move of state {declared.name!r} to other owners"):
                    buffer[cuts[index]] = values.view(-1)[: cuts[index].stop - cuts[index].start]
            elif buffer is not None:
                buffer.copy_(old)
            self._ledger.give("state", old)

    def start(self, declared: State) -> None:
        """Let a state begin anew."""
        if isinstance(declared.start, str):
            owned = self._owned[self._group.rank]
            for slot, cut in zip(self._slots, self._cut(declared, self._group.rank), strict=True):
                first = slot.offset - owned.start + part(slot, owned)[0]
                self._buffers[declared.name][cut] = self._master[first : first + cut.stop - cut.start]
        else:
            self._buffers[declared.name].fill_(declared.start)

    def whole(self, declared: State, label: str) -> Iterator[tuple[int, Tensor]]:
        """(index, state in its own shape) for each parameter that has it: on every rank, from its owner. Collective."""
        rows = self._gathered(self._buffers[declared.name], declared, label)
        cuts = [self._cut(declared, rank) for rank in range(len(rows))]
        for index, slot in enumerate(self._slots):
            if declared in self._states[index]:
                parts = [row[cut[index]] for row, cut in zip(rows, cuts, strict=True)]
                flat = torch.cat(parts) if declared.shape == "element" else parts[self._reader(declared, index)]
                yield index, flat.reshape(state_shape(declared.shape, slot.shape)).clone()

    def adopt(self, declared: State, given: Mapping[int, Tensor], label: str) -> None:
        """Take rank 0's states by parameter; those that are not ``given`` stay. Collective."""
        whole = dict(self.whole(declared, label)) | dict(given)
        buffer = self._buffers[declared.name]
        device, ordered = self._master.device, sorted(whole.items())
        flat = torch.cat([values.reshape(-1).to(device, buffer.dtype) for _, values in ordered])
        self._group.broadcast(flat, label=label)
        at = 0
        for index, values in ordered:
            cut, start = self._cut(declared, self._group.rank)[index], 0
            if declared.shape == "element":
                start, _ = part(self._slots[index], self._owned[self._group.rank])
            buffer[cut] = flat[at + start : at + start + cut.stop - cut.start]
            at += values.numel()

    def _take(self, declared: State) -> Tensor:
        numel = self._cut(declared, self._group.rank)[-1].stop
        dtype = dtype_of(declared, compute_dtype(self._master))
        if declared.shape != "tensor":
            return self._ledger.take("state", numel, dtype)
        self._ledger.count("state", numel * dtype.itemsize)
        return torch.empty(numel, dtype=dtype)  # on the CPU

    def _cut(self, declared: State, rank: int) -> list[slice]:
        """Where the state of each parameter is in a rank's buffer; nowhere for one without."""
        cuts, at = list[slice](), 0
        for slot, states, owner in zip(self._slots, self._states, self.owners, strict=True):
            length = kept_numel(declared, slot, self._owned[rank], owner == rank) if declared in states else 0
            cuts.append(slice(at, at + length))
            at += length
        return cuts

    def _gathered(self, own: Tensor, declared: State, label: str) -> list[Tensor]:
        """Every rank's buffer; only this one's where all ranks have everything."""
        if declared.shape not in SQUARE and all(owned == self._owned[0] for owned in self._owned):
            return [own]
        longest = max(self._cut(declared, rank)[-1].stop for rank in range(self._group.size))
        padded = torch.zeros(longest, dtype=own.dtype, device=self._master.device)
        padded[: own.numel()] = own
        return list(self._group.all_gather_small(padded, label=label).to(own.device))

    def _reader(self, declared: State, index: int) -> int:
        """Whose state of a tensor is right: its owner's, or that of whoever owns the first element, if it has any."""
        if declared.shape in SQUARE:
            return self.owners[index]
        offset = self._slots[index].offset
        return next((rank for rank, owned in enumerate(self._owned) if offset < owned.stop), 0)
