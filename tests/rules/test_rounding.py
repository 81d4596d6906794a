"""Fused multiply-adds and conversions against rational arithmetic, and the stored dtypes in full."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from shardstep.rules.backends.rounding import LOW_NAN, fma32, fma64, read, to_low, widen, write
from tests.rules.exact import FORMATS, rounded, same, special_values

FMA = {torch.float32: fma32, torch.float64: fma64}
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
BITS = {torch.float32: np.uint32, torch.float64: np.uint64}


@pytest.fixture(autouse=True)
def _silence():
    with np.errstate(all="ignore"):
        yield


def any_bits(rng, numel, dtype):
    word = BITS[dtype]
    return rng.integers(0, np.iinfo(word).max, numel, dtype=word, endpoint=True).view(NUMPY[dtype])


def ordinary(rng, numel, dtype):
    return [rng.standard_normal(numel).astype(NUMPY[dtype]) for _ in range(3)]


def cancelling(rng, numel, dtype):
    a, b, noise = ordinary(rng, numel, dtype)
    c = -(a * b)
    return a, b, np.where(rng.random(numel) < 0.5, c, np.nextafter(c, noise))


def denormal(rng, numel, dtype):
    tiny = torch.finfo(dtype).tiny
    a, b, c = (rng.standard_normal(numel) for _ in range(3))
    values = (a * math.sqrt(tiny), b * math.sqrt(tiny), c * tiny * 2.0 ** rng.integers(-30, 3, numel))
    return [value.astype(NUMPY[dtype]) for value in values]


def halfway(rng, numel, dtype):
    """Sums that lie in the middle of two numbers, or next to it: where a second rounding would show."""
    eps = torch.finfo(dtype).eps
    odd = 1 + eps * (2 * rng.integers(0, 2**20, numel) + 1)
    nudge = rng.choice([0.0, 1.0, -1.0], numel) * eps**3
    return [value.astype(NUMPY[dtype]) for value in (1 + nudge / eps**2, np.full(numel, eps / 2), odd)]


def mixed(rng, numel, dtype):
    return [any_bits(rng, numel, dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", list(FMA))
@pytest.mark.parametrize("make", [ordinary, cancelling, denormal, halfway, mixed])
def test_fma_is_rounded_once(make, dtype):
    a, b, c = make(np.random.default_rng(1), 1500, dtype)
    got = FMA[dtype](a, b, c)
    assert got.dtype == NUMPY[dtype]
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        if math.isfinite(x) and math.isfinite(y) and math.isfinite(z):
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            assert result == rounded(exact, dtype), (x, y, z)


@pytest.mark.parametrize("dtype", list(FMA))
def test_fma_of_the_ends_of_the_format_and_their_signs(dtype):
    values = special_values(dtype)
    a, b, c = (grid.reshape(-1) for grid in np.meshgrid(values, values, values))
    got = FMA[dtype](a, b, c)
    plain = a.astype(np.longdouble) * b + c
    for x, y, z, result, sign in zip(*(v.tolist() for v in (a, b, c, got)), plain, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if exact:
            assert same(result, rounded(exact, dtype)), (x, y, z)
        else:
            assert same(result, float(sign)), (x, y, z)


@pytest.mark.parametrize("dtype", list(FMA))
@pytest.mark.parametrize(
    ("a", "b", "c", "want"),
    [
        (math.inf, 1.0, 1.0, math.inf),
        (math.inf, -1.0, 1.0, -math.inf),
        (math.inf, 0.0, 1.0, math.nan),
        (math.inf, 1.0, -math.inf, math.nan),
        (1.0, 1.0, -math.inf, -math.inf),
        (1e38, 1e38, -math.inf, -math.inf),
        (1e308, 1e308, -math.inf, -math.inf),
        (math.nan, 1.0, 1.0, math.nan),
        (1.0, 1.0, math.nan, math.nan),
        (-0.0, 1.0, -0.0, -0.0),
        (-0.0, 1.0, 0.0, 0.0),
    ],
)
def test_fma_of_infinities_and_nan(a, b, c, want, dtype):
    if a == 1e308 and dtype == torch.float32:
        a = b = 1e38
    got = FMA[dtype](*(np.array([value], NUMPY[dtype]) for value in (a, b, c)))
    assert same(float(got[0]), want)


def test_fma_joins_scalars_and_arrays():
    array = np.array([1.0, 2.0, 3.0])
    assert fma64(np.float64(2.0), array, np.float64(1.0)).tolist() == [3.0, 5.0, 7.0]
    assert fma32(*(np.asarray(v, np.float32) for v in (2.0, array, 1.0))).tolist() == [3.0, 5.0, 7.0]
    assert float(fma64(np.float64(1e-200), np.float64(1e-200), np.float64(1e-320))) == 1e-320


def words_of(dtype):
    words = np.arange(2**16, dtype=np.uint16)
    return words[np.isfinite(widen(words, dtype))]


@pytest.mark.parametrize("dtype", list(LOW_NAN))
def test_every_low_number_is_widened_as_torch_does_and_comes_back(dtype):
    words = np.arange(2**16, dtype=np.uint16)
    wide = widen(words, dtype)
    want = torch.from_numpy(words.view(np.int16)).view(dtype).float().numpy()
    assert np.array_equal(wide.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])
    assert np.array_equal(np.isnan(wide), np.isnan(want))
    back = np.where(np.isnan(wide), np.uint16(LOW_NAN[dtype]), words)
    for values in (wide, wide.astype(np.float64)):
        assert np.array_equal(to_low(values, dtype), back)


@pytest.mark.parametrize("source", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", list(LOW_NAN))
def test_between_any_two_low_numbers_the_nearest_even_is_taken(dtype, source):
    words = words_of(dtype)
    words = words[words < 0x8000]
    below = widen(words, dtype).astype(np.float64)
    largest = 2.0 ** (FORMATS[dtype][2] + 1)
    middle = (below + np.append(below[1:], largest)) / 2  # exact; the last one is where infinity begins
    at = middle.astype(source)
    ok = at.astype(np.float64) == middle  # below the denormals of float32 there is no middle
    assert ok.mean() > 0.99
    even = words + (words & 1)
    for sign, bit in ((1, 0), (-1, 0x8000)):
        sides = (np.nextafter(at, source(0)), at, np.nextafter(at, source(np.inf)))
        for values, want in zip(sides, (words, even, words + 1), strict=True):
            assert np.array_equal(to_low(sign * values, dtype)[ok], (want | bit)[ok])


@pytest.mark.parametrize("dtype", list(LOW_NAN))
def test_low_of_any_bits_is_rounded_once(dtype):
    for source in (torch.float32, torch.float64):
        rng = np.random.default_rng(2)
        near = rng.standard_normal(1000) * 2.0 ** rng.integers(-160, 140, 1000)
        values = np.concatenate([any_bits(rng, 500, source), near.astype(NUMPY[source])])
        got = widen(to_low(values, dtype), dtype)
        for value, result in zip(values.tolist(), got.tolist(), strict=True):
            want = rounded(Fraction(value), dtype) if math.isfinite(value) else value
            assert same(result, want) or (value == 0 and result == 0)


@pytest.mark.parametrize("dtype", list(LOW_NAN))
def test_every_nan_becomes_the_quiet_one(dtype):
    nans = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF], np.uint32).view(np.float32)
    assert set(to_low(nans, dtype).tolist()) == {LOW_NAN[dtype]}


@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_tensor_is_read_and_written(dtype, compute):
    tensor = torch.tensor([[1.0, -2.5], [0.1, math.inf]], dtype=dtype)
    values = read(tensor, compute)
    assert values.dtype == NUMPY[compute]
    assert values.tolist() == tensor.to(compute).tolist()
    other = torch.zeros_like(tensor)
    write(values, other)
    assert torch.equal(other, tensor.to(compute).to(dtype))
