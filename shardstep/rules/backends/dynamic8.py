"""Blockwise 8-bit states: what their bytes mean, in numpy. Every back end must agree with it, bit for bit.

Each 256 neighbouring elements of a tensor, counted from its first one, share a scale: the largest magnitude among them,
in float32. An element is a byte, which stands for one of 256 values v between -1 and 1: float32(float32(v) * scale).

The values are those of the *dynamic map* of 8-bit optimizers (Dettmers et al. 2022, arXiv 2110.02861): 0, 1, and in
each decade from 1e-7 to 1 the centres of equal parts, twice as many in every decade as in the one below. ``dynamic8``
begins with one part, and has both signs of all but the 1; ``dynamic8_unsigned`` begins with two. As *numbers* m in the
order of their size, of which 2^n to 2^(n+1) - 1 are one decade, they are

    v(m) = (18 m + 9 - 2^(n+4)) / (2^(top+1) 5^(top-n)),    v(2^top) = 1,    v(-m) = -v(m),

and a byte is m - 1: an int8 where there are signs (top = 7, m from -127 to 128, of which 0 is the value 0), a uint8
where there are none (top = 8, m from 1 to 256, of which 1 is the value 0). So the dtype says which map it is, and bytes
are in the order of their values. v(m) is exact, and rounded to float32 once; bitsandbytes makes its map by steps in
float32, and lies up to 6e-8 off.

An element x becomes the value nearest to q = float32(x / scale), the one nearer to zero where two are equally near;
what lies half way between two v is exact too. What is negative becomes 0 where there are no signs, and -1 becomes the
lowest value where there are. float64 is rounded to float32 first. Where all elements are zero, so is the scale, and all
bytes are that of 0. Where one is infinite or NaN, the scale is NaN and all bytes are that of 0: the 256 elements are
lost, and everything that is made of them shows it. Denormal scales are scales like others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardstep.rules.backends.evaluation import exactly
from shardstep.rules.backends.rounding import raw_view, read
from shardstep.rules.binding import CODED, scale_name, scales_among
from shardstep.types import SCALED_NUMEL

Array = NDArray[Any]

DECADES: Final = 7

INFINITE_BITS: Final = 0x7F80_0000
"""Of a float32; those of NaN are above it."""

NAN_BITS: Final = 0x7FC0_0000
"""Of the scale of what is not finite."""

NINTH: Final = float(np.float32((1 + 2.0**-20) / 9))
"""A little more than 1/9, so that a guess that is made with it is never too low by rounding."""

_TILE: Final = 2**18
"""Elements converted at a time, a multiple of 256."""


@dataclass(frozen=True)
class DynamicMap:
    """See above. 2^top is the number of the value 1, ``zero`` that of the value 0."""

    top: int
    zero: int

    @property
    def signed(self) -> bool:
        return self.zero == 0

    @property
    def decades(self) -> range:
        """Their n: each begins with the number 2^n."""
        return range(self.top - DECADES, self.top)

    def fraction(self, number: int) -> tuple[int, int]:
        """Numerator and denominator of a value that is neither 0 nor 1; float32 holds both exactly."""
        n = abs(number).bit_length() - 1
        size = 18 * abs(number) + 9 - 2 ** (n + 4)
        return size if number > 0 else -size, 2 ** (self.top + 1) * 5 ** (self.top - n)

    def value(self, number: int) -> Fraction:
        """Exactly."""
        if number in (self.zero, 2**self.top):
            return Fraction(number != self.zero)
        return Fraction(*self.fraction(number))

    @cached_property
    def table(self) -> Array:
        """The values, rounded, in the order of the bytes."""
        first = 1 - 2**self.top if self.signed else 1
        exact = [self.value(number) for number in range(first, 2**self.top + 1)]
        return np.array([np.float32(value.numerator) / np.float32(value.denominator) for value in exact])

    @cached_property
    def bounds(self) -> Array:
        """For each number from ``zero`` on but the last: the largest float32 that is not nearer to the next one."""
        numbers = range(self.zero, 2**self.top)
        return np.array([_below((self.value(m) + self.value(m + 1)) / 2) for m in numbers], np.float32)

    def edge(self, n: int) -> float:
        """The bound below the number 2^n, the first one of a decade."""
        return float(self.bounds[2**n - 1 - self.zero])

    def encoded(self, values: Array) -> tuple[Array, Array]:
        """Bytes and scales of flat float32 values, which begin where a scale does."""
        grid = np.zeros((-(-values.size // SCALED_NUMEL), SCALED_NUMEL), np.float32)
        grid.reshape(-1)[: values.size] = values
        largest = np.abs(grid).view(np.int32).max(axis=1)  # the bits of a float count its magnitude, and NaN is above
        scale = np.where(largest < INFINITE_BITS, largest, np.int32(NAN_BITS)).view(np.float32)
        size = (np.abs(grid) / scale[:, None]).reshape(-1)[: values.size]
        number = self.zero + np.searchsorted(self.bounds, size, side="left")
        number = np.where(size > self.bounds[0], number, self.zero)  # not where it is NaN: 0 / 0, or of a NaN
        negative = np.maximum(-number, 1 - 2**self.top) if self.signed else np.full_like(number, self.zero)
        return (np.where(values < 0, negative, number) - 1).astype(np.int8 if self.signed else np.uint8), scale

    def decoded(self, codes: Array, scale: Array) -> Array:
        """The float32 values of flat bytes, which begin where a scale does."""
        scales = np.repeat(scale, SCALED_NUMEL)[: codes.size]
        return np.asarray(self.table[codes.astype(np.int16) + (128 if self.signed else 0)] * scales)


def _below(exact: Fraction) -> Any:
    """The largest float32 that is not above."""
    rounded = np.float32(float(exact))
    return rounded if Fraction(float(rounded)) <= exact else np.nextafter(rounded, np.float32(-np.inf))


MAPS: Final = {torch.int8: DynamicMap(top=7, zero=0), torch.uint8: DynamicMap(top=8, zero=1)}
"""By what their bytes are: so these alone say what they mean."""


def encode(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The bytes, int8 or uint8, of a whole tensor, in its shape, and its scales."""
    flat = values.detach().reshape(-1)
    codes = torch.empty(flat.shape, dtype=dtype)
    scale = torch.empty(-(-flat.numel() // SCALED_NUMEL), dtype=torch.float32)
    with exactly():
        for start in range(0, flat.numel(), _TILE):
            found = MAPS[dtype].encoded(read(flat[start : start + _TILE], torch.float32))
            for array, at, part in zip((codes, scale), (start, start // SCALED_NUMEL), found, strict=True):
                raw_view(array)[at : at + part.size] = part
    return codes.view(values.shape).to(flat.device), scale.to(flat.device)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of such a pair."""
    flat, scales = raw_view(codes.detach().cpu().reshape(-1)), raw_view(scale.detach().cpu())
    values = np.empty(flat.size, np.float32)
    with exactly():
        for start in range(0, flat.size, _TILE):
            part = slice(start, start + _TILE)
            part_scales = scales[start // SCALED_NUMEL : (start + _TILE) // SCALED_NUMEL]
            values[part] = MAPS[codes.dtype].decoded(flat[part], part_scales)
    return torch.from_numpy(values).view(codes.shape).to(codes.device)


def decoded_states(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """States as numbers, by name: those in 8 bits decoded, the others as they are."""
    scales = scales_among(arrays)
    return {
        name: decode(array, arrays[scale_name(name)]) if array.dtype in CODED else array
        for name, array in arrays.items()
        if name not in scales
    }
