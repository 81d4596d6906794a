"""The door to triton: from the text of a kernel to machine code, and its launches. Nobody else imports it.

The signature of a kernel is written by us, not found from the first call's values: a scalar that happens to be 1,
or a float64 one, would otherwise become another type and give other bits. In Triton's interpreter mode
(``TRITON_INTERPRET=1``) the same text runs in numpy on tensors of the CPU.
"""

import hashlib
import linecache
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from shardstep.errors import ConfigError
from shardstep.rules.backends.blocks import blocks_touched
from shardstep.rules.backends.triton.text import (
    BLOCKS_PER_PROGRAM,
    arguments,
    arrays,
    is_tiled,
    kernel_name,
    reductions,
    source,
    writes_low,
)
from shardstep.rules.backends.triton.tiles import COLUMNS, ROWS_AT_ONCE, STEPS
from shardstep.rules.binding import CODED, Binding, Lines, PhaseKernel
from shardstep.rules.ir import Phase, Shape
from shardstep.rules.passes.dead import reachable, renumbered
from shardstep.types import BLOCK_NUMEL as BLOCK

OPTIONS: Final = {"num_warps": 4, "enable_fp_fusion": False, "enable_reflect_ftz": False}

_LINES: Final[tuple[Shape, ...]] = ("row", "column")
_LOWEST: Final = -(2**63)

ALIGNMENT: Final = 16
"""What divides the addresses and the length, where a kernel may load 128 bits at a time."""


def compile_phase(phase: Phase, binding: Binding) -> PhaseKernel:
    """The kernel of ``phase`` on CUDA tensors; compiled at the first call on each kind of device.

    Raises RuleError if a kernel cannot have what the phase does, ConfigError if triton is not installed.
    """
    tiled, others = reductions_apart(phase)
    if tiled is None or others is None:
        return _TritonKernel(phase, binding)
    return _Both(phase, _TritonKernel(tiled, binding), _TritonKernel(others, binding))


class _Both:
    """A phase with sums over tensors and sums over lines, which are taken by programs of different shape."""

    def __init__(self, phase: Phase, tiled: "_TritonKernel", others: "_TritonKernel") -> None:
        self._of_lines = [not line.type.is_single for line in phase.reductions]
        self._tiled, self._others = tiled, others

    def __call__(
        self,
        arrays: Mapping[str, Tensor],
        scalars: Sequence[float],
        *,
        offset: int = 0,
        low: Tensor | None = None,
        lines: Lines | None = None,
    ) -> tuple[Tensor, ...]:
        tiled = iter(self._tiled(arrays, scalars, offset=offset, lines=lines))
        others = iter(self._others(arrays, scalars, offset=offset, lines=lines))
        return tuple(next(tiled if of_lines else others) for of_lines in self._of_lines)


def compile_text(phase: Phase, binding: Binding, arch: int, *, aligned: bool = True) -> dict[str, str]:
    """The kernel for ``arch`` (80, 90, …) as ``ttir``, ``llir`` and ``ptx``; needs no GPU.

    ``aligned``: the one for arrays whose addresses and length are multiples of 16, or the one for all others.
    """
    compiled = _compile(_function(phase, binding), phase, binding, arch, aligned=aligned)
    return {stage: compiled.asm[stage] for stage in ("ttir", "llir", "ptx")}


