"""Arrays that hold every awkward number next to every other, and how they are compared."""

from collections.abc import Iterable

import numpy as np

_AWKWARD = np.float32(
    "0 -0 1 -1 inf -inf nan 1e-45 -1e-45 1.1754942e-38 1.17549435e-38 3.4028235e38 -3.4028235e38 1.0000001 "
    "0.99999994 3 -0.1 1e-20 1e20 1.1754944e-38 1.7014118e38 0.3333333".split()
)


def arrays_for(names: Iterable[str], *, awkward: bool = True, n: int = 1100) -> dict[str, np.ndarray]:
    """Random arrays by name, for half of their elements awkward numbers; of more than one block."""
    random = np.random.default_rng(7)
    found: dict[str, np.ndarray] = {}
    for name in names:
        array = random.standard_normal(n).astype(np.float32)
        if awkward:
            array = np.where(random.random(n) < 0.5, random.choice(_AWKWARD, n), array)
        found[name] = array
    return found


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Which NaN a NaN is, does not count."""
    return one.shape == other.shape and np.array_equal(_bits(one), _bits(other))


def _bits(array: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(array), np.float32(np.nan), array).astype(np.float32).view(np.uint32)
