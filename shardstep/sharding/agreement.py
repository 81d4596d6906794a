"""Before ranks rely on one another they say what they are about to do, and compare.

An announcement is a few integers on the control channel. It is sent at once and compared later, just before
the first wait for data that depends on it, so that a rank that does something else is named within that
wait instead of hanging it. Nothing here moves tensors.
"""

from collections.abc import Sequence
from enum import IntEnum

from shardstep.collectives import Announcement, Group
from shardstep.errors import RankMismatchError


class Act(IntEnum):
    """What a rank is about to do."""

    FORWARD = 0
    BACKWARD = 1
    STEP = 2
    READ_WHOLE = 3


_SENTENCES = {
    Act.FORWARD: "begins a forward pass",
    Act.BACKWARD: "begins a backward pass",
    Act.STEP: "calls optimizer.step()",
    Act.READ_WHOLE: "gathers whole parameters or states",
}


class Agreement:
    """The announcements that this rank has sent and not yet compared."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._sent: list[Announcement] = []

    def announce(self, act: Act, step: int, leaves: int, details: Sequence[int] = ()) -> None:
        """Tell the other ranks; ``leaves`` counts this rank's finished backward passes of the step."""
        if self._group.size > 1:
            label = f"agreement to {act.name.lower().replace('_', ' ')} at step {step}"
            self._sent.append(self._group.announce([act, step, leaves, *details], label=label))

    def confirm(self) -> list[list[int]]:
        """Compare all that was announced; return every rank's details of the last announcement."""
        details: list[list[int]] = []
        while self._sent:
            rows = self._sent.pop(0).rows()
            if any(row[:3] != rows[0][:3] for row in rows):
                self._sent.clear()
                raise RankMismatchError(_mismatch(rows))
            details = [row[3:] for row in rows]
        return details


def _mismatch(rows: list[list[int]]) -> str:
    other = next(rank for rank, row in enumerate(rows) if row[:3] != rows[0][:3])
    sides = ", but ".join(
        f"rank {rank} {_SENTENCES[Act(rows[rank][0])]} (step {rows[rank][1]}, after {rows[rank][2]} micro-batches)"
        for rank in (0, other)
    )
    return (
        f"expected every rank to do the same, {sides}; give every rank the same number of micro-batches a step "
        f"and call forward, backward and step() on all of them"
    )
