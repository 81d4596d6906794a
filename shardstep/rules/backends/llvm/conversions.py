"""Conversions between what arrays are stored in and what is computed in, as LLVM's text.

They are integer arithmetic: the instructions that machines have for them flush denormals, or are missing.
"""

from typing import Final

import torch

from shardstep.rules.backends.llvm.code import Code, hexadecimal

STORED: Final = {
    torch.float32: "float",
    torch.float64: "double",
    **dict.fromkeys((torch.bfloat16, torch.float16), "i16"),
    **dict.fromkeys((torch.int8, torch.uint8), "i8"),
}
"""What a dtype is in memory."""


def from_memory(code: Code, value: str, stored: torch.dtype, compute: torch.dtype) -> str:
    """A value as it was in memory, in the compute dtype: exact, unless float64 must become float32."""
    if stored == compute:
        return value
    if stored == torch.float64:
        return code.let(f"fptrunc {code.type('double')} {value} to {code.type('float')}")
    if stored != torch.float32:
        wide = code.let(f"zext {code.type('i16')} {value} to {code.type('i32')}")
        value = _from_bfloat16(code, wide) if stored == torch.bfloat16 else _from_float16(code, wide)
    if compute == torch.float32:
        return value
    return code.let(f"fpext {code.type('float')} {value} to {code.type('double')}")


def _from_bfloat16(code: Code, wide: str) -> str:
    shifted = code.let(f"shl {code.type('i32')} {wide}, {code.constant('i32', 16)}")
    return code.let(f"bitcast {code.type('i32')} {shifted} to {code.type('float')}")


def _from_float16(code: Code, wide: str) -> str:
    """Its exponent and mantissa, moved into place, are a float32 that is 2^112 times too small."""
    word, real = code.type("i32"), code.type("float")
    body = _masked(code, wide, 0x7FFF)
    moved = code.let(f"shl {word} {body}, {code.constant('i32', 13)}")
    small = code.let(f"bitcast {word} {moved} to {real}")
    scaled = code.let(f"fmul {real} {small}, {code.constant('float', hexadecimal(2.0**112))}")
    finite = code.let(f"bitcast {real} {scaled} to {word}")
    special = code.let(f"or {word} {moved}, {code.constant('i32', 0x7F800000)}")
    is_special = code.let(f"icmp uge {word} {body}, {code.constant('i32', 0x7C00)}")
    bits = code.where(is_special, word, special, finite)
    sign = code.let(f"shl {word} {_masked(code, wide, 0x8000)}, {code.constant('i32', 16)}")
    return code.let(f"bitcast {word} {code.let(f'or {word} {bits}, {sign}')} to {real}")


def _masked(code: Code, word: str, mask: int) -> str:
    return code.let(f"and {code.type('i32')} {word}, {code.constant('i32', mask)}")


def to_memory(code: Code, value: str, stored: torch.dtype, compute: torch.dtype) -> str:
    """A value of the compute dtype as it goes to memory, in that dtype or a 16-bit one: rounded once, to even."""
    if stored == compute:
        return value
    if compute == torch.float64:
        value = _to_odd_float32(code, value)
    bits = code.let(f"bitcast {code.type('float')} {value} to {code.type('i32')}")
    rounded = _to_bfloat16(code, value, bits) if stored == torch.bfloat16 else _to_float16(code, bits)
    return code.let(f"trunc {code.type('i32')} {rounded} to {code.type('i16')}")


def _to_odd_float32(code: Code, value: str) -> str:
    """Of the two neighbours of an inexact value the one whose last bit is odd.

    Rounding that again, to fewer bits, rounds as if once.
    """
    double, real, word = code.type("double"), code.type("float"), code.type("i32")
    nearest = code.let(f"fptrunc {double} {value} to {real}")
    back = code.let(f"fpext {real} {nearest} to {double}")
    size = code.let(f"call {double} @llvm.fabs.{code.suffix('double')}({double} {value})")
    back_size = code.let(f"call {double} @llvm.fabs.{code.suffix('double')}({double} {back})")
    too_small = code.let(f"fcmp olt {double} {back_size}, {size}")
    too_large = code.let(f"fcmp ogt {double} {back_size}, {size}")
    bits = code.let(f"bitcast {real} {nearest} to {word}")
    zero = code.constant("i32", 0)
    step = code.where(too_large, word, code.constant("i32", -1), zero)
    step = code.where(too_small, word, code.constant("i32", 1), step)
    is_odd = code.let(f"icmp ne {word} {_masked(code, bits, 1)}, {zero}")
    odd = code.let(f"add {word} {bits}, {code.where(is_odd, word, zero, step)}")
    return code.let(f"bitcast {word} {odd} to {real}")


def _to_bfloat16(code: Code, value: str, bits: str) -> str:
    real, word = code.type("float"), code.type("i32")
    rounded = _shifted_right(code, bits, 16, 0x7FFF)
    is_nan = code.let(f"fcmp uno {real} {value}, {value}")
    return code.where(is_nan, word, code.constant("i32", 0x7FC0), rounded)


def _shifted_right(code: Code, bits: str, count: int, below_half: int) -> str:
    """Rounded to nearest even by adding one less than half a unit, and one more if the unit is odd."""
    word = code.type("i32")
    unit = _masked(code, code.let(f"lshr {word} {bits}, {code.constant('i32', count)}"), 1)
    sum_ = code.let(f"add {word} {code.let(f'add {word} {bits}, {unit}')}, {code.constant('i32', below_half)}")
    return code.let(f"lshr {word} {sum_}, {code.constant('i32', count)}")


def _to_float16(code: Code, bits: str) -> str:
    word, real = code.type("i32"), code.type("float")
    size = _masked(code, bits, 0x7FFFFFFF)
    normal = _shifted_right(code, size, 13, 0x0FFF - (112 << 23))
    # A unit in the last place of 0.5 is one of float16's denormals: the sum rounds for us.
    raised = code.let(f"fadd {real} {code.let(f'bitcast {word} {size} to {real}')}, {code.constant('float', '0.5')}")
    raised = code.let(f"bitcast {real} {raised} to {word}")
    denormal = code.let(f"sub {word} {raised}, {code.constant('i32', 0x3F000000)}")
    result = code.where(_at_least(code, size, 0x38800000), word, normal, denormal)
    result = code.where(_at_least(code, size, 0x47800000), word, code.constant("i32", 0x7C00), result)
    result = code.where(_at_least(code, size, 0x7F800001), word, code.constant("i32", 0x7E00), result)
    sign = _masked(code, code.let(f"lshr {word} {bits}, {code.constant('i32', 16)}"), 0x8000)
    return code.let(f"or {word} {result}, {sign}")


def _at_least(code: Code, word: str, bound: int) -> str:
    return code.let(f"icmp uge {code.type('i32')} {word}, {code.constant('i32', bound)}")
