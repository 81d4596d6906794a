"""Full parameters, gradients and states by name: whoever looks at single tensors, or puts others in their place.

Every rank calls, with the same names, and every rank gets the same whole tensors; what is written are rank 0's values.
Reading gathers a whole flat space for a moment: it is for looking, not for every step. Nothing here decides when.
"""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shardstep.collectives import Group
from shardstep.errors import ConfigError, RankMismatchError, SequenceError
from shardstep.rules.backends.dynamic8 import decode, encode
from shardstep.rules.binding import CODED, scale_name
from shardstep.rules.ir import State
from shardstep.rules.view import state_shape
from shardstep.sharding.agreement import Act, Agreement
from shardstep.sharding.gradients import Gradients
from shardstep.sharding.space import Space
from shardstep.sharding.tensor_states import cut, part
from shardstep.sharding.unit import Unit


class Access:
    """The tensors of one sharded model by name; a tied parameter has every name under which a module knows it."""

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], gradients: Gradients, agreement: Agreement, group: Group
    ) -> None:
        self._gradients, self._agreement, self._group = gradients, agreement, group
        spaces = [space for unit in units for space in unit.spaces]
        held = {id(parameter): (space, i) for space in spaces for i, parameter in enumerate(space.parameters)}
        named = model.named_parameters(remove_duplicate=False)
        self._places = {name: held[id(parameter)] for name, parameter in named if id(parameter) in held}

    # - parameters

    def param(self, name: str) -> Tensor:
        """The whole parameter as the update rule sees it: its master, where it has one."""
        space, index = self._place(name)
        self._begin(Act.READ_NAMED, ["param", name])
        return self._whole(space, index, space.master, f"reading {name!r}")

    def set_param(self, name: str, values: Tensor) -> None:
        """Replace a parameter: the master, the copy that is computed with, and what ranks keep whole of it."""
        space, index = self._place(name)
        self._check_values(name, values, space.layout.slots[index].shape)
        check_writable([space], f"set_full_param({name!r})")
        self._begin(Act.WRITE_NAMED, ["param", name])
        own, given = cut(space.layout.slots[index], space.owned)
        space.arrive()
        space.master[own] = self._from_rank_0(values, space.master, name).view(-1)[given]
        space.values[own] = space.master[own]
        space.free()
        if (pending := space.publish(f"writing {name!r}")) is not None:
            pending.wait()

    # - gradients

    def grad(self, name: str) -> Tensor | None:
        """The whole mean gradient of the step, unscaled and not yet clipped; None if no rank has one."""
        space, index = self._trained(name)
        self._check_has_gradients(f"full_grad({name!r})")
        if not self._begin(Act.READ_NAMED, ["grad", name], [index in space.leaves.touched]):
            return None
        self._gradients.settle()
        total = space.leaves.tree.total().values
        flat = torch.empty(space.padded_numel, dtype=total.dtype, device=total.device)
        label = f"gather of {space.where} for reading the gradient of {name!r}"
        self._group.all_gather(flat, total, tag=2 * space.tag + 1, label=label).wait()
        slot = space.layout.slots[index]
        mean = flat[slot.offset : slot.end].view(slot.shape).to(torch.promote_types(total.dtype, torch.float32))
        return mean * (1.0 / self._gradients.divisor)

    def set_grad(self, name: str, values: Tensor) -> None:
        """Have the step use ``values`` as the mean gradient of a parameter, rounded to what leaves are summed in."""
        space, index = self._trained(name)
        self._check_values(name, values, space.layout.slots[index].shape)
        self._check_has_gradients(f"set_full_grad({name!r})")
        self._begin(Act.WRITE_NAMED, ["grad", name])
        self._gradients.settle()
        total = space.leaves.tree.total().values
        wide = torch.empty(0, dtype=torch.promote_types(total.dtype, torch.float32), device=total.device)
        run = slice(self._group.rank * space.shard_numel, (self._group.rank + 1) * space.shard_numel)
        own, given = cut(space.layout.slots[index], run)
        total[own] = (self._from_rank_0(values, wide, name).view(-1)[given] * self._gradients.divisor).to(total.dtype)
        space.leaves.touched.add(index)

    # - states

    def state(self, name: str, state_name: str) -> Tensor:
        """A whole state of the update rule, as it is read next; one in 8 bits decoded. ``step`` as torch has it."""
        space, index = self._trained(name)
        declared = self._declared(space, index, state_name)
        self._begin(Act.READ_NAMED, ["state", name, state_name])
        if declared is None:
            return torch.tensor(float(space.steps[index]))
        space.follow([index])
        label = f"reading state {state_name!r} of {name!r}"
        if declared not in space.declared:
            return next(values for i, values in space.by_tensor.whole(declared, label) if i == index)
        values = self._whole(space, index, space.state[state_name], label, state_name)
        if values.dtype not in CODED:
            return values
        scales = scale_name(state_name)
        return decode(values, self._whole(space, index, space.state[scales], label, scales))

    def set_state(self, name: str, state_name: str, values: Tensor) -> None:
        """Replace a state; a parameter that was never updated counts no step by it."""
        space, index = self._trained(name)
        declared = self._declared(space, index, state_name)
        shape = space.layout.slots[index].shape
        self._check_values(name, values, () if declared is None else state_shape(declared.shape, shape))
        self._begin(Act.WRITE_NAMED, ["state", name, state_name])
        space.follow([index])
        space.set_states.add((index, state_name))
        if declared is None:
            like = torch.empty(0, dtype=torch.float64, device=space.master.device)
            space.steps[index] = int(self._from_rank_0(values, like, name).item())
        elif declared not in space.declared:
            space.by_tensor.adopt(declared, {index: values}, f"writing state {state_name!r} of {name!r}")
        else:
            self._write_elements(space, index, state_name, values)

    def _write_elements(self, space: Space, index: int, state_name: str, values: Tensor) -> None:
        array, slot = space.state[state_name], space.layout.slots[index]
        like = torch.empty(0, dtype=torch.float32, device=array.device) if array.dtype in CODED else array
        whole = {state_name: self._from_rank_0(values, like, slot.name)}
        if array.dtype in CODED:
            codes, scales = encode(whole[state_name], array.dtype)
            whole = {state_name: codes, scale_name(state_name): scales}
        start, stop = part(slot, space.owned)
        for name, tensor in whole.items() if start < stop else ():
            first = slot.offset + start - space.owned.start
            cut = space.entries(name, first, first + stop - start)
            space.state[name][cut] = tensor.view(-1)[space.entries(name, start, stop)]

    # - what all of them need

    def _place(self, name: str) -> tuple[Space, int]:
        if name not in self._places:
            near = difflib.get_close_matches(str(name), self._places, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f", one of {len(self._places)} such as {self._example!r}"
            raise ConfigError(f"expected the name of a parameter that the model had at shard(), got {name!r}{hint}")
        return self._places[name]

    @property
    def _example(self) -> str:
        return next(iter(self._places))

    def _trained(self, name: str) -> tuple[Space, int]:
        space, index = self._place(name)
        if not space.trained:
            raise ConfigError(
                f"expected a parameter that is trained, got {name!r}, which is frozen and has only values"
            )
        return space, index

    def _declared(self, space: Space, index: int, state_name: str) -> State | None:
        """None for the count of steps."""
        found = {d.name: d for d in (*space.declared, *space.by_tensor.declared_of(index))}
        if state_name not in found and state_name != "step":
            raise ConfigError(
                f"expected a state of {space.layout.slots[index].name!r}, one of {[*found, 'step']}, got {state_name!r}"
            )
        return found.get(state_name)

    def _check_values(self, name: str, values: object, shape: tuple[int, ...]) -> None:
        if not isinstance(values, Tensor) or tuple(values.shape) != tuple(shape):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(f"expected a tensor of shape {tuple(shape)} for {name!r}, got {got}; give it whole")

    def _check_has_gradients(self, what: str) -> None:
        self._gradients.prepare_step(what)
        if not self._gradients.leaves:
            raise SequenceError(
                f"expected {what} between the last backward() and optimizer.step(), got it without a gradient of this "
                f"step; call it after backward()"
            )

    def _begin(self, act: Act, what: list[str], flags: Sequence[bool] = ()) -> bool:
        """Make sure that all ranks do the same; whether any has set the flag."""
        gradients = self._gradients
        gradients.notice_exception()
        if gradients.in_backward:
            raise SequenceError(
                f"expected full tensors to be read and written outside backward(), got {what} inside it"
            )
        gradients.announce(act, flags)
        agreed = self._agreement.confirm()
        for rank, other in enumerate(self._group.exchange_json(what, label="comparison of names")):
            if other != what:
                raise RankMismatchError(
                    f"expected every rank to ask for the same tensor, but rank {rank} asks for {' '.join(other)!r} and "
                    f"rank {self._group.rank} for {' '.join(what)!r}; call it alike everywhere"
                )
        return any(flags) if agreed is None else agreed[0]

    def _whole(self, space: Space, index: int, run: Tensor, label: str, array: str = "") -> Tensor:
        return space.of_slot(space.layout.slots[index], array, space.whole(run, label)).detach().clone()

    def _from_rank_0(self, values: Tensor, like: Tensor, name: str) -> Tensor:
        """A copy in the dtype and on the device of ``like``."""
        copy = values.detach().to(like.device, like.dtype, copy=True).contiguous()
        self._group.broadcast(copy, label=f"broadcast of new values of {name!r}")
        return copy


def check_writable(spaces: Sequence[Space], what: str) -> None:
    """Raise a SequenceError while parameters are held whole for writing, or are averages."""
    if any(space.held for space in spaces):
        raise SequenceError(
            f"expected {what} outside 'with shardstep.gathered(model):', got it inside: what it "
            "writes would be overwritten by the whole values at the end of the block"
        )
    if any(space.exchanged for space in spaces):
        raise SequenceError(
            f"expected {what} outside 'with average.applied():', got it inside, where the parameters are averages; "
            "leave the block first"
        )
