"""A phase as the text of a Triton kernel: one instruction a line. Pure text; triton is not imported here.

A kernel without reductions takes 1,024 elements a program. One with sums over tensors takes 32 blocks of 1,024 global
positions, in 64 rows of 16 lanes from first to last, since that is the order in which a sum is defined. One with rows
and columns takes a tile of them, where nothing has an order: see `tiles`. Arguments: the arrays in the binding's order,
the low-precision copy, the partials of each reduction, the vectors, ``n`` and ``offset`` (the global position of
element 0), for rows and columns where they are, the scalars.
"""

import re
from typing import Final

import torch

from shardstep.errors import RuleError
from shardstep.rules.backends.blocks import LANES
from shardstep.rules.backends.triton import tiles
from shardstep.rules.backends.triton.operations import (
    NAMES,
    WORDS,
    constant,
    decoded,
    encoded,
    loaded,
    pointwise,
    stored,
)
from shardstep.rules.backends.triton.prelude import needed
from shardstep.rules.binding import CODED, Binding, scale_name
from shardstep.rules.ir import Instruction, Phase
from shardstep.types import BLOCK_NUMEL as BLOCK

BLOCKS_PER_PROGRAM: Final = 32
"""In a program with reductions; 32 × 16 elements are one load of 128 bits for each of 128 threads."""

_HEADER = "import triton\nimport triton.language as tl\n"

_FLAT = f"""\
    i = tl.program_id(0).to(tl.int64) * {BLOCK} + tl.arange(0, {BLOCK})
    inside = i < n"""

_BLOCKS = f"""\
    block = tl.program_id(0).to(tl.int64) * {BLOCKS_PER_PROGRAM} + tl.arange(0, {BLOCKS_PER_PROGRAM})
    start = (offset // {BLOCK} + block) * {BLOCK}"""

_ROW = f"""\
    for row in range({BLOCK // LANES}):
        position = start[:, None] + (row * {LANES} + tl.arange(0, {LANES})[None, :])
        inside = (position >= offset) & (position < offset + n)
        i = position - offset"""


def source(phase: Phase, binding: Binding) -> str:
    """The module that holds the kernel of ``phase``. Raises RuleError if a kernel cannot have what the phase does."""
    lines = [f"def {kernel_name(phase)}({', '.join(arguments(phase, binding))}):"]
    body = _lines(phase, binding)
    if is_tiled(phase):
        lines += [tiles.BEGIN, *tiles.accumulators(phase), tiles.ROWS, *(f"        {line}" for line in body)]
        lines += tiles.ends(phase)
    elif reductions(phase):
        where = [f"        {line}" for line in tiles.WHERE] if phase.has_lines else []
        lines += [_BLOCKS, *_accumulators(phase), _ROW, *where, *(f"        {line}" for line in body)]
        lines += _partials(phase)
    else:
        lines += [_FLAT, *(f"    {line}" for line in body)]
    kernel = "\n".join(["@triton.jit", *lines]) + "\n"
    return "\n\n".join(part for part in (_HEADER, needed(kernel), kernel) if part)


def is_tiled(phase: Phase) -> bool:
    """Whether a program takes a tile of rows and columns."""
    return phase.has_lines and not any(line.type.is_single for line in phase.reductions)


def kernel_name(phase: Phase) -> str:
    """The name of the kernel in the text, and on the device."""
    return re.sub(r"\W", "_", f"{phase.body.name}_kernel", flags=re.ASCII)


def reductions(phase: Phase) -> tuple[int, ...]:
    """The number of each reduction in the body, in the order in which a kernel returns them."""
    return tuple(number for number, _ in phase.sums)


def arrays(phase: Phase, binding: Binding) -> dict[str, torch.dtype]:
    """The dtype of each array that the phase loads or stores, in the binding's order."""
    used = {str(line.attributes[0]) for line in phase.body.instructions if line.operation == "load"}
    used |= {name for name, _ in phase.body.stores}
    dtypes = dict(binding.stored)
    found = {name: dtypes[name] for name in binding.arrays(used)}
    for name in sorted(used):
        if phase.body.shapes[name] != "element":
            raise RuleError(
                f"rule {phase.body.name!r}: expected arrays with one value for each element in a Triton kernel, "
                f"got {name!r} with one for each {phase.body.shapes[name]}; use another back end for it"
            )
        if name not in found or not name.isidentifier():
            raise RuleError(
                f"rule {phase.body.name!r}: expected a binding with a dtype for {name!r}, got one for "
                f"{', '.join(bound for bound, _ in binding.stored)}; bind each array that the phase loads or stores"
            )
    return found


def writes_low(phase: Phase, binding: Binding) -> bool:
    """Whether the phase writes the low-precision copy of the param."""
    return binding.low is not None and any(name == "param" for name, _ in phase.body.stores)


