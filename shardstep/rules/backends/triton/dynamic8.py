"""8-bit states as functions of the generated kernels: the arithmetic of `backends.llvm.dynamic8`, word by word.

A program's 1,024 elements are four times those of a scale. Pure text; nothing here runs.
"""

from functools import cache
from typing import Final

import torch

from shardstep.rules.backends.dynamic8 import INFINITE_BITS, MAPS, NAN_BITS, NINTH, DynamicMap
from shardstep.types import SCALED_NUMEL

NAMES: Final = {torch.int8: "dynamic8", torch.uint8: "dynamic8_unsigned"}
"""Behind ``from_`` and ``to_`` the functions of a map."""

_SCALES: Final = f'''\
@triton.jit
def larger(a, b):
    """For tl.max has functions of its own, which are not interpreted where the interpreter was switched on late."""
    return tl.where(a > b, a, b)


@triton.jit
def largest(new):
    """The scale of each {SCALED_NUMEL} numbers: the bits of a float count its magnitude, and those of NaN are above."""
    bits = new.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    groups: tl.constexpr = new.shape[0] // {SCALED_NUMEL}
    most = tl.reduce(tl.reshape(bits, [groups, {SCALED_NUMEL}]), 1, larger)
    return tl.where(most >= {INFINITE_BITS}, {NAN_BITS}, most).to(tl.float32, bitcast=True)
'''

_SPREAD: Final = f'''\
@triton.jit
def spread(scales):
    """Each scale for its {SCALED_NUMEL} elements."""
    groups: tl.constexpr = scales.shape[0]
    numel: tl.constexpr = groups * {SCALED_NUMEL}
    return tl.reshape(tl.broadcast_to(scales[:, None], [groups, {SCALED_NUMEL}]), [numel])
'''


def _from(name: str, map_: DynamicMap) -> str:
    highest, *lower = map_.decades[::-1]
    fives = [f"    below = tl.where(size < {2.0 ** (n + 1)}, below * 5.0, below)" for n in lower]
    one, denominator = map_.fraction(2**map_.top)[0], map_.fraction(2**highest)[1]
    return "\n".join(
        [
            "@triton.jit",
            f"def from_{name}(code, scale):",
            '    """Bytes as float32 numbers."""',
            "    number = code.to(tl.int32).to(tl.float32) + 1.0",
            "    size = tl.abs(number)",
            f"    power = (size.to(tl.int32, bitcast=True) & {INFINITE_BITS}).to(tl.float32, bitcast=True)",
            f"    below = tl.where(size >= {2.0**map_.top}, {float(one)}, {float(denominator)})",
            *fives,
            f'    below = tl.where(size < {2.0 ** map_.decades[0]}, float("inf"), below)',
            "    fraction = tl.div_rn((size * 18.0 + 9.0) - power * 16.0, below)",
            "    return tl.where(number < 0.0, -fraction, fraction) * scale\n",
        ]
    )


def _to(name: str, dtype: torch.dtype, map_: DynamicMap) -> str:
    decades = []
    for n in map_.decades[:0:-1]:
        decades += [
            f"    below = size <= {map_.edge(n)!r}",
            "    factor = tl.where(below, factor * 5.0, factor)",
            "    shift = tl.where(below, shift * 0.5, shift)",
        ]
    last = 2.0**map_.top - 1
    negative = f"-tl.where(number < {last}, number, {last})" if map_.signed else float(map_.zero)
    return "\n".join(
        [
            "@triton.jit",
            f"def to_{name}(new, scale):",
            '    """The bytes of the values that are nearest to float32 numbers."""',
            "    size = tl.div_rn(tl.abs(new), scale)",
            f"    there = size > {map_.edge(map_.decades[0])!r}",
            "    size = tl.where(there, size, 0.0)",
            f"    factor = tl.full(size.shape, {5.0 * 2**map_.top}, tl.float32)",
            f"    shift = tl.full(size.shape, {2.0 ** (map_.top + 2)}, tl.float32)",
            *decades,
            f"    guess = (tl.fma(size, factor, shift) * {NINTH!r}).to(tl.int32).to(tl.float32)",
            "    above = tl.fma(size, factor, shift - guess * 9.0) > 0.0",
            "    number = tl.where(above, guess, guess - 1.0)",
            "    end = shift * 0.25 - 1.0",
            "    number = tl.where(number < end, number, end)",
            f"    number = tl.where(size > {map_.edge(map_.top)!r}, {2.0**map_.top}, number)",
            f"    number = tl.where(there, number, {float(map_.zero)})",
            f"    number = tl.where(new < 0.0, {negative}, number)",
            f"    return (number - 1.0).to(tl.int32).to(tl.{str(dtype).removeprefix('torch.')})\n",
        ]
    )


@cache
def functions() -> dict[str, str]:
    """All of them, by name."""
    found = {"largest": _SCALES, "spread": _SPREAD}
    for dtype, name in NAMES.items():
        found[f"from_{name}"] = _from(name, MAPS[dtype])
        found[f"to_{name}"] = _to(name, dtype, MAPS[dtype])
    return found
