"""Which parameter, which element, which rank and which line of the rule made the first infinity or NaN of a step.

A debugging aid: it keeps a copy of what is about to be updated, so it costs memory and time.
"""

from dataclasses import replace

import torch

from shardstep.collectives import Group
from shardstep.errors import NonFiniteUpdateError
from shardstep.optim import Combined, Optimizer
from shardstep.rules.backends.dynamic8 import decoded_states
from shardstep.sharding.space import Space
from shardstep.types import SCALED_NUMEL, Segment


class NonFiniteTrace:
    """Watches the updates of one step after another."""

    def __init__(self, optimizer: Optimizer | Combined, group: Group) -> None:
        self._optimizer, self._group = optimizer, group
        self._before: dict[int, list[Segment]] = {}
        self._found: str | None = None

    def remember(self, space: Space, segments: list[Segment]) -> None:
        """Keep what ``segments`` of a space hold before they are updated."""
        self._before[space.tag] = [
            replace(
                segment,
                param=segment.param.clone(),
                grad=segment.grad.clone(),
                state={name: values.clone() for name, values in segment.state.items()},
            )
            for segment in segments
        ]

    def look(self, space: Space, segments: list[Segment]) -> None:
        """Search the updated ``segments``, unless something was found before in this step."""
        for before, after in zip(self._before.pop(space.tag), segments, strict=True):
            if self._found is None:
                self._found = self._search(space, before, after)

    def raise_if_found(self, step: int) -> None:
        """Raise NonFiniteUpdateError on every rank if any has found something. Collective."""
        everyone = self._group.exchange_json(self._found, label=f"search for non-finite updates in step {step}")
        self._found = None
        for rank, found in enumerate(everyone):
            if found is not None:
                raise NonFiniteUpdateError(
                    f"the update of step {step} made a value that is not finite: rank {rank}, {found}"
                )

    def _search(self, space: Space, before: Segment, after: Segment) -> str | None:
        bad = ~torch.isfinite(after.param)
        for values in decoded_states(after.state).values():
            bad |= ~torch.isfinite(values)
        places = torch.nonzero(bad).flatten()[:SCALED_NUMEL].tolist()
        if not places:
            return None
        # In 8 bits, an infinity takes with it all that share its scale: look for the one that the rule made.
        told = ((index, self._optimizer.explain(before, index)) for index in places)
        index, line = next((pair for pair in told if pair[1]), (places[0], "every value is finite"))
        slot = space.layout.slot_at(before.offset + index)
        element = before.offset + index - slot.offset
        return f"parameter {slot.name!r}, element {element}; {line}"
