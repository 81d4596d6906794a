"""The ranks that share this one's machine, and what they can do without messages through a network's sockets.

Neighbours read one another's memory (`reading`) and have pipes to one another (`lines`). Both ways or not at all: who
is one is found out by trying, when ranks first meet, and all of them know. Where it fails (another machine, another
container, a kernel that does not allow it), ranks are strangers, and gloo carries everything.

[Note: offers] What a neighbour needs does not travel: this rank says where it is, the other one reads it there, and
says when it has. The reader does so when it waits, and the memory is lent until then. So offers are only made of what
all ranks wait for in the same order, and a rank waits for what it reads before it waits for those that read.
"""

import os
import struct
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from shardstep.collectives.lines import Inlets, Lines, open_outlet
from shardstep.collectives.reading import Token, finds, let_siblings_read, read_into

_ADDRESS = struct.Struct("=Q")
_ANSWER, _GATHERING = 1 << 32, 1 << 33
"""Set in the mark of the message that says that something was read, and of those of a gathering."""

Tell = Callable[[Sequence[int]], list[list[int]]]
"""Tells all ranks a few integers; what each of them tells, in rank order."""


class Neighbours:
    """Those of ``rank`` among the ranks that ``tell`` reaches. Collective."""

    def __init__(self, rank: int, tell: Tell) -> None:
        self._token = Token()
        let_siblings_read()
        here = _machine()
        told = tell([here, os.getpid(), self._token.address, self._token.value])
        beside = [other for other, row in enumerate(told) if other != rank and here and row[0] == here]
        self._processes = [row[1] for row in told]
        inlets = Inlets(beside)
        ends = tell([inlets.ends[other][1] if other in inlets.ends else -1 for other in range(len(told))])
        able = {other: open_outlet(told[other][1], ends[other][rank]) for other in beside if finds(*told[other][1:])}
        outlets = {other: end for other, end in able.items() if end is not None}
        everyone = tell([other in outlets for other in range(len(told))])
        self.are_near = [other in outlets and bool(row[rank]) for other, row in enumerate(everyone)]
        """Of each rank whether it is a neighbour of this one."""
        pairs = combinations(range(len(everyone)), 2)
        self.are_all = all(everyone[one][other] and everyone[other][one] for one, other in pairs)
        """Whether any two ranks are neighbours; the same everywhere."""
        for other in [other for other in outlets if not self.are_near[other]]:
            os.close(outlets.pop(other))
        self.ranks = list(outlets)
        """The neighbours."""
        self.lines = Lines(inlets.close_but(self.ranks), outlets)
        self._gatherings = 0

    def read(self, tensor: Tensor, rank: int, address: int) -> None:
        """Overwrite ``tensor`` with what is at ``address`` in a neighbour's memory; RuntimeError if it has ended."""
        read_into(tensor, self._processes[rank], address)

    def offer(self, tensor: Tensor, rank: int, mark: int) -> "Offer":
        """Let a neighbour read ``tensor``."""
        return Offer(self, tensor, rank, mark)

    def accept(self, tensor: Tensor, rank: int, mark: int) -> "Acceptance":
        """Let a neighbour's offer of that mark be read into ``tensor``."""
        return Acceptance(self, tensor, rank, mark)

    def gather(self, own: Tensor) -> "Gathering":
        """Tell all ranks a short tensor, where they `are_all` neighbours; they do so in one order."""
        self._gatherings += 1
        return Gathering(self, own, _GATHERING | self._gatherings)


class Offer:
    """Waited for as torch's handle of a message is: until the other rank has read."""

    def __init__(self, neighbours: Neighbours, tensor: Tensor, rank: int, mark: int) -> None:
        self._lines, self._tensor, self._rank, self._mark = neighbours.lines, tensor, rank, mark
        self._lines.send(rank, mark, _ADDRESS.pack(tensor.data_ptr()))

    def wait(self) -> None:
        self._lines.receive(self._rank, self._mark | _ANSWER)


class Acceptance:
    """The other end, which reads when it waits."""

    def __init__(self, neighbours: Neighbours, tensor: Tensor, rank: int, mark: int) -> None:
        self._neighbours, self._tensor, self._rank, self._mark = neighbours, tensor, rank, mark

    def wait(self) -> None:
        lines = self._neighbours.lines
        (address,) = _ADDRESS.unpack(lines.receive(self._rank, self._mark))
        self._neighbours.read(self._tensor, self._rank, address)
        lines.send(self._rank, self._mark | _ANSWER, b"")


class Gathering:
    """What each rank tells: ``parts``, in rank order, when it was waited for as for torch's handle."""

    def __init__(self, neighbours: Neighbours, own: Tensor, mark: int) -> None:
        self._neighbours, self._mark = neighbours, mark
        self.parts = [torch.empty_like(own) if near else own for near in neighbours.are_near]
        payload = own.numpy().tobytes()
        for rank in neighbours.ranks:
            neighbours.lines.send(rank, mark, payload)

    def wait(self) -> None:
        for rank in self._neighbours.ranks:
            part, payload = self.parts[rank], self._neighbours.lines.receive(rank, self._mark)
            if len(payload) != part.nbytes:
                raise RuntimeError(f"expected {part.nbytes} bytes from rank {rank}, got {len(payload)}")
            part.copy_(torch.frombuffer(bytearray(payload), dtype=part.dtype))


def _machine() -> int:
    """Equal in all processes that know one another by the same process numbers; 0 where nothing can be read."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return crc32(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode())
    except OSError:  # not Linux, or one that hides it
        return 0
