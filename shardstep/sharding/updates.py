"""One flat space in one step of the optimizer: its gradient, and its segments.

Plain data for `step`, and how the elements that a rank owns are cut into segments. Nothing here communicates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from shardstep.collectives import Pending
from shardstep.rules.binding import cut_states
from shardstep.sharding.combination import Combination, Key
from shardstep.sharding.space import Space
from shardstep.sharding.tensor_states import part
from shardstep.types import Combine, Segment, Update


@dataclass
class Gradient:
    """The gradient over what this rank owns of a space, possibly still on its way."""

    values: Tensor
    pending: Pending | None
    taken: bool

    def wait(self) -> Tensor:
        if self.pending is not None:
            self.pending.wait()
        return self.values


@dataclass
class SpaceUpdate:
    """A space that is updated. ``rule``: the number of its rule; ``scale``: what its gradient is multiplied by;
    ``made``: whether it was updated in backward.
    """

    space: Space
    rule: int
    keys: list[Key]
    combination: Combination
    made: bool = False
    scale: float = 1.0
    gradient: Gradient | None = None
    segments: list[Segment] = field(default_factory=list)

    @property
    def tensors(self) -> list[Update]:
        """Every parameter of the space that is updated, on this rank or another."""
        slots = zip(self.space.layout.slots, self.keys, strict=True)
        return [Update(*key, slot.shape) for slot, key in slots if key is not None]

    def wait(self) -> Tensor:
        """The gradient over what this rank owns."""
        assert self.gradient is not None
        return self.gradient.wait()


def joined(updates: list[SpaceUpdate]) -> Combine:
    """One combination of those of several spaces."""

    def combine(partials: list[list[Tensor]], reductions: list[tuple[str, ...]]) -> list[list[Tensor]]:
        found, made = iter(partials), iter(reductions)
        whole: list[list[Tensor]] = []
        for update in updates:
            own = list(islice(found, len(update.segments)))
            whole += update.combination(own, list(islice(made, len(update.tensors))))
        return whole

    return combine


@dataclass
class Run:
    """Elements [start, stop) of a flat space, with one step count and the hyper-parameters of one group.

    ``index``: the parameter that they belong to, if it is one.
    """

    group: int
    step: int
    start: int
    stop: int
    index: int | None


def neighbours(space: Space, keys: list[Key]) -> Iterator[Run]:
    """Runs of neighbouring parameters that are updated alike; untouched ones stay out."""
    for key, start, stop in space.layout.runs(keys, space.owned.start, min(space.owned.stop, space.layout.numel)):
        if key is not None:
            yield Run(*key, start, stop, None)


def tensors_of(space: Space, keys: list[Key]) -> Iterator[Run]:
    """What this rank owns of each touched parameter, without the gaps between them."""
    for index, (slot, key) in enumerate(zip(space.layout.slots, keys, strict=True)):
        start, stop = part(slot, space.owned)
        if key is not None and start < stop:
            yield Run(*key, slot.offset + start, slot.offset + stop, index)


def segment_of(space: Space, gradient: Tensor, run: Run, grad_scale: float) -> Segment:
    """What this rank has of a run; ``gradient``: over all that it owns of the space."""
    low = space.values if space.master is not space.values else None
    own = slice(run.start - space.owned.start, run.stop - space.owned.start)
    state = cut_states(space.state, own.start, own.stop)
    tensor_state: dict[str, Tensor] = {}
    if run.index is None:
        shape, start = None, 0
    else:
        slot = space.layout.slots[run.index]
        shape, start = slot.shape, run.start - slot.offset
        state |= space.by_tensor.of(run.index, elements=True)
        tensor_state = space.by_tensor.of(run.index, elements=False)
    return Segment(
        group=run.group,
        step=run.step,
        param=space.master[own],
        grad=gradient[own],
        state=state,
        low=None if low is None else low[own],
        grad_scale=grad_scale,
        offset=run.start,
        shape=shape,
        seed=space.seed,
        start=start,
        tensor_state=tensor_state,
    )
