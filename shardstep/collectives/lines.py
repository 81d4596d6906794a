"""Pipes between processes of this machine: short messages, written and read by the threads that have them to say.

gloo has a thread of its own for each group, which must get a core before a message arrives, and which turns in circles
while the sender holds a lock that it wants: with two ranks on two cores that was 2 % of a step, and 80 µs of CPU time
for a message sent and one received. By pipes it is 5.

A process opens the end of a pipe that another has made by /proc, which Linux allows where it allows to read that
one's memory. A message has a mark, by which it is asked for, and may be asked for later than others. Nothing here knows
what messages mean.
"""

import os
import select
import struct
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress

_HEAD = struct.Struct("=qq")
LONGEST_BYTES = select.PIPE_BUF - _HEAD.size
"""What a pipe takes as a whole, or not at all."""


class Inlets:
    """One pipe from each of some other processes to this one, which they are to open."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ends = {rank: os.pipe() for rank in ranks}
        """By rank: where this process reads, and what the other opens to write."""

    def close_but(self, ranks: Sequence[int]) -> dict[int, int]:
        """What is left to read from, now that the others have opened theirs: by rank. Then a pipe ends with them."""
        for rank, (read, write) in self.ends.items():
            os.close(write)
            if rank not in ranks:
                os.close(read)
        return {rank: self.ends[rank][0] for rank in ranks}


def open_outlet(process: int, end: int) -> int | None:
    """The end of a pipe that another process has made for this one; None where it cannot be opened."""
    try:
        return os.open(f"/proc/{process}/fd/{end}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None


class Lines:
    """Pipes from some ranks and to them; they stay open as long as the process."""

    def __init__(self, inlets: dict[int, int], outlets: dict[int, int]) -> None:
        self._inlets, self._outlets = inlets, outlets
        self._ranks = {inlet: rank for rank, inlet in inlets.items()}
        self._open = set(self._ranks)
        self._broken, self._break = os.pipe()
        self._arrived: dict[int, defaultdict[int, deque[bytes]]] = {rank: defaultdict(deque) for rank in inlets}
        self._polls = {rank: self._poll(inlet) for rank, inlet in inlets.items()}

    def send(self, rank: int, mark: int, payload: bytes) -> None:
        """Write a message; the reader may be anywhere. Raises RuntimeError when it has ended, or after ``cut``."""
        message = _HEAD.pack(mark, len(payload)) + payload
        assert len(message) <= select.PIPE_BUF
        try:
            while not _fits(self._outlets[rank], message):
                self._read_meanwhile(self._outlets[rank])
        except OSError as error:
            raise RuntimeError(f"the line to rank {rank} is broken: {error.strerror}") from error

    def receive(self, rank: int, mark: int) -> bytes:
        """Wait for a message. Raises RuntimeError when that rank has ended, or after ``cut``."""
        arrived = self._arrived[rank]
        while mark not in arrived:
            self._read([end for end, _ in self._polls[rank].poll()])
        messages = arrived[mark]
        message = messages.popleft()
        if not messages:
            del arrived[mark]
        return message

    def cut(self) -> None:
        """Make every wait on these lines fail, now and from now on, here and at the other ends."""
        read, write = os.pipe()
        os.close(read)
        for outlet in self._outlets.values():
            os.dup2(write, outlet)  # not closed: a thread that is about to write must not write to another file
        os.close(write)
        os.write(self._break, b"!")

    def _poll(self, *inlets: int) -> select.poll:
        poll = select.poll()
        for end in (*inlets, self._broken):
            poll.register(end, select.POLLIN)
        return poll

    def _read(self, ends: Sequence[int]) -> None:
        """Take one message out of each of these pipes that have any."""
        if self._broken in ends:
            raise RuntimeError("the lines to all ranks were cut")
        for inlet in ends:
            mark, nbytes = _HEAD.unpack(self._exactly(_HEAD.size, inlet))
            self._arrived[self._ranks[inlet]][mark].append(self._exactly(nbytes, inlet))

    def _exactly(self, nbytes: int, inlet: int) -> bytes:
        read = b""
        while len(read) < nbytes:
            more = os.read(inlet, nbytes - len(read))
            if not more:
                raise RuntimeError(f"the line from rank {self._ranks[inlet]} is broken")
            read += more
        return read

    def _read_meanwhile(self, outlet: int) -> None:
        """Wait until a full pipe has room; its reader may be waiting for the same here."""
        poll = self._poll(*self._open)
        poll.register(outlet, select.POLLOUT)
        events = dict(poll.poll())
        self._open -= {end for end, event in events.items() if event == select.POLLHUP}  # its rank has ended
        self._read([end for end, event in events.items() if event & select.POLLIN])

    def __del__(self) -> None:
        for end in (*self._inlets.values(), *self._outlets.values(), self._broken, self._break):
            with suppress(OSError):
                os.close(end)


def _fits(outlet: int, message: bytes) -> bool:
    """Write it, if the pipe has room for it."""
    try:
        return os.write(outlet, message) == len(message)
    except BlockingIOError:
        return False
