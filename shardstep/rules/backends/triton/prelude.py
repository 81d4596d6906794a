"""Functions of the generated kernels, as text: what Triton has no word for whose bits are fixed.

``needed`` gives those that a kernel calls, with those that they call. Nothing here runs.
"""

import re
from typing import Final

from shardstep.rules.backends.triton import dynamic8

_FUNCTIONS: Final = {
    "minimum": '''\
@triton.jit
def minimum(a, b):
    """NaN if either is, and never -0.0."""
    return tl.where((a < b) | (a != a), a, b) + 0.0
''',
    "maximum": '''\
@triton.jit
def maximum(a, b):
    """NaN if either is, and never -0.0."""
    return tl.where((a > b) | (a != a), a, b) + 0.0
''',
    "sign": '''\
@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN and for zeros."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)).to(x.dtype)
''',
    "order": '''\
@triton.jit
def order(x):
    """An integer that is ordered as float64 is; NaN comes last."""
    bits = tl.where(x != x, float("nan"), x + 0.0).to(tl.int64, bitcast=True)
    return tl.where(x != x, 0x7FF8000000000000, tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits))
''',
    "from_bfloat16": '''\
@triton.jit
def from_bfloat16(x):
    """As float32, exactly."""
    return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
''',
    "to_bfloat16": '''\
@triton.jit
def to_bfloat16(x):
    """From float32, to nearest even, in integers: the instruction for it flushes denormals, the interpreter cuts."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = tl.where(x != x, 0x7FC0, bits)
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
''',
    "to_float16": '''\
@triton.jit
def to_float16(x):
    """From float32, to nearest even, with one NaN."""
    bits = x.to(tl.float16).to(tl.uint16, bitcast=True)
    bits = tl.where(x != x, 0x7E00, bits)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)
''',
    "to_odd_float32": '''\
@triton.jit
def to_odd_float32(x):
    """From float64, rounded so that rounding the result again is as if rounding once: to odd, if not exact."""
    nearest = x.to(tl.float32)
    bits = nearest.to(tl.uint32, bitcast=True)
    back = nearest.to(tl.float64)
    other_side = tl.where(tl.abs(back) < tl.abs(x), bits + 1, bits - 1)
    bits = tl.where((back != x) & ((bits & 1) == 0), other_side, bits)
    return bits.to(tl.float32, bitcast=True)
''',
    "halves": '''\
@triton.jit
def halves(lanes):
    """The first and the second half of the lanes of each block."""
    rows: tl.constexpr = lanes.shape[0]
    half: tl.constexpr = lanes.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(lanes, [rows, 2, half]), [0, 2, 1]))
''',
    "fold_sum": '''\
@triton.jit
def fold_sum(lanes):
    """The 16 lanes of each block as one: l + (l + 8), then 4, 2 and 1."""
    for _ in tl.static_range(3):
        low, high = halves(lanes)
        lanes = low + high
    low, high = tl.split(lanes)
    return low + high
''',
    "fold_max": '''\
@triton.jit
def fold_max(lanes):
    """The greatest of the 16 lanes of each block; NaN wins."""
    for _ in tl.static_range(3):
        low, high = halves(lanes)
        lanes = maximum(low, high)
    low, high = tl.split(lanes)
    return maximum(low, high)
''',
}


def needed(kernel: str) -> str:
    """The text of the functions that ``kernel`` calls."""
    known = {**_FUNCTIONS, **dynamic8.functions()}
    wanted, texts = set[str](), [kernel]
    while texts:
        # Not after a dot: tl.minimum would be another function.
        calls = set(re.findall(r"(?<![.\w])([a-z]\w*)\(", texts.pop())) & (known.keys() - wanted)
        wanted |= calls
        texts += [known[name] for name in calls]
    return "\n\n".join(text for name, text in known.items() if name in wanted)
