"""The ledger of the engine's own buffers: every flat buffer is taken and given back here, and so counted.

It counts bytes by what they hold (parameters, gradients, optimizer state), now and at the peak. It does not
count activations or what the user allocates. Of gradient buffers it keeps one spare during a backward pass, and
counts it: leaves follow one another, and the memory of the one that has gone suits the next.

[Note: freed memory on the CPU] glibc gives large freed chunks back to the kernel, which zeroes them again page
by page at the next use: activations and gradients come and go with every step, and in paired runs this was 5 to
9 % of a step's CPU time. So glibc is told to keep what is freed (chunks of up to 32 MiB, its own limit; larger ones
still go back at once). Page faults fell from thousands a step to almost none, and the peak of a whole rank's memory
rose by up to 7 %. While a model is cut and laid out it is the other way round: shards stay and whole tensors go, and a
shard in the place of a whole tensor leaves a hole that is just too small for the next one. So chunks of a megabyte and
more are then taken from the kernel one by one, and given back.

[Note: holes] Small objects that live longer settle at the edges of a large chunk that was freed; the hole is then some
bytes too small for the next buffer of the same size, which takes new memory. Within 800 steps the heap of a small model
grew by 400 MB of holes. So every few dozen steps all free pages go back to the kernel.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["parameters", "gradients", "state"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_KEPT_BYTES = 32 << 20
_SMALLEST_RETURNED_BYTES = 1 << 20
_NEVER_TRIM_BYTES = 2**31 - 1
_STEPS_BETWEEN_TRIMS = 64
"""A trim costs as much as the page faults of one step without any of this."""


@dataclass(frozen=True)
class Bytes:
    """Bytes on one rank, by what they hold. Masters of low-precision parameters and averages count as ``state``."""

    parameters: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.state


class Ledger:
    """Allocates flat buffers on one device and keeps count of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spare: Tensor | None = None
        self._live: dict[Kind, int] = {"parameters": 0, "gradients": 0, "state": 0}
        self._peak = dict(self._live)

    def take(self, kind: Kind, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised 1-D buffer."""
        spare = self._spare
        if kind == "gradients" and spare is not None and spare.numel() == numel and spare.dtype == dtype:
            self._spare = None
            return spare
        self.count(kind, numel * dtype.itemsize)
        return torch.empty(numel, dtype=dtype, device=self.device)

    def give(self, kind: Kind, buffer: Tensor) -> None:
        """Give back a whole buffer; its memory goes with the caller's last reference."""
        self.count(kind, -buffer.nbytes)

    def spare(self, buffer: Tensor) -> None:
        """Give back a gradient buffer, to be taken again soon."""
        self.drop_spare()
        self._spare = buffer

    def drop_spare(self) -> None:
        """Let the spare buffer go, if there is one."""
        if self._spare is not None:
            self.give("gradients", self._spare)
            self._spare = None

    def count(self, kind: Kind, change_bytes: int) -> None:
        self._live[kind] += change_bytes
        self._peak[kind] = max(self._peak[kind], self._live[kind])

    @property
    def live(self) -> Bytes:
        return Bytes(**self._live)

    @property
    def peak(self) -> Bytes:
        """The highest count of each kind; the kinds need not have peaked at the same moment."""
        return Bytes(**self._peak)


@contextmanager
def laying_out() -> Iterator[None]:
    """See the note on freed memory: inside it goes back to the kernel, afterwards it is kept."""
    _keep_freed_memory(_SMALLEST_RETURNED_BYTES)
    try:
        yield
    finally:
        _keep_freed_memory(_LARGEST_KEPT_BYTES)


def _keep_freed_memory(below_bytes: int) -> None:
    """Nothing happens where the C library is another one than glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, below_bytes)
        mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM_BYTES)


def return_holes(step: int) -> None:
    """Every so many steps, give free memory back to the kernel: see the note on holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and step % _STEPS_BETWEEN_TRIMS == 0:
        trim(0)