class _TritonKernel:
    """One phase; compiled once for each (device, whether everything is aligned): machine code is loaded by device."""

    def __init__(self, phase: Phase, binding: Binding) -> None:
        self._phase = phase
        self._binding = binding
        self._function = _function(phase, binding)
        self._interpreted = not isinstance(self._function, _import().JITFunction)
        self._arrays = tuple(arrays(phase, binding))
        self._low = writes_low(phase, binding)
        self._sums, self._tiled = len(reductions(phase)), is_tiled(phase)
        self._scaled = any(dtype in CODED for dtype in arrays(phase, binding).values())
        self._compiled: dict[tuple[int, bool], Any] = {}

    def __call__(
        self,
        arrays: Mapping[str, Tensor],
        scalars: Sequence[float],
        *,
        offset: int = 0,
        low: Tensor | None = None,
        lines: Lines | None = None,
    ) -> tuple[Tensor, ...]:
        tensors = [arrays[name].view(-1) for name in self._arrays]
        if self._low:
            if low is None:
                raise ConfigError(f"expected a tensor low in {self._binding.low} beside param, got none; pass one")
            tensors.append(low.view(-1))
        numbers = torch.tensor(scalars, dtype=torch.float64).to(self._binding.compute).tolist()
        like = next(iter(arrays.values()))  # a phase may use none but the index
        n = like.numel()
        if self._tiled and lines is not None:
            return self._tile(tensors, numbers, offset, lines, like)
        if self._sums:
            return self._reduce(tensors, numbers, offset, like, lines if self._phase.has_lines else None)
        body = n - n % ALIGNMENT if all(_is_aligned(tensor) for tensor in tensors) else 0
        if self._scaled and body < n:
            body = 0  # elements that share a scale stay in one program
        for first, count in ((0, body), (body, n - body)):
            if count:
                run = [tensor[first : first + count] for tensor in tensors]
                self._launch((-(-count // BLOCK), 1), run, [count, offset + first, *numbers], aligned=first < body)
        return ()

    def _reduce(
        self, tensors: list[Tensor], numbers: list[float], offset: int, like: Tensor, lines: Lines | None
    ) -> tuple[Tensor, ...]:
        n = like.numel()
        blocks = blocks_touched(n, offset)
        partials = [torch.empty(blocks, dtype=torch.float64, device=like.device) for _ in range(self._sums)]
        if blocks:
            aligned = not n % ALIGNMENT and not offset % ALIGNMENT and all(_is_aligned(tensor) for tensor in tensors)
            grid = -(-blocks // BLOCKS_PER_PROGRAM)
            vectors = [] if lines is None else [vector.to(like.device) for vector in lines.vectors]
            places = [] if lines is None else [lines.start, lines.view.columns, lines.view.rows]
            self._launch((grid, 1), [*tensors, *partials, *vectors], [n, offset, *places, *numbers], aligned=aligned)
        return tuple(partials)

    def _tile(
        self, tensors: list[Tensor], numbers: list[float], offset: int, lines: Lines, like: Tensor
    ) -> tuple[Tensor, ...]:
        n, (_, rows, columns) = like.numel(), lines.view
        touched = {shape: lines.touched(shape, n) for shape in _LINES}
        partials = []
        for line in self._phase.reductions:
            lowest, dtype = (_LOWEST, torch.int64) if line.operation.endswith("max") else (0, torch.float64)
            count = touched[line.type.shape].stop - touched[line.type.shape].start
            partials.append(torch.full((count,), lowest, dtype=dtype, device=like.device))
        if n:
            matrices = touched["column"].stop // columns - touched["column"].start // columns
            grid = (matrices * -(-rows // (ROWS_AT_ONCE * STEPS)), -(-columns // COLUMNS))
            vectors = [vector.to(like.device) for vector in lines.vectors]
            room = [number for cut in touched.values() for number in (cut.start, cut.stop - cut.start)]
            divisible = all(number % ALIGNMENT == 0 for number in (n, columns, lines.start))
            aligned = divisible and all(_is_aligned(tensor) for tensor in tensors)
            given = [n, offset, lines.start, columns, rows, *room, *numbers]
            self._launch(grid, [*tensors, *partials, *vectors], given, aligned=aligned)
        return tuple(_ordered(found) if found.dtype == torch.int64 else found for found in partials)

    def _launch(self, grid: tuple[int, int], tensors: list[Tensor], numbers: list[float], *, aligned: bool) -> None:
        device = tensors[0].device
        if self._interpreted:
            self._function[grid](*tensors, *numbers)
            return
        if device.type != "cuda":
            raise ConfigError(f"expected tensors on a CUDA device for a Triton kernel, got {device}; move them there")
        key = (device.index, aligned)
        if key not in self._compiled:
            major, minor = torch.cuda.get_device_capability(device)
            arch = major * 10 + minor
            self._compiled[key] = _compile(self._function, self._phase, self._binding, arch, aligned=aligned)
        with torch.cuda.device(device):
            self._compiled[key][(*grid, 1)](*tensors, *numbers)


def reductions_apart(phase: Phase) -> tuple[Phase | None, Phase | None]:
    """The phase with its reductions of rows and columns, and with the others; None where there are none of a kind."""
    kinds = []
    for of_lines in (True, False):
        chosen = [
            pair for pair, line in zip(phase.sums, phase.reductions, strict=True) if line.type.is_single != of_lines
        ]
        kinds.append(_only(phase, chosen) if chosen else None)
    return kinds[0], kinds[1]


def _only(phase: Phase, sums: list[tuple[int, int]]) -> Phase:
    """The phase with these reductions, and what they need."""
    alive = reachable(phase.body, [number for number, _ in sums])
    new = {old: number for number, old in enumerate(alive)}
    body = renumbered(phase.body, alive, [])
    return replace(phase, body=body, sums=tuple((new[number], whole) for number, whole in sums))


def _ordered(keys: Tensor) -> Tensor:
    """The numbers that a kernel has ordered as integers."""
    lowest = keys == _LOWEST
    bits = torch.where(keys < 0, keys ^ (2**63 - 1), keys)
    return torch.where(lowest, -math.inf, bits.view(torch.float64))


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def _function(phase: Phase, binding: Binding) -> Any:
    """The kernel as triton's own object, made from its text."""
    text = source(phase, binding)
    _import()
    # triton reads the source of its functions through linecache, as tracebacks do.
    name = f"<shardstep kernel {kernel_name(phase)} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module: dict[str, Any] = {"__name__": name}
    exec(compile(text, name, "exec"), module)
    return module[kernel_name(phase)]


def _compile(function: Any, phase: Phase, binding: Binding, arch: int, *, aligned: bool) -> Any:
    triton = _import()
    signature = arguments(phase, binding)
    divisible = [["tt.divisibility", ALIGNMENT]]
    hinted = {name for name, type_ in signature.items() if type_.startswith("*")} | {"n"}
    hinted |= {"offset"} if reductions(phase) and not is_tiled(phase) else set()
    hinted -= {name for name in hinted if name.startswith(("at_v", "partials"))} if phase.has_lines else set()
    hinted |= {"columns", "place"} if is_tiled(phase) else set()
    attributes = {(i,): divisible for i, name in enumerate(signature) if aligned and name in hinted}
    compiler = triton.compiler
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    return triton.compile(compiler.ASTSource(function, signature, attrs=attributes), target=target, options=OPTIONS)


def _import() -> Any:
    try:
        import triton.backends.compiler  # type: ignore  # without types, and absent on some machines
        import triton.compiler  # type: ignore
    except ImportError as error:
        raise ConfigError(
            "expected triton to be installed for a kernel on a GPU, got none; install triton, or use another back end"
        ) from error
    return triton
