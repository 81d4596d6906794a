"""The side channel: tells all ranks when one has failed, died, ended, or does not arrive, and breaks their waits.

News go round: every rank listens to the one before it and passes on what it hears to the one after it, so a rank
has one connection to watch, and a connection that breaks without a goodbye is a death. Three threads serve one set
of ranks, whatever number of models: one listens, one sends (it may be held up by a rank that was stopped), and one
looks at the clock once a second, says where this rank is, and looks at how long its main thread has waited.

What ends all ranks: an exception that ends a rank, a death, different collectives (found out while ranks wait for one
another). When the cause is known, every rank gives up all connections, so the main thread's wait fails, and raises the
cause. What is only told, at half the timeout: a rank that does not arrive; the job may yet go on, and the timeout
is the user's. An exception that was seen to leave a forward, but may have been caught, counts when the others have
waited three seconds and the rank has given no other sign of life.

This room sends nothing but news, and never decides what training does.
"""

import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from shardstep.collectives.heard import STALL_S, Heard, Wait
from shardstep.collectives.news import Message, blank, packed, shortened, unpacked
from shardstep.collectives.pending import Pending
from shardstep.collectives.records import Records
from shardstep.collectives.whereabouts import Whereabouts
from shardstep.collectives.wire import Wire
from shardstep.errors import CollectiveError, RankMismatchError

EXPLAIN_S = 2.0
"""How long a rank whose wait has failed waits for the cause."""
_JOIN_S = 2.0
_log = logging.getLogger("shardstep")


@dataclass(frozen=True)
class Cause:
    """Why training ends on all ranks."""

    text: str
    mismatch: bool


