"""8-bit states as LLVM's text: bytes to numbers in the body, and the function that makes bytes of 256 new numbers.

No tables: both ways are arithmetic that is exact where it has to be (see `backends.dynamic8`). A decade has one
formula, so what differs between decades is chosen by comparisons, and a value is found, not searched. Nothing is added
to integers: LLVM makes the vector of ones for that by an instruction that waits for the turn before.
"""

from collections.abc import Iterable

import torch

from shardstep.rules.backends.dynamic8 import INFINITE_BITS, MAPS, NAN_BITS, NINTH, DynamicMap
from shardstep.rules.backends.llvm.code import Code, real_literal
from shardstep.types import SCALED_NUMEL


def decoded(code: Code, stored: torch.dtype, value: str, scale: str) -> str:
    """Bytes as they were in memory, in float32; ``scale`` holds that of each."""
    map_, real, word = MAPS[stored], code.type("float"), code.type("i32")
    extend = "sext" if map_.signed else "zext"
    wide = code.let(f"{extend} {code.type('i8')} {value} to {word}")
    number = _add(code, code.let(f"sitofp {word} {wide} to {real}"), _real(code, 1.0))
    size = _abs(code, number) if map_.signed else number
    bits = code.let(f"and {word} {code.let(f'bitcast {real} {size} to {word}')}, {_word(code, INFINITE_BITS)}")
    power = code.let(f"bitcast {word} {bits} to {real}")
    linear = _add(code, _mul(code, size, _real(code, 18.0)), _real(code, 9.0))
    numerator = code.let(f"fsub {real} {linear}, {_mul(code, power, _real(code, 16.0))}")
    fraction = code.let(f"fdiv {real} {numerator}, {_denominator(code, map_, size)}")
    if map_.signed:
        negative = code.let(f"fcmp olt {real} {number}, {_real(code, 0.0)}")
        fraction = code.where(negative, real, code.let(f"fneg {real} {fraction}"), fraction)
    return _mul(code, fraction, scale)


def _denominator(code: Code, map_: DynamicMap, size: str) -> str:
    """Of each decade, from the highest down; that of 0 is infinite, and that of 1 is the numerator that it has here."""
    real, (highest, *lower) = code.type("float"), map_.decades[::-1]
    is_one = code.let(f"fcmp oge {real} {size}, {_real(code, 2.0**map_.top)}")
    one, below_one = map_.fraction(2**map_.top)[0], map_.fraction(2**highest)[1]
    found = code.where(is_one, real, _real(code, one), _real(code, below_one))
    for n in lower:
        below = code.let(f"fcmp olt {real} {size}, {_real(code, 2.0 ** (n + 1))}")
        found = code.where(below, real, _mul(code, found, _real(code, 5.0)), found)
    is_zero = code.let(f"fcmp olt {real} {size}, {_real(code, 2.0 ** map_.decades[0])}")
    return code.where(is_zero, real, _real(code, float("inf")), found)


def encoders(stored: Iterable[torch.dtype], width: int) -> list[str]:
    """What `call_of_encoder` calls."""
    functions = [_encoder(dtype, width) for dtype in dict.fromkeys(stored)]
    return [f"declare i32 @llvm.vector.reduce.umax.v{width}i32(<{width} x i32>)\n", *functions] if functions else []


def _encoder(stored: torch.dtype, width: int) -> str:
    """The function ``@encode.*(new, codes, scale, count)``: up to 256 float32 numbers to their bytes and scale.

    What is in ``new`` behind the first ``count`` is overwritten.
    """
    vector, scalar = Code(width, "v"), Code(1, "s")
    largest = _largest(Code(width, "m"))
    _encode(vector, stored, "%j")
    _encode(scalar, stored, "%i")
    words = f"<{width} x i32>"
    return f"""define internal void @encode.{_name(stored)}(ptr %new, ptr %codes, ptr %at, i64 %count) noinline #0 {{
entry:
  br label %fill.test
fill.test:
  %f = phi i64 [%count, %entry], [%f.next, %fill]
  %filled = icmp uge i64 %f, {SCALED_NUMEL}
  br i1 %filled, label %all, label %fill
fill:
  %rest = getelementptr float, ptr %new, i64 %f
  store float 0.0, ptr %rest
  %f.next = add i64 %f, 1
  br label %fill.test
all:
{largest}
  %largest = call i32 @llvm.vector.reduce.umax.v{width}i32({words} %m)
  %finite = icmp ult i32 %largest, {INFINITE_BITS}
  %scale.bits = select i1 %finite, i32 %largest, i32 {NAN_BITS}
  %scale = bitcast i32 %scale.bits to float
  store float %scale, ptr %at
  br label %vector.test
vector.test:
  %j = phi i64 [0, %all], [%j.next, %vector]
  %j.next = add i64 %j, {width}
  %fits = icmp ule i64 %j.next, %count
  br i1 %fits, label %vector, label %scalar.test
vector:
{_text(vector)}
  br label %vector.test
scalar.test:
  %i = phi i64 [%j, %vector.test], [%i.next, %scalar]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %scalar, label %exit
scalar:
{_text(scalar)}
  %i.next = add i64 %i, 1
  br label %scalar.test
exit:
  ret void
}}
"""


