"""Which back end compiles for which device, and how its kernels are asked for many tensors at once.

Kernels for the CPU take tables of tensors; those of other back ends take one tensor a call, which `OneByOne` hides.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from shardstep.rules.backends import llvm, reference, triton
from shardstep.rules.backends.llvm import LlvmKernel, Row
from shardstep.rules.binding import Binding, PhaseKernel, arrays_of
from shardstep.rules.ir import Phase
from shardstep.types import Segment, Stack


def back_end(device: torch.device) -> Callable[[Phase, Binding], PhaseKernel]:
    """``compile_phase`` of the fastest back end for a device."""
    if device.type == "cuda":
        return triton.compile_phase
    return _llvm_or_reference if device.type == "cpu" else reference.compile_phase


def _llvm_or_reference(phase: Phase, binding: Binding) -> PhaseKernel:
    try:
        return llvm.compile_phase(phase, binding)
    except llvm.TargetUnsupported as error:
        _warn_once(str(error))
        return reference.compile_phase(phase, binding)


@cache
def _warn_once(reason: str) -> None:
    text = f"updates run on the reference back end, which is slow and gives the same bits: {reason}"
    warnings.warn(text, stacklevel=2)


class OneByOne:
    """A kernel that takes one tensor a call, asked as an `LlvmKernel` is."""

    def __init__(self, kernel: PhaseKernel) -> None:
        self._kernel = kernel

    def row(self, segment: Segment, count: int, scalars: Sequence[float]) -> Row:
        """See `LlvmKernel.row`."""
        return Row(arrays_of(segment), scalars, segment.offset, segment.low)

    def rows(self, stack: Stack, counts: Sequence[int], scalars: Sequence[float]) -> list[Row]:
        """See `LlvmKernel.rows`."""
        return [self.row(*one, scalars) for one in zip(stack.segments(), counts, strict=True)]

    def run(self, rows: Sequence[Row], numel: int) -> None:
        """See `LlvmKernel.run`."""
        self.many(rows)

    def many(self, rows: Sequence[Row]) -> list[tuple[Tensor, ...]]:
        """See `LlvmKernel.many`."""
        return [self._kernel(row.arrays, row.scalars, offset=row.offset, low=row.low, lines=row.lines) for row in rows]


ManyKernel: TypeAlias = LlvmKernel | OneByOne


def for_many(kernel: PhaseKernel) -> ManyKernel:
    """A kernel as one that takes many tensors at once."""
    return kernel if isinstance(kernel, LlvmKernel) else OneByOne(kernel)
