"""The fingerprint of what one model's ranks do together, and the latest collectives behind it.

Every collective that all ranks must run alike is folded into one rolling number. Equal numbers after equally many
collectives mean the same collectives in the same order. Nothing here communicates.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch

_What = tuple[str, int, torch.dtype | None]
"""A collective: its label, bytes and dtype."""

KEPT = 1024
"""Collectives that are remembered."""

TOLD = 40
"""Of those, the most that are told to a peer."""


class Records:
    """The collectives of one model on this rank, in order."""

    def __init__(self) -> None:
        self.count, self.value = 0, 0
        """How many there were, and the rolling number: 63 bits and a sign."""
        self._kept: list[tuple[int, _What]] = [(0, ("", 0, None))] * KEPT

    def add(self, label: str, nbytes: int, dtype: torch.dtype | None) -> None:
        """Fold in one more. A tuple of integers has the same hash in every process."""
        self.count += 1
        self.value = hash((self.value, crc32(label.encode()), nbytes, _code(dtype)))
        self._kept[self.count % KEPT] = (self.value, (label, nbytes, dtype))

    def told(self) -> list[list[Any]]:
        """The latest ones for a peer: number, rolling value and description of each, in order."""
        numbers = range(max(1, self.count - TOLD + 1), self.count + 1)
        kept = ((number, *self._kept[number % KEPT]) for number in numbers)
        return [[number, value, _described(what)] for number, value, what in kept]

    def difference(self, told: Sequence[Sequence[Any]]) -> tuple[int, str, str] | None:
        """The first of a peer's collectives that differs from this rank's of that number: number, ours, the peer's."""
        for number, value, description in told:
            if max(0, self.count - KEPT) < number <= self.count:
                own, what = self._kept[number % KEPT]
                if own != value:
                    return number, _described(what), description
        return None


_CODES: dict[torch.dtype | None, int] = {}


def _code(dtype: torch.dtype | None) -> int:
    if dtype not in _CODES:
        _CODES[dtype] = crc32(str(dtype).encode())
    return _CODES[dtype]


def check_bits(nbytes: int, dtype: torch.dtype) -> int:
    """Seven bits that tell apart messages of other sizes or kinds, mostly."""
    return (nbytes * 31 + _code(dtype)) % 127


def _described(what: _What) -> str:
    label, nbytes, dtype = what
    return label if dtype is None else f"{label} ({nbytes:,} bytes of {str(dtype).removeprefix('torch.')})"
