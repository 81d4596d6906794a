"""exp, log, tanh, rsqrt and pow of elements, in basic operations: so they have the same bits on every back end.

    %1 = rsqrt %0 : real element    →    %1 = const 1.0 : real uniform
                                         %2 = sqrt %0 : real element
                                         %3 = div %1 %2 : real element

Uniform and tensor values keep these operations: the host computes them. The largest errors found, in units in the
last place, of float32 (30 million arguments over all exponents) and of float64 (180,000, against 40 digits):

    exp    0.78 and 0.79, where the result is denormal; 0.75 elsewhere
    log    0.83 and 0.80
    tanh   1.71 and 1.75
    rsqrt  1.5: two roundings
    pow    2 |y| + 1.6 for y = exponent · log(base): up to 150 at the ends of the range of float32

Special values are those of IEEE-754. A power of a negative base is NaN unless the exponent is an integer, of
magnitude below 2^51 (2^22 if it is itself an element of float32); one with an infinite exponent of ±1 is NaN.
"""

import math
from collections.abc import Callable
from typing import Final

import torch

from shardstep.rules import ir
from shardstep.rules.passes.polynomials import FORMATS, Format
from shardstep.rules.passes.rewrite import rewrite


def expand(program: ir.Program, compute: torch.dtype) -> ir.Program:
    """The program without these operations on anything but uniform and tensor values."""

    def change(build: ir.Builder, line: ir.Instruction, arguments: tuple[int, ...]) -> int | None:
        if line.operation not in ELEMENTARY or line.type.is_single:
            return None
        return ELEMENTARY[line.operation](_Writer(build, FORMATS[compute], line.place), *arguments)

    return rewrite(program, change)


class _Writer:
    """Writes instructions for one place of the source, in one compute dtype."""

    def __init__(self, build: ir.Builder, form: Format, place: ir.Place | None) -> None:
        self.form = form
        self._build, self._place = build, place

    def __call__(self, operation: str, *arguments: int) -> int:
        return self._build.emit(operation, *arguments, place=self._place)

    def shift(self, operation: str, value: int, bits: int) -> int:
        return self._build.emit(operation, value, attributes=(bits,), place=self._place)

    def real(self, value: float) -> int:
        return self._build.constant(value, place=self._place)

    def word(self, value: int) -> int:
        return self._build.constant(value, "word", place=self._place)

    def is_host(self, value: int) -> bool:
        return self._build.type_of(value).is_single


def _sum_of_falling(write: _Writer, a: int, b: int, c: int) -> int:
    """a + b + c almost rounded once, if |a| is larger than |b| or 0, and c smaller: the error of a + b is kept."""
    total = write("add", a, b)
    error = write("add", write("sub", a, total), b)
    return write("add", total, write("add", error, c))