def call_of_encoder(stored: torch.dtype, new: str, codes: str, scale: str, count: str) -> str:
    """What runs it."""
    return f"call void @encode.{_name(stored)}(ptr {new}, ptr {codes}, ptr {scale}, i64 {count})"


def _name(stored: torch.dtype) -> str:
    return "signed" if MAPS[stored].signed else "unsigned"


def _largest(code: Code) -> str:
    """%m: in each lane the greatest bits of a magnitude. They count it, and those of NaN are above all others."""
    word, held = code.type("i32"), "zeroinitializer"
    for start in range(0, SCALED_NUMEL, code.width):
        address = code.let(f"getelementptr i32, ptr %new, i64 {start}")
        bits = code.let(f"and {word} {code.let(f'load {word}, ptr {address}, align 4')}, {_word(code, 0x7FFFFFFF)}")
        held = code.where(code.let(f"icmp ugt {word} {bits}, {held}"), word, bits, held)
    code.line(f"%m = or {word} {held}, zeroinitializer")
    return _text(code)


def _encode(code: Code, stored: torch.dtype, index: str) -> None:
    """Numbers from %new, by %scale, to bytes in %codes."""
    map_, real, word = MAPS[stored], code.type("float"), code.type("i32")
    value = code.let(f"load {real}, ptr {code.let(f'getelementptr float, ptr %new, i64 {index}')}, align 4")
    scale = code.splat("float", "%scale")
    size = code.let(f"fdiv {real} {_abs(code, value)}, {scale}")
    number = _number(code, map_, size)
    negative = code.let(f"fcmp olt {real} {value}, {_real(code, 0.0)}")
    if map_.signed:
        # -1 is not among the values: the next one is.
        last = _real(code, 2.0**map_.top - 1)
        opposite = code.where(code.let(f"fcmp olt {real} {number}, {last}"), real, number, last)
        number = code.where(negative, real, code.let(f"fneg {real} {opposite}"), number)
    else:
        number = code.where(negative, real, _real(code, map_.zero), number)
    wide = code.let(f"fptosi {real} {_add(code, number, _real(code, -1.0))} to {word}")
    narrow = code.let(f"trunc {word} {wide} to {code.type('i8')}")
    address = code.let(f"getelementptr i8, ptr %codes, i64 {index}")
    code.line(f"store {code.type('i8')} {narrow}, ptr {address}, align 1")


def _number(code: Code, map_: DynamicMap, size: str) -> str:
    """The number of the value nearest to ``size`` between 0 and 1; that of 0 for NaN.

    In a decade, the halves between values are where q = size * 2^top 5^(top-n) is 9 m - 2^(n+3) for a whole m. A guess
    of m, which is right or 1 too high, is held against that by an fma, whose sign is exact.
    """
    real, zero = code.type("float"), _real(code, 0.0)
    there = code.let(f"fcmp ogt {real} {size}, {_real(code, map_.edge(map_.decades[0]))}")
    size = code.where(there, real, size, zero)
    factor, shift = _real(code, 5.0 * 2**map_.top), _real(code, 2.0 ** (map_.top + 2))
    for n in map_.decades[:0:-1]:
        below = code.let(f"fcmp ole {real} {size}, {_real(code, map_.edge(n))}")
        factor = code.where(below, real, _mul(code, factor, _real(code, 5.0)), factor)
        shift = code.where(below, real, _mul(code, shift, _real(code, 0.5)), shift)
    place = _fma(code, size, factor, shift)
    guess = code.let(f"fptosi {real} {_mul(code, place, _real(code, NINTH))} to {code.type('i32')}")
    guess = code.let(f"sitofp {code.type('i32')} {guess} to {real}")
    half = _add(code, shift, _mul(code, guess, _real(code, -9.0)))
    above = code.let(f"fcmp ogt {real} {_fma(code, size, factor, half)}, {zero}")
    number = code.where(above, real, guess, _add(code, guess, _real(code, -1.0)))
    # Up to the edge of the next decade it is the last number of this one.
    last = _add(code, _mul(code, shift, _real(code, 0.25)), _real(code, -1.0))
    number = code.where(code.let(f"fcmp olt {real} {number}, {last}"), real, number, last)
    is_one = code.let(f"fcmp ogt {real} {size}, {_real(code, map_.edge(map_.top))}")
    number = code.where(is_one, real, _real(code, 2.0**map_.top), number)
    return code.where(there, real, number, _real(code, map_.zero))


def _text(code: Code) -> str:
    return "\n".join(code.lines)


def _real(code: Code, value: float) -> str:
    return code.constant("float", real_literal(value, torch.float32))


def _word(code: Code, value: int) -> str:
    return code.constant("i32", value)


def _abs(code: Code, value: str) -> str:
    return code.let(f"call {code.type('float')} @llvm.fabs.{code.suffix('float')}({code.type('float')} {value})")


def _add(code: Code, a: str, b: str) -> str:
    return code.let(f"fadd {code.type('float')} {a}, {b}")


def _mul(code: Code, a: str, b: str) -> str:
    return code.let(f"fmul {code.type('float')} {a}, {b}")


def _fma(code: Code, a: str, b: str, c: str) -> str:
    real = code.type("float")
    return code.let(f"call {real} @llvm.fma.{code.suffix('float')}({real} {a}, {real} {b}, {real} {c})")
