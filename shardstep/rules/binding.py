"""How a phase meets memory: which dtype each array is stored in, and how a compiled phase is called.

Plain data and a protocol; nothing here computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Binding:
    """``compute``: float32 or float64. ``stored``: (array, dtype) for each array that the phase loads or stores.

    ``low``: dtype of the copy of the new param that is written beside it (bfloat16 or float16), or None.
    """

    compute: torch.dtype
    stored: tuple[tuple[str, torch.dtype], ...]
    low: torch.dtype | None = None


class PhaseKernel(Protocol):
    """One phase on flat arrays: each contiguous, of shape (n,), in the binding's dtypes, on one device."""

    def __call__(
        self, arrays: Mapping[str, Tensor], scalars: Sequence[float], *, offset: int = 0, low: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Run it in place. ``scalars``: s0, s1, … as float64, rounded once here. ``offset``: the global position of
        element 0. Returns, for each sum of the phase, the partials of the blocks of 1,024 global positions that the
        run touches, in order: float64 of shape (blocks,). The caller has checked the arrays.
        """