def arguments(phase: Phase, binding: Binding) -> dict[str, str]:
    """Each argument of the kernel with its type in Triton's signatures."""
    real = _signature(binding.compute)
    signature = {f"at_{name}": f"*{_signature(dtype)}" for name, dtype in arrays(phase, binding).items()}
    if writes_low(phase, binding) and binding.low is not None:
        signature["low"] = f"*{_signature(binding.low)}"
    for number, line in zip(reductions(phase), phase.reductions, strict=True):
        signature[f"partials{number}"] = "*i64" if line.operation in ("row_max", "column_max") else "*fp64"
    for number, vector in enumerate(phase.vectors):
        signature[f"at_v{number}"] = "*fp64" if vector.anchors else f"*{real}"
    signature |= {"n": "i64", "offset": "i64"}
    if phase.has_lines:
        signature |= dict.fromkeys(("place", "columns", "rows"), "i64")
    if is_tiled(phase):
        signature |= dict.fromkeys(("first_row", "count_row", "first_column", "count_column"), "i64")
    return signature | {f"s{index}": real for index in range(len(phase.scalars))}


def _signature(dtype: torch.dtype) -> str:
    named = NAMES[dtype].removeprefix("tl.")
    for word, letter in (("bfloat", "bf"), ("float", "fp"), ("uint", "u"), ("int", "i")):
        if named.startswith(word):
            return named.replace(word, letter)
    return named


def _lines(phase: Phase, binding: Binding) -> list[str]:
    """The instructions, then the stores: what is loaded is what was there before the step."""
    shape = f"[{BLOCKS_PER_PROGRAM}, {LANES}]" if reductions(phase) else f"[{BLOCK}]"
    if is_tiled(phase):
        shape = tiles.SHAPE
    lines = []
    for number, line in enumerate(phase.body.instructions):
        text = _instruction(phase, binding, number, line, shape)
        lines.append(text + (f"  # line {line.place.line}" if line.place else ""))
    dtypes = arrays(phase, binding)
    for name, value in phase.body.stores:
        if dtypes[name] in CODED:
            lines += encoded(name, f"v{value}", dtypes[name], binding.compute)
            continue
        lines.append(stored(f"at_{name} + i", f"v{value}", dtypes[name], binding.compute))
        if name == "param" and binding.low is not None:
            lines.append(stored("low + i", f"v{value}", binding.low, binding.compute))
    return lines


def _instruction(phase: Phase, binding: Binding, number: int, line: Instruction, shape: str) -> str:
    compute = binding.compute
    if number in reductions(phase):
        return _accumulate(line, number) if line.type.is_single else tiles.accumulate(line, number)
    if line.operation == "load":
        name = str(line.attributes[0])
        dtype = dict(binding.stored)[name]
        if dtype in CODED:
            return f"v{number} = {decoded(f'at_{name}', f'at_{scale_name(name)}', dtype, compute)}"
        return f"v{number} = {loaded(f'at_{name} + i', dtype, compute)}"
    if line.operation == "const":
        return f"v{number} = {constant(line, shape, compute)}"
    if line.operation == "hyper" and not line.type.is_single:
        at = f"at_{line.attributes[0]} + {line.type.shape}"
        return f"v{number} = tl.load({at}, mask=inside, other=0.0)"
    if line.operation == "hyper":
        return f"v{number} = tl.full({shape}, {line.attributes[0]}, {NAMES[compute]})"
    if line.operation == "index":
        return f"v{number} = (offset + i).to({WORDS[compute]})"
    return f"v{number} = {pointwise(line, [f'v{argument}' for argument in line.arguments], compute)}"


def _accumulators(phase: Phase) -> list[str]:
    starts = {"sum": "0.0", "max": 'float("-inf")'}
    shape = f"[{BLOCKS_PER_PROGRAM}, {LANES}]"
    return [f"    {op}{number} = tl.full({shape}, {starts[op]}, tl.float64)" for number, op in _kinds(phase)]


def _accumulate(line: Instruction, number: int) -> str:
    # Adding the +0.0 of a lane outside changes nothing: a sum that starts at +0.0 never is -0.0.
    value = f"v{line.arguments[0]}"
    if line.operation == "sum":
        return f"sum{number} += tl.where(inside, {value}, 0.0).to(tl.float64)"
    return f'max{number} = maximum(max{number}, tl.where(inside, {value}, float("-inf")).to(tl.float64))'


def _partials(phase: Phase) -> list[str]:
    pairs = [(number, f"fold_{op}({op}{number})") for number, op in _kinds(phase)]
    return [f"    tl.store(partials{number} + block, {fold}, mask=start < offset + n)" for number, fold in pairs]


def _kinds(phase: Phase) -> list[tuple[int, str]]:
    kinds = [(number, phase.body.instructions[number].operation) for number in reductions(phase)]
    for _, operation in kinds:
        if operation not in ("sum", "max"):
            raise RuleError(f"expected sums over tensors without those of rows and columns, got {operation!r}")
    return kinds
