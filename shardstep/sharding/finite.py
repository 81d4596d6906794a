"""Which gradients are not finite, and which rank computed them.

A sum no longer shows which of its leaves was infinite or NaN, so a rank notes the extremes of each leaf before it adds
it. Nothing here decides what follows from it.
"""

import torch
from torch import Tensor


class Origins:
    """The extremes of every rank's leaves over this rank's run of one space, in one step."""

    def __init__(self) -> None:
        self._extremes: list[tuple[int, tuple[Tensor, Tensor]]] = []

    def note(self, rank: int, values: Tensor) -> None:
        """Note ``rank``'s values, of a leaf or a sum of its own leaves."""
        self._extremes.append((rank, torch.aminmax(values)))

    def not_finite(self) -> list[int]:
        """The ranks that have computed values which are not finite."""
        return sorted({rank for rank, extremes in self._extremes if not _both_finite(*extremes)})

    def clear(self) -> None:
        """Forget the step."""
        self._extremes.clear()


def is_finite(values: Tensor) -> bool:
    """Without temporaries: the extremes of values with a NaN are NaN."""
    return _both_finite(*torch.aminmax(values))


def _both_finite(least: Tensor, most: Tensor) -> bool:
    return bool(torch.isfinite(least) and torch.isfinite(most))
