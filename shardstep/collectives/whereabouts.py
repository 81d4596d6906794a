"""Which part of the training this rank is in, for the sentences that other ranks read.

Kept up by whoever drives the training; costs a tuple for each change. Nothing here communicates.
"""

import sys
import time
from collections.abc import Callable


class Whereabouts:
    """Where the training of this rank is, and since when."""

    def __init__(self) -> None:
        self.step = 0
        self.raised: Callable[[BaseException], None] | None = None
        """Called when an exception leaves a forward."""
        self.moved: Callable[[], None] | None = None
        """Called once at the next sign of life after that."""
        self._now: tuple[str, str, float] = ("between shard() and the first forward", "", time.monotonic())
        self._outer: list[tuple[str, str, int]] = []

    def at(self, what: str, where: str, step: int) -> None:
        """The rank is now in ``what`` (of the unit ``where``, if that is not empty)."""
        self.step, self._now = step, (what, where, time.monotonic())
        if self.moved is not None:
            self.moved()

    def enter_forward(self, where: str, step: int) -> None:
        """The forward of a unit begins."""
        self._outer.append((self._now[0], self._now[1], id(sys.exception())))
        self.at("forward", where, step)

    def leave_forward(self) -> None:
        """The forward of a unit ends, by an exception if one is being handled that was not so at its begin."""
        if not self._outer:
            return
        recomputing = self._outer[0][0] == "backward"  # there, an exception is how checkpointing ends a forward early
        what, where, handled = self._outer.pop()
        error = sys.exception()
        if error is not None and id(error) != handled and not recomputing:
            if self.raised is not None:
                self.raised(error)
        elif what in ("forward", "backward"):
            self._now = (what, where, time.monotonic())
        else:
            self._now = ("after a forward", "", time.monotonic())

    def told(self) -> tuple[str, float]:
        """A phrase for messages, and the time since when it is so."""
        what, where, since = self._now
        return f"step {self.step}, {what} of {where}" if where else f"step {self.step}, {what}", since
