"""Shards that peers may take whenever they gather, without this rank's doing anything at that time.

Of each space whose parameters are sharded, a rank's neighbours read its shard where it is. To every other peer it
lends it: a message is posted before anybody asks for it, and travels when the peer posts the other half. So a rank
that uses other units than its peers, or none at a time when they do, neither waits for them nor makes them wait. What
has been taken is told with the next announcement (see `agreement`), and lent again.

A loan is of the memory, not of the values at the time. Whoever writes into shards has announced it, and confirmed that
all ranks are there, so that nobody is still reading old values; and whoever takes has confirmed an announcement that
its peers send only when they are done with writing. (Updates in backward know it otherwise: see the note in `early`.)
gloo reads memory when a message travels, and needs no call of the sender's; where messages must be posted on both sides
at once (NCCL), nothing is lent, and all ranks gather the same units in the same order.
"""

from collections.abc import Sequence

from torch import Tensor

from shardstep.collectives import Group, Pending


class Loan:
    """One shard, lent to every peer that cannot read it; and the right to take each peer's, by messages once between
    two announcements. ``addresses``: where each rank has its shard.
    """

    def __init__(self, shard: Tensor, addresses: Sequence[int], where: str, tag: int, group: Group) -> None:
        self._shard, self._addresses, self._where, self._tag, self._group = shard, addresses, where, tag, group
        self._lent: dict[int, Pending] = {}
        others = [rank for rank in range(group.size) if rank != group.rank and not group.reads(rank, shard)]
        self._by_messages = bool(others)
        self.used = self._taken = False
        """``used``: whether what peers lend by messages was taken since the last announcement."""
        for peer in others:
            self._lend(peer)

    def take(self, flat: Tensor, label: str) -> Pending | None:
        """Begin to fill ``flat`` with every rank's shard; None if that takes messages, and they were taken since the
        last announcement.
        """
        if self.used:
            return None
        self.used = self._by_messages
        return self._group.take(flat, self._shard, self._addresses, tag=self._tag, label=label)

    def arrived(self) -> None:
        """What was taken is here."""
        self._taken = self.used

    def report(self) -> bool:
        """Whether it was taken since the last report; the announcement that says so allows to take it again."""
        taken, self._taken = self._taken, False
        self.used = self.used and not taken
        return taken

    def renew(self, peer: int) -> None:
        """Lend again to a peer that has taken its loan."""
        if peer in self._lent:
            self._lent.pop(peer).wait()
            self._group.count_loan(self._shard.nbytes)
            self._lend(peer)

    def _lend(self, peer: int) -> None:
        label = f"loan of the shard of {self._where}"
        self._lent[peer] = self._group.lend(self._shard, peer, tag=self._tag, label=label)
