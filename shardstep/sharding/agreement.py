"""Before ranks rely on one another they say what they are about to do, and compare.

An announcement is a few integers on the control channel, as many for every act (gloo ends the process when
lengths differ). It is sent at once and compared later, just before the first wait for data that depends on it,
so that a rank that does something else is named within that wait instead of hanging it. Nothing here moves
tensors.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum

from shardstep.collectives import Announcement, Group
from shardstep.errors import RankMismatchError
from shardstep.sharding.loans import Loan


class Act(IntEnum):
    """What a rank is about to do."""

    FORWARD = 0
    BACKWARD = 1
    STEP = 2
    READ_WHOLE = 3
    ADD_PARAMETERS = 4
    UNSCALE = 5
    SWAP = 6
    STATISTICS = 7
    KEEP_WRITES = 8
    TRAIN = 9
    EVALUATE = 10
    READ_NAMED = 11
    WRITE_NAMED = 12


_SENTENCES = {
    Act.FORWARD: "begins a forward pass",
    Act.BACKWARD: "begins a backward pass",
    Act.STEP: "calls optimizer.step()",
    Act.READ_WHOLE: "gathers whole parameters or states",
    Act.UNSCALE: "unscales gradients",
    Act.ADD_PARAMETERS: "adds parameters to the optimizer",
    Act.SWAP: "enters or leaves 'with average.applied():'",
    Act.KEEP_WRITES: "leaves whole parameters again",
    Act.STATISTICS: "runs another micro-batch of average.update_bn()",
    Act.TRAIN: "calls optimizer.train()",
    Act.EVALUATE: "calls optimizer.eval()",
    Act.READ_NAMED: "reads a full tensor by name",
    Act.WRITE_NAMED: "writes a full tensor by name",
}


_PLACES = {act: f"where it {sentence}" for act, sentence in _SENTENCES.items()}
_PLACES |= {Act.BACKWARD: "backward", Act.STEP: "optimizer.step()"}
"""How the other ranks name the part of the training that begins with an act."""


_BITS = 62
"""Flags carried by one announced integer."""


class Agreement:
    """The announcements that this rank has sent and not yet compared; each may carry ``flags`` flags, and tells which
    of ``loans`` were taken.
    """

    def __init__(self, group: Group, flags: int, loans: Sequence[Loan] = ()) -> None:
        self._group, self.flags, self._loans = group, flags, loans
        self.check: Callable[[Act], None] = _anything
        """Called before each announcement; raises if the act has no meaning now."""
        self._sent: list[Announcement] = []
        self._told: dict[int, list[bool]] = {}

    def announce(self, act: Act, step: int, leaves: int, flags: Sequence[bool] = ()) -> None:
        """Tell the other ranks; ``leaves`` counts this rank's finished backward passes of the step."""
        self.check(act)
        if self._group.size > 1:
            label = f"agreement to {act.name.lower().replace('_', ' ')} at step {step}"
            if act is not Act.FORWARD:  # told by the hooks, unit by unit
                self._group.whereabouts.at(_PLACES[act], "", step)
            taken = _packed([loan.report() for loan in self._loans])
            words = _packed([*flags, *[False] * (self.flags - len(flags))])
            self._sent.append(self._group.announce([act, step, leaves, *taken, *words], label=label))

    def confirm(self) -> list[bool] | None:
        """Compare all that was announced; return the flags that any rank has set in the last announcement.

        None when nothing was left to compare, and with one rank.
        """
        flags = None
        while self._sent:
            announcement = self._sent.pop(0)
            rows = announcement.rows()
            if any(row[:3] != rows[0][:3] for row in rows):
                self._sent.clear()
                raise RankMismatchError(_mismatch(rows))
            announcement.compare()
            told = 3 + len(_packed([False] * len(self._loans)))
            for rank, row in enumerate(rows):
                self._renew(rank, row[3:told])
            flags = [any(column) for column in zip(*(_unpacked(row[told:], self.flags) for row in rows), strict=True)]
            self._told[rows[0][0]] = flags
        return flags

    def flags_of(self, act: Act, own: list[bool]) -> list[bool]:
        """Those that any rank has set in the last announcement of this act that was compared; ``own`` with one rank."""
        return own if self._group.size == 1 else self._told[act]

    def _renew(self, rank: int, words: Sequence[int]) -> None:
        """Lend again what ``rank`` has taken."""
        for loan, taken in zip(self._loans, _unpacked(words, len(self._loans)), strict=True):
            if taken and rank != self._group.rank:
                loan.renew(rank)


def sentence_of(act: Act) -> str:
    """What messages say of a rank: that it "calls optimizer.step()", say."""
    return _SENTENCES[act]


def _anything(act: Act) -> None:
    """Whatever is announced has a meaning."""


def _packed(flags: Sequence[bool]) -> list[int]:
    words = [flags[start : start + _BITS] for start in range(0, len(flags), _BITS)]
    return [sum(1 << bit for bit, flag in enumerate(word) if flag) for word in words]


def _unpacked(words: Sequence[int], count: int) -> list[bool]:
    return [bool(words[index // _BITS] >> (index % _BITS) & 1) for index in range(count)]


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
