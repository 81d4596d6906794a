"""The Triton expression of each operation of the intermediate form, and of loads and stores.

Only expressions that IEEE 754 fixes are written: never ``/`` on float32 (it is not correctly rounded), never
``tl.minimum`` (its zeros and NaNs differ between types), never a function of libdevice.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch

from shardstep.errors import RuleError
from shardstep.rules.backends.triton import dynamic8
from shardstep.rules.binding import scale_name
from shardstep.rules.ir import Instruction
from shardstep.types import BLOCK_NUMEL as BLOCK
from shardstep.types import SCALED_NUMEL

NAMES: Final = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
}
WORDS: Final = {torch.float64: "tl.uint64", torch.float32: "tl.uint32"}
_SCALE_SHIFT: Final = SCALED_NUMEL.bit_length() - 1
_BITS: Final = {torch.float64: 64, torch.float32: 32}

_EXPRESSIONS: Final = {
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "sign": "sign({0})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "minimum": "minimum({0}, {1})",
    "maximum": "maximum({0}, {1})",
    "fma": "tl.fma({0}, {1}, {2})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "~{0}",
    "where": "tl.where({0}, {1}, {2})",
    "word_add": "{0} + {1}",
    "word_sub": "{0} - {1}",
    "word_mul": "{0} * {1}",
    "word_and": "{0} & {1}",
    "word_or": "{0} | {1}",
    "word_xor": "{0} ^ {1}",
    "word_shl": "{0} << {count}",
    "word_shr": "{0} >> {count}",
    "bits": "{0}.to({word}, bitcast=True)",
    "from_bits": "{0}.to({real}, bitcast=True)",
}
# On float64, which has no other, the plain words are correctly rounded and Triton refuses the words that say so.
_ROUNDED: Final = {
    torch.float32: {
        "sqrt": "tl.sqrt_rn({0})",
        "div": "tl.div_rn({0}, {1})",
        "bfloat16": "from_bfloat16(to_bfloat16({0}))",
    },
    torch.float64: {
        "sqrt": "tl.sqrt({0})",
        "div": "{0} / {1}",
        "bfloat16": "from_bfloat16(to_bfloat16(to_odd_float32({0}))).to(tl.float64)",
    },
}


def pointwise(line: Instruction, operands: Sequence[str], compute: torch.dtype) -> str:
    """``line`` on the names of its operands. Raises RuleError for an operation that no kernel has."""
    expression = _EXPRESSIONS.get(line.operation) or _ROUNDED[compute].get(line.operation)
    if expression is None:
        where = f" (line {line.place.line} of the rule)" if line.place else ""
        raise RuleError(
            f"expected operations on elements in a phase, got {line.operation!r}{where}, which a Triton kernel does "
            "not have; run the passes that lower or split it first"
        )
    count = line.attributes[0] if line.attributes else ""
    if isinstance(count, int) and not 0 <= count < _BITS[compute]:
        raise RuleError(f"expected a shift by 0 to {_BITS[compute] - 1} places, got {line.operation} by {count}")
    return expression.format(*operands, count=count, word=WORDS[compute], real=NAMES[compute])


def constant(line: Instruction, shape: str, compute: torch.dtype) -> str:
    """A number, a truth value or a word for every element; a number is rounded once."""
    value = line.attributes[0]
    if line.type.kind == "bool":
        return f"tl.full({shape}, {int(bool(value))}, tl.int1)"
    if line.type.kind == "word":
        return f"tl.full({shape}, {int(value) % 2 ** _BITS[compute]}, {WORDS[compute]})"
    return f"tl.full({shape}, {_number(float(value), compute)}, {NAMES[compute]})"


def _number(value: float, compute: torch.dtype) -> str:
    rounded = float(torch.tensor(value, dtype=torch.float64).to(compute).item())
    return repr(rounded) if math.isfinite(rounded) else f'float("{rounded}")'


def loaded(pointers: str, stored: torch.dtype, compute: torch.dtype) -> str:
    """A masked load, converted to the compute dtype."""
    load = f"tl.load({pointers}, mask=inside, other=0.0)"
    if stored == compute:
        return load
    if stored != torch.bfloat16:
        return f"{load}.to({NAMES[compute]})"
    return f"from_bfloat16({load})" + ("" if compute == torch.float32 else f".to({NAMES[compute]})")


def stored(pointers: str, value: str, dtype: torch.dtype, compute: torch.dtype) -> str:
    """A masked store, rounded once to the nearest, ties to even, where ``dtype`` is narrower."""
    if dtype in (torch.bfloat16, torch.float16):
        value = value if compute == torch.float32 else f"to_odd_float32({value})"
        value = f"{'to_bfloat16' if dtype == torch.bfloat16 else 'to_float16'}({value})"
    elif dtype != compute:
        value = f"{value}.to({NAMES[dtype]})"
    return f"tl.store({pointers}, {value}, mask=inside)"


def decoded(codes: str, scales: str, dtype: torch.dtype, compute: torch.dtype) -> str:
    """A masked load of a state in 8 bits."""
    scale = f"tl.load({scales} + (i >> {_SCALE_SHIFT}), mask=inside, other=0.0)"
    load = f"from_{dynamic8.NAMES[dtype]}(tl.load({codes} + i, mask=inside, other=0), {scale})"
    return load if compute == torch.float32 else f"{load}.to({NAMES[compute]})"


def encoded(name: str, value: str, dtype: torch.dtype, compute: torch.dtype) -> list[str]:
    """The masked store of one, in a program that has all elements of its scales."""
    narrow = value if compute == torch.float32 else f"{value}.to(tl.float32)"
    group = f"tl.program_id(0).to(tl.int64) * {BLOCK // SCALED_NUMEL} + tl.arange(0, {BLOCK // SCALED_NUMEL})"
    return [
        f"new_{name} = tl.where(inside, {narrow}, 0.0)",
        f"scale_{name} = largest(new_{name})",
        f"group = {group}",
        f"tl.store(at_{scale_name(name)} + group, scale_{name}, mask=group * {SCALED_NUMEL} < n)",
        f"tl.store(at_{name} + i, to_{dynamic8.NAMES[dtype]}(new_{name}, spread(scale_{name})), mask=inside)",
    ]
