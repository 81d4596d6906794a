"""What is on its way between ranks: an asynchronous collective, and integers announced by every rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardstep.errors import CollectiveError

if TYPE_CHECKING:
    from shardstep.collectives.group import Group

_FRAME = 64
"""Integers that travel together. Ranks that disagree must not send other sizes, or gloo ends the process."""

_HEAD = 4
"""Of those, the first: the model's number, count and value of its fingerprint, and how many integers are announced."""


@dataclass
class Traffic:
    """What went through the door since the group was made: bytes sent by this rank, calls, seconds waited.

    What a neighbour reads counts as sent to it; but shards that are read at any time count where they are read.
    """

    sent_bytes: int = 0
    calls: int = 0
    wait_s: float = 0.0


class Pending:
    """An asynchronous collective. ``wait()`` returns when its memory may be read, written and freed; where it has
    raised, it raises again.
    """

    def __init__(self, works: Sequence[Any], label: str, group: "Group") -> None:
        self._works = works
        self._label = label
        self._group = group
        self._lost: CollectiveError | None = None

    def wait(self) -> None:
        if self._lost is not None:
            raise self._lost
        if self._works:
            works, self._works = self._works, ()
            try:
                self._group.wait(works, self._label)
            except CollectiveError as error:
                self._lost = error
                raise

    def forget(self) -> None:
        """Let go of it, arrived or not."""
        self._works = ()


def framed(head: tuple[int, int, int], values: Sequence[int]) -> Iterator[Tensor]:
    """An announcement cut into what travels together: one frame, if it is not long."""
    room = _FRAME - _HEAD
    for start in range(0, max(1, len(values)), room):
        body = values[start : start + room]
        yield torch.tensor([*head, len(values), *body, *[0] * (room - len(body))], dtype=torch.int64)


class Announcement:
    """Integers on their way from every rank."""

    def __init__(
        self, frames: list[list[Tensor]], pending: list[Pending], group: "Group", rows: list[list[int]] | None = None
    ) -> None:
        self._frames, self._pending, self._group, self._rows = frames, pending, group, rows
        self._fingerprints = set[tuple[int, int]]()

    def rows(self) -> list[list[int]]:
        """Each rank's integers, in rank order, once all are there. Raises RankMismatchError if they are no matches."""
        if self._rows is None:
            self._pending[0].wait()
            heads = [part[:_HEAD].tolist() for part in self._frames[0]]
            if any((model, length) != (heads[0][0], heads[0][3]) for model, _, _, length in heads):
                raise self._group.mismatch()
            self._fingerprints = {(count, value) for _, count, value, _ in heads}
            for pending in self._pending[1:]:
                pending.wait()
            ranks = [torch.stack(parts).tolist() for parts in zip(*self._frames, strict=True)]
            self._rows = [[v for frame in frames for v in frame[_HEAD:]][: heads[0][3]] for frames in ranks]
        return self._rows

    def compare(self) -> None:
        """Raise RankMismatchError if the ranks have run other collectives up to here."""
        self.rows()
        if len(self._fingerprints) > 1:
            raise self._group.mismatch()