class Watch:
    """The side channel of one set of ranks."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.whereabouts = wire, Whereabouts()
        self.cause: Cause | None = None
        self.waiting: Wait | None = None
        self.models: dict[int, Records] = {}
        self.outstanding: weakref.WeakSet[Pending] = weakref.WeakSet()
        """What peers must have from this rank before it says goodbye."""
        self._lent: dict[int, Sequence[object]] = {}
        """By the number of a model what peers may take at any time, until all ranks have let go of that model."""
        self._let_go: dict[int, set[int]] = {}
        self.whereabouts.raised = self._tell_raised
        self._pid = os.getpid()
        self._timeout_s = wire.timeout.total_seconds()
        self._tick_s = min(1.0, self._timeout_s / 8)
        self._news = threading.Condition()
        self._heard = Heard(wire.rank, wire.size, self._timeout_s, self._tick_s)
        self._own_raise: str | None = None
        self._told: tuple[Wait | None, Wait | None] = (None, None)
        """The waits in which this rank has told its records, and named a rank that does not arrive."""
        self._failed_at = 0.0
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._sending = self._leaving = self._closing = False
        self._stop = threading.Event()
        loops = {"listen": self._listen, "send": self._send, "look": self._look}
        self._threads = [
            threading.Thread(target=loop, name=f"shardstep {name}", daemon=True) for name, loop in loops.items()
        ]
        for thread in self._threads:
            thread.start()

    # - the main thread's side

    def tell_failure(self, error: BaseException) -> None:
        """This rank ends because of ``error``; the others end too, and say so."""
        if self.cause is None and os.getpid() == self._pid:
            mismatch = isinstance(error, RankMismatchError)
            text = shortened(str(error)) if mismatch else self._blamed(error)
            self._fail({"kind": "failed", "rank": self.wire.rank, "text": text, "mismatch": mismatch})

    def tell_records(self, model: int, records: Records) -> None:
        """Have the other ranks compare their collectives with this rank's."""
        self._outbox.put({"kind": "records", "rank": self.wire.rank, "model": model, "records": records.told()})

    def explain(self, seconds: float = EXPLAIN_S) -> Cause | None:
        """The cause, if one is told within a time."""
        with self._news:
            self._news.wait_for(lambda: self.cause is not None or bool(self._heard.ended), seconds)
        return self.cause

    def failure(self, label: str, reason: str) -> CollectiveError:
        """The error to raise when the main thread's wait in ``label`` has failed; tells the others."""
        known = self._heard.late if self.cause is None else None
        cause = self.explain() if known is None else None
        here = f"rank {self.wire.rank} of {self.wire.size} was in the {label}"
        if cause is not None:
            return (RankMismatchError if cause.mismatch else CollectiveError)(f"{cause.text}; {here}")
        if known is None and self._heard.ended:
            known = "; ".join(self._heard.ended.values())
        if known is None:
            known = "a peer rank died, raised, or did not arrive in time; look for the first error of the other ranks"
        self._fail({"kind": "failed", "rank": self.wire.rank, "text": f"{known}; {here}", "mismatch": False})
        return CollectiveError(f"{known}; {here} ({reason})")

    def keep(self, model: int, lent: Sequence[object], owner: object) -> None:
        """Keep what was lent of a model until its ``owner`` is gone on all ranks; others may be slower to finish."""
        self._lent[model] = lent
        tell = {"kind": "let go", "rank": self.wire.rank, "model": model}
        weakref.finalize(owner, self._outbox.put, tell).atexit = False

    def say_goodbye(self) -> None:
        """Tell the others that this rank has ended its training, once they have what it owes them."""
        if os.getpid() != self._pid or self._leaving:
            return
        self._leaving = True
        for pending in list(self.outstanding):
            if self.cause is None:
                with suppress(CollectiveError):
                    pending.wait()
            pending.forget()
        if self.cause is None:
            place, _ = self.whereabouts.told()
            text = self._own_raise or f"rank {self.wire.rank} has ended its training ({place})"
            self._outbox.put({"kind": "ended", "rank": self.wire.rank, "text": text})

    def close(self) -> None:
        """Say goodbye, stay while others may take what this rank has lent, and end the threads."""
        self.say_goodbye()
        if os.getpid() != self._pid or self._closing:
            return
        with self._news:
            self._news.wait_for(self._may_end, self._timeout_s)
            self._closing = True
        self._outbox.put(None)
        self._stop.set()
        self._threads[1].join(_JOIN_S)
        self.wire.hang_up()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _may_end(self) -> bool:
        """Whether nobody else may need anything of this rank."""
        training = set(range(self.wire.size)) - {self.wire.rank} - self._heard.ended.keys()
        return self.cause is not None or all(training <= self._let_go.get(model, set()) for model in self._lent)

    def _blamed(self, error: BaseException) -> str:
        """How messages name an exception of this rank, and where it was."""
        kind = f"rank {self.wire.rank}: {type(error).__name__}: {shortened(str(error))}"
        if self._own_raise is not None and self._own_raise.startswith(kind):
            return self._own_raise
        return f"{kind} ({self.whereabouts.told()[0]})"

    def _tell_raised(self, error: BaseException) -> None:
        """An exception leaves a forward; the innermost unit is told first."""
        if self._own_raise is None and not isinstance(error, CollectiveError):
            self._own_raise, (place, _) = self._blamed(error), self.whereabouts.told()
            self.whereabouts.moved = self._tell_moved
            self._heard.forgive(place)
            self._outbox.put({"kind": "raised", "rank": self.wire.rank, "text": self._own_raise, "place": place})

    def _tell_moved(self) -> None:
        """It was caught."""
        self._own_raise, self.whereabouts.moved = None, None
        self._outbox.put({"kind": "moved", "rank": self.wire.rank})

    # - the threads

    def _fail(self, message: Message) -> None:
        """Take over a cause, tell the next rank, and give up all connections."""
        with self._news:
            if self.cause is not None or self._closing:
                return
            self._failed_at = time.monotonic()
            self.cause = Cause(message["text"], message["mismatch"])
            self._news.notify_all()
        self._outbox.put(message)
        self._outbox.put(None)

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            self._sending = True
            with suppress(RuntimeError):  # the next rank is gone; what is left is to cut
                self.wire.pass_on(packed(message))
            self._sending = False
        if self.cause is not None:
            time.sleep(0.1)  # for what was sent last to be read before the connection ends
            self.wire.cut()

    def _listen(self) -> None:
        received, left = blank(), self._heard.left
        while True:
            try:
                self.wire.listen(received)
            except RuntimeError:
                break
            message = unpacked(received)
            if message["kind"] == "beat":
                self._heard.beat(message)
                continue
            if message["kind"] == "let go":  # this rank's own too, when it has gone round
                self._note_let_go(message["model"], message["rank"])
            if message["rank"] != self.wire.rank:
                self._hear(message)
        if not self._closing and left not in self._heard.ended:
            text = f"rank {left} died: it was killed, or it crashed{self._heard.last_of_left()}"
            self._fail({"kind": "failed", "rank": self.wire.rank, "text": text, "mismatch": False})

    def _hear(self, message: Message) -> None:
        """Take in what another rank says, and pass it on."""
        kind = message["kind"]
        if kind == "failed":
            self._fail(message)
            return
        self._outbox.put(message)
        if kind == "records":
            self._compare(message)
        elif kind == "late":
            self._warn(message["text"])
        with self._news:
            self._heard.note(message)
            self._news.notify_all()

    def _note_let_go(self, model: int, rank: int) -> None:
        with self._news:
            gone = self._let_go.setdefault(model, set())
            gone.add(rank)
            if len(gone) == self.wire.size:
                self._lent.pop(model, None)  # it has none if shard() failed here
                del self._let_go[model]
            self._news.notify_all()

    def _compare(self, message: Message) -> None:
        own = self.models.get(message["model"])
        found = own.difference(message["records"]) if own is not None else None
        if found is not None:
            number, ours, theirs = found
            sides = sorted([(self.wire.rank, ours), (message["rank"], theirs)])
            told = ", but ".join(f"rank {rank} ran the {what}" for rank, what in sides)
            text = (
                f"expected every rank to run the same collectives in the same order, but as number {number} since "
                f"shard(), {told}; make every rank take the same way through the training loop"
            )
            self._fail({"kind": "failed", "rank": self.wire.rank, "text": text, "mismatch": True})

    def _look(self) -> None:
        while not self._stop.wait(self._tick_s):
            now = time.monotonic()
            if self.cause is not None:
                if now > self._failed_at + 1.0:  # the sender is held up
                    self.wire.cut()
                    return
                continue
            wait = self.waiting
            if self._outbox.empty() and not self._sending:
                self._outbox.put(self._beat(wait, now))
            if wait is not None:
                self._look_at(wait, now)

    def _beat(self, wait: Wait | None, now: float) -> Message:
        place, since = self.whereabouts.told()
        waits = None if wait is None else wait.label
        return {"kind": "beat", "rank": self.wire.rank, "place": place, "since_s": now - since, "waits": waits}

    def _look_at(self, wait: Wait, now: float) -> None:
        """What may be said of a wait that takes long."""
        waited, (records_told, late_told) = now - wait.since, self._told
        if waited > STALL_S and records_told is not wait:
            self._told = (wait, late_told)
            self.tell_records(wait.model, wait.records)
        if waited > self._timeout_s / 2 and (text := self._heard.accusation(wait, waited, now)) is not None:
            self._heard.late = text
            if late_told is not wait:
                self._told = (self._told[0], wait)
                self._outbox.put({"kind": "late", "rank": self.wire.rank, "text": text})
                self._warn(text)
        if (text := self._heard.hopeless(waited, now)) is not None:
            self._fail({"kind": "failed", "rank": self.wire.rank, "text": text, "mismatch": False})

    def _warn(self, text: str) -> None:
        self._heard.late = text
        _log.warning("%s; this ends with an error after %.0f s", text, self._timeout_s)

    def arrived(self) -> None:
        """The main thread's wait is over."""
        self.waiting = self._heard.late = None
