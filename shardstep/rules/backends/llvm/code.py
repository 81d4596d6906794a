"""Straight lines of LLVM's text that mean the same at every width: the operations on elements.

Nothing here knows of loops, memory, or what arrays are stored in.
"""

import math
import struct
from typing import Final

import torch

from shardstep.rules.ir import Attribute

REAL: Final = {torch.float32: "float", torch.float64: "double"}
WORD: Final = {torch.float32: "i32", torch.float64: "i64"}

_SUFFIX: Final = {"float": "f32", "double": "f64"}

INSTRUCTIONS: Final = {
    "add": "fadd {r} {0}, {1}",
    "sub": "fsub {r} {0}, {1}",
    "mul": "fmul {r} {0}, {1}",
    "div": "fdiv {r} {0}, {1}",
    "neg": "fneg {r} {0}",
    "abs": "call {r} @llvm.fabs.{s}({r} {0})",
    "sqrt": "call {r} @llvm.sqrt.{s}({r} {0})",
    "fma": "call {r} @llvm.fma.{s}({r} {0}, {r} {1}, {r} {2})",
    "lt": "fcmp olt {r} {0}, {1}",
    "le": "fcmp ole {r} {0}, {1}",
    "gt": "fcmp ogt {r} {0}, {1}",
    "ge": "fcmp oge {r} {0}, {1}",
    "eq": "fcmp oeq {r} {0}, {1}",
    "ne": "fcmp une {r} {0}, {1}",
    "and": "and {b} {0}, {1}",
    "or": "or {b} {0}, {1}",
    "where": "select {b} {0}, {r} {1}, {r} {2}",
    "bits": "bitcast {r} {0} to {w}",
    "from_bits": "bitcast {w} {0} to {r}",
    "word_add": "add {w} {0}, {1}",
    "word_sub": "sub {w} {0}, {1}",
    "word_mul": "mul {w} {0}, {1}",
    "word_and": "and {w} {0}, {1}",
    "word_or": "or {w} {0}, {1}",
    "word_xor": "xor {w} {0}, {1}",
    "word_shl": "shl {w} {0}, {n}",
    "word_shr": "lshr {w} {0}, {n}",
}
"""Operations that are one instruction: r, w and b are the types of the three kinds, n is a number of bits."""


def can_write(operation: str) -> bool:
    """Whether `Code.operation` knows it."""
    return operation in INSTRUCTIONS or operation in ("minimum", "maximum", "sign", "not")


class Code:
    """Instructions for ``width`` elements at once. Names begin with ``prefix``, so that two bodies fit a function."""

    def __init__(self, width: int, prefix: str) -> None:
        self.width = width
        self.lines: list[str] = []
        self._prefix = prefix

    def type(self, scalar: str) -> str:
        return scalar if self.width == 1 else f"<{self.width} x {scalar}>"

    def suffix(self, scalar: str) -> str:
        """The part of an intrinsic's name that says its type."""
        return _SUFFIX[scalar] if self.width == 1 else f"v{self.width}{_SUFFIX[scalar]}"

    def constant(self, scalar: str, literal: int | str) -> str:
        return str(literal) if self.width == 1 else f"splat ({scalar} {literal})"

    def line(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def let(self, text: str) -> str:
        """An instruction with a result; its name."""
        name = f"%{self._prefix}{len(self.lines)}"
        self.line(f"{name} = {text}")
        return name

    def splat(self, scalar: str, name: str) -> str:
        """A number held by the function, for every element."""
        if self.width == 1:
            return name
        first = self.let(f"insertelement {self.type(scalar)} poison, {scalar} {name}, i64 0")
        zeros = f"<{self.width} x i32> zeroinitializer"
        return self.let(f"shufflevector {self.type(scalar)} {first}, {self.type(scalar)} poison, {zeros}")

    def operation(self, name: str, compute: torch.dtype, arguments: list[str], *attributes: Attribute) -> str:
        """One operation of the intermediate form. Words shifted by all their bits or more are 0."""
        real, word, boolean = self.type(REAL[compute]), self.type(WORD[compute]), self.type("i1")
        if name in ("minimum", "maximum"):
            return self._extreme("olt" if name == "minimum" else "ogt", REAL[compute], *arguments)
        if name == "sign":
            return self._sign(REAL[compute], arguments[0])
        if name == "not":
            return self.let(f"xor {boolean} {arguments[0]}, {self.constant('i1', 'true')}")
        bits = int(attributes[0]) if attributes else 0
        if bits >= 8 * compute.itemsize:
            return self.constant(WORD[compute], 0)
        shift, suffix = self.constant(WORD[compute], bits), self.suffix(REAL[compute])
        return self.let(INSTRUCTIONS[name].format(*arguments, r=real, w=word, b=boolean, n=shift, s=suffix))

    def _extreme(self, comparison: str, scalar: str, a: str, b: str) -> str:
        """The smaller or the larger: b if that is NaN, a if that is; and no zero but +0."""
        real = self.type(scalar)
        chosen = self.where(self.let(f"fcmp {comparison} {real} {a}, {b}"), real, a, b)
        chosen = self.where(self.let(f"fcmp uno {real} {a}, {a}"), real, a, chosen)
        return self.let(f"fadd {real} {chosen}, {self.constant(scalar, '0.0')}")

    def _sign(self, scalar: str, x: str) -> str:
        real, zero = self.type(scalar), self.constant(scalar, "0.0")
        negative, positive = self.let(f"fcmp olt {real} {x}, {zero}"), self.let(f"fcmp ogt {real} {x}, {zero}")
        below = self.where(negative, real, self.constant(scalar, "-1.0"), zero)
        return self.where(positive, real, self.constant(scalar, "1.0"), below)

    def where(self, condition: str, type_: str, a: str, b: str) -> str:
        return self.let(f"select {self.type('i1')} {condition}, {type_} {a}, {type_} {b}")


def real_literal(value: float, compute: torch.dtype) -> str:
    """A number rounded once, in integers: the state of this thread may flush denormals."""
    return hexadecimal(_rounded_to_float32(value) if compute == torch.float32 else value)


def _rounded_to_float32(value: float) -> float:
    if value == 0.0 or not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1], -125)
    rounded = math.ldexp(round(math.ldexp(value, 24 - exponent)), exponent - 24)
    return math.copysign(math.inf, value) if abs(rounded) >= 2.0**128 else math.copysign(rounded, value)


def hexadecimal(value: float) -> str:
    """As LLVM writes both float and double: the bits of the double."""
    return "0x7FF8000000000000" if math.isnan(value) else f"0x{struct.pack('>d', value).hex()}"
