"""What the bits of a phase should be, by numpy and exact fractions: whole arrays, one instruction after another."""

from fractions import Fraction

import numpy as np
import torch

from tests.rules.phases import F16, F32, F64


def exact_fma(x, y, z):
    dtype = np.result_type(x, y, z)
    plain = x * y + z
    result = np.array(np.broadcast_to(plain, np.broadcast_shapes(x.shape, y.shape, z.shape)), dtype)
    for k, (a, b, c, p) in enumerate(zip(*np.broadcast_arrays(x, y, z), result, strict=True)):
        if np.isfinite([a, b, c]).all():
            total = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
            result[k] = rounded(total, dtype) if total else p
    return result


def rounded(number, dtype):
    """A fraction to the nearest float, ties to even."""
    bits, least = (24, -149) if dtype == np.float32 else (53, -1074)
    exponent = max(abs(number).numerator.bit_length() - number.denominator.bit_length() - bits, least)
    if abs(number) / Fraction(2) ** exponent >= 2**bits:
        exponent += 1
    units = round(number / Fraction(2) ** exponent)
    largest = (2**bits - 1) * Fraction(2) ** (104 if bits == 24 else 971)
    value = units * Fraction(2) ** exponent
    return dtype.type(float(value)) if abs(value) <= largest else dtype.type(np.copysign(np.inf, units))


def words(like):
    return np.uint32 if like.dtype.itemsize == 4 else np.uint64


def bfloat16(x):
    """To nearest even, by scaling: exact in float64 for float32 and float64 values."""
    wide = x.astype(np.float64)
    scale = np.maximum(np.frexp(np.where(np.isfinite(wide), wide, 1.0))[1], -125) - 8
    near = np.ldexp(np.rint(np.ldexp(wide, -scale)), scale)
    return np.where(np.abs(near) >= 2.0**128, np.copysign(np.inf, near), near).astype(x.dtype)


NUMPY = {
    "bfloat16": bfloat16,
    "neg": np.negative,
    "abs": np.abs,
    "sign": lambda x: (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype),
    "sqrt": np.sqrt,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "minimum": lambda x, y: np.minimum(x, y) + x.dtype.type(0),
    "maximum": lambda x, y: np.maximum(x, y) + x.dtype.type(0),
    "fma": exact_fma,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "where": np.where,
    "bits": lambda x: x.view(words(x)),
    "from_bits": lambda x: x.view(np.float32 if x.dtype == np.uint32 else np.float64),
    "word_add": np.add,
    "word_sub": np.subtract,
    "word_mul": np.multiply,
    "word_and": np.bitwise_and,
    "word_or": np.bitwise_or,
    "word_xor": np.bitwise_xor,
    "word_shl": lambda x, count: x << x.dtype.type(count),
    "word_shr": lambda x, count: x >> x.dtype.type(count),
}


def narrowed(values, dtype):
    """To a stored dtype by exact arithmetic: the nearer of the two neighbours, the even one of a tie."""
    if dtype in (F32, F64):
        return torch.from_numpy(values).to(dtype)
    least, bits, top = (-24, 11, 65520.0) if dtype == F16 else (-133, 8, (2.0 - 2.0**-8) * 2.0**127)
    wide = values.astype(np.float64)
    _, exponent = np.frexp(wide)
    unit = np.ldexp(1.0, np.maximum(exponent - bits, least).astype(int))
    nearest = np.where(np.abs(wide) >= top, np.copysign(np.inf, wide), np.rint(wide / unit) * unit)
    nearest = np.where(np.isfinite(wide), nearest, wide)
    return torch.from_numpy(nearest).to(F32).to(dtype)  # exact in both steps


def expected(case, binding, arrays, scalars, offset):
    """The arrays after the phase, the low copy, and the partials."""
    real = {F32: np.float32, F64: np.float64}[binding.compute]
    word = {F32: np.uint32, F64: np.uint64}[binding.compute]
    n, values, partials = arrays["param"].numel(), [], []
    with np.errstate(all="ignore"):
        for line in case.body.instructions:
            name = line.attributes[0] if line.attributes else None
            if line.operation == "load":
                value = arrays[name].to(F64).numpy().astype(real)
            elif line.operation == "const":
                value = np.full(1, name, {"real": real, "word": word, "bool": bool}[line.type.kind])
            elif line.operation == "hyper":
                value = np.full(1, scalars[int(name[1:])], np.float64).astype(real)
            elif line.operation == "index":
                value = np.arange(offset, offset + n, dtype=np.uint64).astype(word)
            elif line.operation in ("sum", "max"):
                value = None
                partials.append(block_partials(line.operation, values[line.arguments[0]], offset))
            else:
                value = NUMPY[line.operation](*(values[a] for a in line.arguments), *line.attributes)
            values.append(value)
        stored = dict(binding.stored)
        after = {k: narrowed(np.broadcast_to(values[v], n).copy(), stored[k]) for k, v in case.body.stores}
        new = dict(case.body.stores).get("param")
        low = None if binding.low is None else narrowed(values[new], binding.low)
    return arrays | after, low, partials


def block_partials(operation, values, offset):
    lead = offset % 1024
    blocks = -(-(lead + len(values)) // 1024)
    grid = np.full(blocks * 1024, 0.0 if operation == "sum" else -np.inf)
    grid[lead : lead + len(values)] = values
    grid = grid.reshape(blocks, 64, 16)
    combine = np.add if operation == "sum" else lambda a, b: np.maximum(a, b) + 0.0
    lanes = np.zeros((blocks, 16)) if operation == "sum" else np.full((blocks, 16), -np.inf)
    for row in range(64):
        lanes = combine(lanes, grid[:, row])
    for half in (8, 4, 2, 1):
        lanes = combine(lanes[:, :half], lanes[:, half : 2 * half])
    return lanes[:, 0]


def assert_same(got, want):
    """Bit for bit, except that one NaN is as good as another."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differs = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
    assert not differs.any(), f"{int(differs.sum())} differ, e.g. {got[differs][0]!r} for {want[differs][0]!r}"
