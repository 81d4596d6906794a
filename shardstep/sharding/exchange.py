"""Leaves on their way, from the ranks that computed them to the trees of those that own their runs.

The exchanges of one unit are on their way at a time, and are added to the owner's tree before those of the next begin.
Nothing here decides when a leaf is sent.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from shardstep.collectives import Group, Pending
from shardstep.sharding.agreement import Agreement
from shardstep.sharding.memory import Ledger
from shardstep.sharding.reduce import Partial
from shardstep.sharding.space import Space


@dataclass
class _Flight:
    """An exchange on its way: what this rank sends, and what it receives from each peer."""

    space: Space
    sent: Partial
    received: list[Tensor | None]
    pending: Pending


class Exchanges:
    """Those of one model.

    ``landed`` is told of each space whose leaves have been added to this rank's tree; ``traced``: note whose leaves are
    not finite, which reads each once more.
    """

    def __init__(
        self, group: Group, ledger: Ledger, agreement: Agreement, landed: Callable[[Space], None], *, traced: bool
    ) -> None:
        self._group, self._ledger, self._agreement, self._landed = group, ledger, agreement, landed
        self._traced = traced
        self._flights: list[_Flight] = []

    def launch(self, space: Space, step: int) -> None:
        """Begin to exchange this rank's sum of own leaves for the others' sums over this rank's run."""
        if any(flight.space.unit_name != space.unit_name for flight in self._flights):
            self.land()
        sent = space.leaves.local.hand_over()
        if self._group.size == 1:
            space.leaves.tree.push(sent.values, home=sent.home, level=sent.level)
            self._landed(space)
            return
        received = [
            None if rank == self._group.rank else self._ledger.take("gradients", space.shard_numel, sent.values.dtype)
            for rank in range(self._group.size)
        ]
        if self._group.checked:
            self._agreement.confirm()  # lends again what peers wait for, who come to the comparison after that
        label = f"exchange of the gradients of {space.where} in step {step}"
        pending = self._group.exchange(sent.values, received, tag=2 * space.tag + 1, label=label)
        self._flights.append(_Flight(space, sent, received, pending))

    def land(self) -> None:
        """Wait for the exchanges on their way and add their leaves, in rank order, to the trees of this rank's runs."""
        if self._flights:
            self._agreement.confirm()
        flights, self._flights = self._flights, []
        for flight in flights:
            flight.pending.wait()
            self._add(flight)
            self._landed(flight.space)

    def _add(self, flight: _Flight) -> None:
        space, sent = flight.space, flight.sent
        own = sent.values.chunk(self._group.size)[self._group.rank]
        for rank, values in enumerate(flight.received):
            if self._traced:
                space.leaves.origins.note(rank, own if values is None else values)
            if values is not None:
                space.leaves.tree.push(values, home="tree", level=sent.level)
            else:
                space.leaves.tree.push(own, home="kept" if sent.home == "kept" else "passing", level=sent.level)
        if sent.home == "tree":
            space.leaves.tree.settle()
            self._ledger.spare(sent.values)
