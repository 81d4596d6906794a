"""Whole parameters for reading and writing, whole state dicts, and the digest of both.

Everything here is collective: every rank calls it, and every rank gets the same. Nothing here is on the
path of a training step.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardstep.collectives import Group
from shardstep.errors import ConfigError, RankMismatchError
from shardstep.sharding.agreement import Act, Agreement
from shardstep.sharding.freed import NotCopied
from shardstep.sharding.gradients import Gradients
from shardstep.sharding.modules import weights
from shardstep.sharding.unit import Unit


class Whole(NotCopied):
    """The units of one model, as whoever reads or writes them whole sees them."""

    def __init__(
        self, model: nn.Module, units: list[Unit], gradients: Gradients, agreement: Agreement, group: Group
    ) -> None:
        self.model, self.units, self.group = model, units, group
        self._gradients, self._agreement = gradients, agreement
        hooks: Any = model  # torch leaves these four untyped
        hooks.register_state_dict_pre_hook(lambda *_: self.hold(self.units))
        hooks.register_state_dict_post_hook(lambda _, state, *rest: self._copy_freed(state))
        hooks.register_load_state_dict_pre_hook(lambda *_: self.hold(self.units))
        hooks.register_load_state_dict_post_hook(lambda *_: self.release(self.units))

    def announce(self, act: Act) -> None:
        """Make sure that every rank is about to do the same."""
        self._agreement.announce(act, self._gradients.step, self._gradients.leaves)
        self._agreement.confirm()

    def check_nothing_updated(self, sentence: str) -> None:
        """Raise a SequenceError if some parameters are those before a step and others those after it."""
        self._gradients.check_nothing_updated(sentence)

    def units_of(self, module: nn.Module) -> list[Unit]:
        """The units that own any parameter of ``module``."""
        wanted = {id(parameter) for parameter in module.parameters()}
        return [unit for unit in self.units if any(id(p) in wanted for space in unit.spaces for p in space.parameters)]

    def hold(self, units: list[Unit]) -> None:
        """Gather ``units`` and keep them whole."""
        self.announce(Act.READ_WHOLE)
        for unit in units:
            unit.start_gather("reading whole parameters")
        for unit in units:
            unit.finish_gather()
            unit.hold(1)

    def release(self, units: list[Unit]) -> None:
        """Keep what was written and let ``units`` be freed again; no rank writes before all have read."""
        self.announce(Act.KEEP_WRITES)
        for unit in units:
            unit.hold(-1)
            for space in unit.spaces:
                space.keep_writes()
            unit.free()

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter name, what, values): every parameter, its master if it has one, and each of its states."""
        self.announce(Act.READ_WHOLE)
        for unit in self.units:
            for space in unit.spaces:
                runs = {"param": space.values}
                if space.master is not space.values:
                    runs["master"] = space.master
                for what, run in {**runs, **space.state}.items():
                    flat = space.whole(run, f"reading {what!r}")
                    for index, (slot, steps) in enumerate(zip(space.layout.slots, space.steps, strict=True)):
                        if steps or what == "param" or (what in runs and index not in space.frozen):
                            yield slot.name, what, space.of_slot(slot, what, flat)
                for declared in space.by_tensor.declared:
                    for index, values in space.by_tensor.whole(declared, f"reading {declared.name!r} of {space.where}"):
                        if space.steps[index]:
                            yield space.layout.slots[index].name, declared.name, values
                for slot, steps in zip(space.layout.slots, space.steps, strict=True):
                    yield slot.name, "step", torch.tensor(steps)

    def digest(self) -> str:
        """The digest of ``tensors()``, the same on every rank or an error."""
        own = digest_of(self.tensors())
        everyone = self.group.exchange_json(own, label="comparison of digests")
        if any(other != own for other in everyone):
            raise RankMismatchError(
                f"expected every rank to hold the same whole parameters and states, but the digests differ: {everyone}"
            )
        return own

    def _copy_freed(self, state: dict[str, Any]) -> None:
        """Replace the entries of a state dict that are about to be freed by copies; tied ones stay one tensor."""
        freed_soon = {
            parameter.data_ptr()
            for unit in self.units
            if unit.stage.shard_params
            for space in unit.spaces
            for parameter in space.parameters
        }
        copies: dict[tuple[int, torch.Size], Tensor] = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.data_ptr() in freed_soon:
                place = value.data_ptr(), value.shape
                copies[place] = state[key] = copies[place] if place in copies else value.detach().clone()
        self.release(self.units)


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Whole parameters of a sharded model (or a part of it) inside the ``with`` block.

    Every rank enters and leaves it. Values written inside are kept; make the same writes on every rank. With
    low-precision parameters, a value written replaces its master; one left alone keeps its master's bits.
    """
    whole = whole_of(model)
    units = whole.units_of(model)
    whole.hold(units)
    try:
        yield model
    finally:
        whole.release(units)


def digest_of(tensors: Iterator[tuple[str, str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    records = []
    for name, what, values in tensors:
        raw = values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        records.append([name, what, str(values.dtype), list(values.shape), hashlib.sha256(raw).hexdigest()])
    return hashlib.sha256(json.dumps(sorted(records)).encode()).hexdigest()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """sha256 over all parameters and optimizer state, independent of how they are laid out. Collective.

    A model that was not sharded gives the digest that the same values would have under shard().
    """
    if isinstance(getattr(model, ATTRIBUTE, None), Whole):
        return whole_of(model).digest()
    return digest_of(_unsharded_tensors(model, optimizer))


def _unsharded_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in weights(model):
        state = optimizer.state.get(parameter, {})
        yield name, "param", parameter
        yield name, "step", torch.tensor(int(state.get("step", 0)))
        yield from ((name, what, values) for what, values in state.items() if what != "step")


def whole_of(model: nn.Module) -> Whole:
    """The ``Whole`` of the sharded model that ``model`` is, or is a part of."""
    whole = getattr(model, ATTRIBUTE, None)
    if not isinstance(whole, Whole):
        raise ConfigError(
            f"expected a model that shard() was called on, or a module of one; got {type(model).__name__} without it"
        )
    return whole


ATTRIBUTE = "_shardstep"
"""Where every module of a sharded model keeps a reference to its ``Whole``."""