def _polynomial(write: _Writer, x: int, coefficients: tuple[float, ...]) -> int:
    value = write.real(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = write("fma", value, x, write.real(coefficient))
    return value


def _reduced_exponential(write: _Writer, x: int) -> tuple[int, int, int]:
    """(n, r, t) with exp(x) = 2ⁿ (1 + r + t), |r| < 0.35 and t much smaller: n as a word, the others real."""
    form = write.form
    magic = write.real(form.magic)
    shifted = write("fma", x, write.real(form.inverse_ln2), magic)
    whole = write("sub", shifted, magic)
    rest = write("fma", whole, write.real(-form.ln2_high), x)
    rest = write("fma", whole, write.real(-form.ln2_low), rest)
    tail = write("mul", write("mul", rest, rest), _polynomial(write, rest, form.exponential))
    return write("word_sub", write("bits", shifted), write.word(form.magic_word)), rest, tail


def _exp(write: _Writer, x: int) -> int:
    """2ⁿ in two factors, so that a result below the normal numbers is rounded once, and one above is infinite."""
    form = write.form
    x = write("minimum", write("maximum", x, write.real(form.lowest)), write.real(form.highest))
    power, rest, tail = _reduced_exponential(write, x)
    result = _sum_of_falling(write, write.real(1.0), rest, tail)
    # The half of n, rounded down: a word has no sign, so both halves are counted from the bias.
    half = write.shift("word_shr", write("word_add", power, write.word(2 * form.bias)), 1)
    other = write("word_sub", write("word_add", power, write.word(2 * form.bias)), half)
    for biased in (half, other):
        result = write("mul", result, write("from_bits", write.shift("word_shl", biased, form.mantissa)))
    return result


def _log(write: _Writer, x: int) -> int:
    """x = 2ᵏ m with m around 1; log(m) = f - (f²/2 - s (f²/2 + s² P(s²))), f = m - 1, s = f / (2 + f)."""
    k, f = _split(write, x)
    form = write.form
    s = write("div", f, write("add", f, write.real(2.0)))
    square = write("mul", s, s)
    half = write("mul", write("mul", f, f), write.real(0.5))
    tail = write("fma", square, _polynomial(write, square, form.logarithm), half)
    tail = write("fma", s, tail, write("mul", k, write.real(form.ln2_low)))
    # k · ln2_high is exact, and larger than f or 0.
    result = _sum_of_falling(write, write("mul", k, write.real(form.ln2_high)), f, write("sub", tail, half))
    return _log_of_special_values(write, x, result)


def _split(write: _Writer, x: int) -> tuple[int, int]:
    """(k, m - 1), both real, with x = 2ᵏ m and m between the roots of ½ and 2."""
    form = write.form
    scale = form.mantissa + 2
    small = write("lt", x, write.real(2.0 ** (1 - form.bias)))
    bits = write("bits", write("where", small, write("mul", x, write.real(2.0**scale)), x))
    # Counted from the root of ½ the exponents change where m does; bias + 1 more keeps the word from going below 0.
    above = write("word_add", bits, write.word(((form.bias + 1) << form.mantissa) - form.root_half))
    power = write.shift("word_shr", above, form.mantissa)
    power = write("word_sub", power, write.word(form.bias + 1))
    m = write("from_bits", write("word_sub", bits, write.shift("word_shl", power, form.mantissa)))
    k = write("from_bits", write("word_add", power, write.word(form.magic_word)))
    k = write("sub", k, write("where", small, write.real(form.magic + scale), write.real(form.magic)))
    return k, write("sub", m, write.real(1.0))


def _log_of_special_values(write: _Writer, x: int, result: int) -> int:
    infinity, zero = write.real(math.inf), write.real(0.0)
    finite = write("where", write("lt", x, infinity), result, x)
    nan = write("fma", x, infinity, infinity)  # for all x below 0
    other = write("where", write("eq", x, zero), write.real(-math.inf), nan)
    return write("where", write("gt", x, zero), finite, other)


def _tanh(write: _Writer, x: int) -> int:
    """u / (2 + u) for u = exp(-2 |x|) - 1, which is precise around 0; then the sign of x."""
    form = write.form
    a = write("minimum", write("abs", x), write.real(form.tanh_is_one))
    power, rest, tail = _reduced_exponential(write, write("mul", a, write.real(-2.0)))
    scale = write("from_bits", write.shift("word_shl", write("word_add", power, write.word(form.bias)), form.mantissa))
    whole = write("sub", scale, write.real(1.0))
    u = _sum_of_falling(write, whole, write("mul", scale, rest), write("mul", scale, tail))
    size = write("abs", _quotient_with_two_added(write, u))
    return write("from_bits", write("word_or", write("bits", size), _sign_bit(write, x)))


def _quotient_with_two_added(write: _Writer, u: int) -> int:
    """u / (2 + u) for -1 ≤ u ≤ 0, with the rounding of 2 + u put right."""
    two = write.real(2.0)
    below = write("add", two, u)
    error = write("add", write("sub", two, below), u)
    first = write("div", u, below)
    minus = write("neg", first)
    missing = write("fma", minus, error, write("fma", minus, below, u))
    return write("add", first, write("div", missing, below))


def _sign_bit(write: _Writer, x: int) -> int:
    return write(
        "word_and", write("bits", x), write.word(1 << (write.form.bias.bit_length() + write.form.mantissa + 1))
    )


def _rsqrt(write: _Writer, x: int) -> int:
    return write("div", write.real(1.0), write("sqrt", x))


def _pow(write: _Writer, base: int, exponent: int) -> int:
    """exp(e log |b|), and by what the exponent is: its sign, whether there is any, and that x ** 0 is 1."""
    zero, one, infinity = write.real(0.0), write.real(1.0), write.real(math.inf)
    if write.is_host(base):  # by adding +0 it becomes an element: the host would refuse log(0), which is fine here
        base = write("add", base, write("minimum", write("abs", exponent), zero))
    integral, odd = _is_integral_and_odd(write, exponent)
    size = write("abs", base)
    result = _exp(write, write("mul", exponent, _log(write, size)))
    sign = write("from_bits", write("word_or", _sign_bit(write, base), write.word(write.form.word_of_power(0))))
    result = write("mul", result, write("where", odd, sign, one))
    negative = write("and", write("lt", base, zero), write("lt", size, infinity))
    nan = write("fma", base, infinity, infinity)  # for all bases below 0
    result = write("where", write("and", negative, write("not", integral)), nan, result)
    return write("where", write("eq", exponent, zero), one, result)


def _is_integral_and_odd(write: _Writer, x: int) -> tuple[int, int]:
    # Those of a uniform exponent are uniform: the host finds out, once a step, in float64.
    magic = write.real(FORMATS[torch.float64].magic if write.is_host(x) else write.form.magic)

    def is_integral(value: int) -> int:
        return write("eq", write("sub", write("add", value, magic), magic), value)

    integral = is_integral(x)
    even = is_integral(write("mul", x, write.real(0.5)))
    return integral, write("and", integral, write("not", even))


ELEMENTARY: Final[dict[str, Callable[..., int]]] = {
    "exp": _exp,
    "log": _log,
    "tanh": _tanh,
    "rsqrt": _rsqrt,
    "pow": _pow,
}
"""The operations that are replaced: each given a writer and its arguments, and giving the number of the result."""
