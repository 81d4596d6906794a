"""Rounding by rational arithmetic: slow, and right by inspection. The oracle of the tests of bits."""

import math
from fractions import Fraction

import numpy as np
import torch

FORMATS = {
    torch.float64: (53, -1022, 1023),
    torch.float32: (24, -126, 127),
    torch.float16: (11, -14, 15),
    torch.bfloat16: (8, -126, 127),
}
"""Digits of precision, and the least and the largest exponent of normal numbers."""


def rounded(exact: Fraction, dtype: torch.dtype) -> float:
    """To nearest even. An exact zero gives +0; one that vanishes keeps its sign."""
    precision, least, largest = FORMATS[dtype]
    size = abs(exact)
    quantum = Fraction(2) ** (max(_exponent(size), least) - precision + 1)
    result = round(size / quantum) * quantum  # Python rounds a fraction to nearest even
    magnitude = math.inf if result >= Fraction(2) ** (largest + 1) else float(result)
    return -magnitude if exact < 0 else magnitude


def root(value: float, dtype: torch.dtype) -> float:
    """The square root of a positive number, rounded once."""
    shift = 200 + FORMATS[torch.float64][0]
    scaled = Fraction(value) * 4 ** (1100 + shift)
    floor = math.isqrt(int(scaled))
    sticky = Fraction(int(floor * floor != scaled), 2)
    return rounded((floor + sticky) / Fraction(2) ** (1100 + shift), dtype)


def special_values(dtype: torch.dtype) -> np.ndarray:
    """The ends of the format, the numbers around one, and some in between; both signs; no NaN, no infinity."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    values = [0.0, least, 3 * least, info.tiny - least, info.tiny, 1e-20, 0.1, 1 - info.eps / 2, 1.0, 1 + info.eps]
    values += [1.5, 2.0, 3.0, 1e10, info.max / 2, info.max]
    array = np.array(values, np.float32 if dtype == torch.float32 else np.float64)
    return np.concatenate([array, -array])


def same(got: float, want: float) -> bool:
    """Equal, with the signs of zeros, or both NaN."""
    return (math.isnan(got) and math.isnan(want)) or (got == want and math.copysign(1, got) == math.copysign(1, want))


def _exponent(size: Fraction) -> int:
    if not size:
        return -5000
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= size else exponent - 1
