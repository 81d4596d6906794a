"""What a rank has heard of the others, and what follows from it for a wait that takes long.

Plain judgement over times and texts: no threads, no messages, so that each sentence can be tried by itself.
"""

import time
from dataclasses import dataclass

from shardstep.collectives.news import Message
from shardstep.collectives.records import Records

STALL_S = 1.0
"""A wait as long as that has the ranks compare what they have done so far."""
RAISED_S = 3.0
"""How long others wait for a rank whose forward has raised, or that has ended."""


@dataclass(frozen=True)
class Wait:
    """What the main thread waits in."""

    label: str
    model: int
    records: Records
    since: float


class Heard:
    """The others, as the rank ``rank`` of ``size`` knows them."""

    def __init__(self, rank: int, size: int, timeout_s: float, tick_s: float) -> None:
        self.left = (rank - 1) % size
        """The rank that this one listens to."""
        self.ended: dict[int, str] = {}
        self._raised: dict[int, tuple[str, str, float]] = {}
        self._forgiven = ""
        self.late: str | None = None
        """Who does not arrive, while the main thread waits."""
        self._timeout_s, self._silence_s = timeout_s, max(3.0, 3 * tick_s)
        self._beat: Message | None = None
        self._beat_at = time.monotonic()

    def beat(self, message: Message) -> None:
        """The rank before this one says where it is."""
        self._beat, self._beat_at = message, time.monotonic()

    def note(self, message: Message) -> None:
        """Another rank has ended, has raised in a forward, or goes on after that."""
        kind, rank = message["kind"], message["rank"]
        if kind == "ended":
            self.ended[rank] = message["text"]
        elif kind == "raised":
            if message["place"] != self._forgiven:
                self._raised[rank] = (message["text"], message["place"], time.monotonic())
        elif kind == "moved":
            self._raised.pop(rank, None)

    def forgive(self, place: str) -> None:
        """This rank has raised there too: all ranks may do so, and catch it."""
        self._forgiven = place
        for rank, (_, where, _) in list(self._raised.items()):
            if where == place:
                self._raised.pop(rank, None)

    def hopeless(self, waited: float, now: float) -> str | None:
        """Why a wait will never end, as far as one can tell by now."""
        if self.ended and waited > RAISED_S:
            return "; ".join(self.ended.values())
        raised = [text for text, _, at in list(self._raised.values()) if now - at > RAISED_S]
        if raised and waited > STALL_S:
            return raised[0]
        if waited > self._timeout_s:
            return self.late or f"no rank is known to be late, but the timeout of {self._timeout_s:.0f} s is over"
        return None

    def accusation(self, wait: Wait, waited: float, now: float) -> str | None:
        """What is wrong with the rank before this one, if it is that one which does not arrive."""
        beat, missing = self._beat, f"rank {self.left} has not arrived in the {wait.label} for {waited:.0f} s"
        if now - self._beat_at > self._silence_s:
            return f"{missing}, and does not answer{self.last_of_left()}"
        if beat is None or beat["waits"] == wait.label:
            return None
        if beat["waits"] is None:
            return f"{missing}: it is in {beat['place']} since {beat['since_s'] + now - self._beat_at:.0f} s"
        if waited > 0.75 * self._timeout_s and (self.late is None or self.late.startswith(f"rank {self.left} ")):
            return f"{missing}: it waits in the {beat['waits']}"  # nobody is stuck: they wait for one another
        return None

    def last_of_left(self) -> str:
        """The end of a sentence about the rank before this one."""
        return "" if self._beat is None else f"; the last that was heard of it: {self._beat['place']}"
