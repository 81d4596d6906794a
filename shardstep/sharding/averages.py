"""Where an average of a model's parameters lies: beside what each rank owns of them, or on one device for each tensor.

Gives out flat segments, lets the averages change places with the parameters, makes whole tensors of them and cuts such.
What an average is made by, and when, is `shardstep.averaging`'s business.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shardstep.errors import CollectiveError, ConfigError, RankMismatchError, SequenceError
from shardstep.layout import Slot
from shardstep.rules.binding import compute_dtype
from shardstep.sharding.agreement import Act
from shardstep.sharding.space import Space
from shardstep.sharding.tensor_states import cut
from shardstep.sharding.whole import Whole
from shardstep.types import Segment


class ShardedAverages:
    """One average of every trained parameter. Every rank makes it, with equal ``options``: it compares them."""

    def __init__(self, whole: Whole, options: Mapping[str, float | str]) -> None:
        everyone = whole.group.exchange_json(dict(options), label="comparison of averages")
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise RankMismatchError(
                    f"expected the same average on all ranks, but the options of rank {rank} ({other}) differ from "
                    f"rank 0's ({everyone[0]}); make it alike everywhere"
                )
        self._whole = whole
        self._spaces = [space for unit in whole.units for space in unit.spaces if space.trained]
        if not self._spaces:
            raise ConfigError(
                "expected a model with parameters that its optimizer trains, got one where all were frozen at shard(); "
                "give them to add_param_group() first"
            )
        self._swapped = False
        self._numbers = {space.tag: space.make_average() for space in self._spaces}
        self._frozen = {space.tag: frozenset(space.frozen) for space in self._spaces}
        """Which parameters of each space are not averaged, since they were not trained when the average was made."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole tensors' shapes, by parameter name."""
        return {slot.name: slot.shape for space in self._spaces for slot in self._slots(space)}

    def _slots(self, space: Space, *, frozen: bool = False) -> list[Slot]:
        """The places of those that are averaged, or of those that are not."""
        without = self._frozen[space.tag]
        return [slot for index, slot in enumerate(space.layout.slots) if (index in without) == frozen]

    def segments(self, step: int) -> list[Segment]:
        """What this rank owns: the average as ``param``, the parameters' master as ``grad``; gaps included."""
        self._whole.check_nothing_updated("updates an average")
        return [
            Segment(
                group=0,
                step=step,
                param=space.averages[self._numbers[space.tag]],
                grad=space.master,
                state={},
                low=None,
                grad_scale=1.0,
                offset=space.owned.start,
            )
            for space in self._spaces
        ]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters are the averages inside, on every rank, and have their own bits again after. Collective."""
        if any(space.held for space in self._spaces):
            raise SequenceError(
                "expected average.applied() outside 'with shardstep.gathered(model):', got it inside, where the "
                "parameters are kept whole for writing; leave that block first, or gather inside applied()"
            )
        self._whole.announce(Act.SWAP)
        in_step = True
        try:
            self._swap()
            self._publish("entering average.applied()")
            yield
        except CollectiveError:  # the ranks are out of step already: another wait for them would be in vain
            in_step = False
            raise
        finally:
            try:
                if in_step:
                    self._whole.announce(Act.SWAP)  # first: peers may still be reading the averages
            finally:
                self._swap()
            if in_step:
                self._publish("leaving average.applied()")

    def announce_micro_batch(self) -> None:
        """Make sure that every rank runs another micro-batch of `update_bn`."""
        self._whole.announce(Act.STATISTICS)

    def from_every_rank(self, values: Tensor) -> Tensor:
        """Every rank's ``values``, stacked in rank order."""
        return self._whole.group.all_gather_small(values, label="gather of batch statistics")

    def whole(self) -> dict[str, Tensor]:
        """Copies of the whole averages, by parameter name, the same on every rank. Collective."""
        self._whole.announce(Act.READ_WHOLE)
        tensors = {}
        for space in self._spaces:
            flat = space.whole(self._average(space), "reading averages")
            for slot in self._slots(space):
                tensors[slot.name] = flat[slot.offset : slot.end].view(slot.shape).clone()
        return tensors

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Cut what this rank owns out of whole averages."""
        for space in self._spaces:
            average = space.averages[self._numbers[space.tag]].zero_()
            for slot in self._slots(space):
                own, given = cut(slot, space.owned)
                average[own].copy_(tensors[slot.name].reshape(-1)[given])

    def _average(self, space: Space) -> Tensor:
        average = space.averages[self._numbers[space.tag]]
        return space.master if self._swapped and space.master.dtype == average.dtype else average

    def _swap(self) -> None:
        """Only on this rank. Parameters that are whole, or on their way, are freed: they are about to be others."""
        self._swapped = not self._swapped
        try:
            for space in self._spaces:
                space.arrive()
                space.free()
        finally:
            with torch.no_grad():
                for space in self._spaces:
                    if self._swapped:
                        self._take_frozen(space)
                    space.exchange(self._numbers[space.tag])

    def _take_frozen(self, space: Space) -> None:
        """Let parameters that are not averaged, beside others that are, stay what they are."""
        for slot in self._slots(space, frozen=True):
            own, _ = cut(slot, space.owned)
            space.averages[self._numbers[space.tag]][own] = space.master[own]

    def _publish(self, phase: str) -> None:
        """Let the ranks that keep whole parameters (stages 1 and 2) have the others' shards."""
        for pending in [space.publish(phase) for space in self._spaces]:
            if pending is not None:
                pending.wait()


class UnshardedAverages:
    """The same of a model that is not sharded; other processes have no part in it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = {
            name: torch.empty(parameter.shape, dtype=_checked_dtype(name, parameter), device=parameter.device)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By parameter name."""
        return {name: tuple(average.shape) for name, average in self._tensors.items()}

    def segments(self, step: int) -> list[Segment]:
        """The average as ``param`` and the parameter as ``grad``, for each of them."""
        return [
            Segment(
                group=0,
                step=step,
                param=average.view(-1),
                grad=self._model.get_parameter(name).detach().reshape(-1),
                state={},
                low=None,
                grad_scale=1.0,
            )
            for name, average in self._tensors.items()
        ]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters' data are the averages inside."""
        parameters = [(self._model.get_parameter(name), average) for name, average in self._tensors.items()]
        own = [parameter.data for parameter, _ in parameters]
        try:
            for parameter, average in parameters:
                parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for (parameter, _), data in zip(parameters, own, strict=True):
                parameter.data = data

    def announce_micro_batch(self) -> None:
        """Nobody listens."""

    def from_every_rank(self, values: Tensor) -> list[Tensor]:
        return [values]

    def whole(self) -> dict[str, Tensor]:
        """Copies of the averages, by parameter name."""
        return {name: average.clone() for name, average in self._tensors.items()}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy averages in."""
        for name, average in self._tensors.items():
            average.copy_(tensors[name])


def _checked_dtype(name: str, parameter: nn.Parameter) -> torch.dtype:
    if type(parameter.detach()) is not Tensor or not parameter.is_floating_point():
        raise ConfigError(
            f"expected ordinary floating-point parameters to average, got {name!r} of {parameter.dtype} in a "
            f"{type(parameter.detach()).__name__}; only shardstep's own sharding can be averaged"
        )
    return compute_dtype(parameter)
