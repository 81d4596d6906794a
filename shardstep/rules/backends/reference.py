"""The reference back end: plain torch operations, tile by tile. It defines the bits of every program.

Each instruction is one call that rounds once. Never here: ``add(alpha=)``, addcmul, addcdiv, lerp, foreach or
fused operations, whose bits depend on where an array is cut; and float32 ``torch.sqrt`` or ``torch.pow`` on
the CPU, which are off by one unit in the last place for a sixth of all inputs. Whether an element is NaN is
fixed too, but not which of the many NaNs it is.
"""

import threading
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from shardstep.rules.backends.slots import GRAD, SlotProgram, assign_slots
from shardstep.rules.host import evaluate
from shardstep.rules.kernel import Kernel, check_arrays
from shardstep.rules.program import Program, Uniform

Function = Callable[..., object]
"""Called as ``function(a, b, out=c)``; one with a single operand is given it twice."""

Step = tuple[Function, int, int, int]
"""A function and the slots of its two operands and its destination."""

CPU_TILE: Final = 65_536
"""Elements per tile: four arrays and a register or two stay in a 2 MiB cache."""

DEVICE_TILE: Final = 4_194_304
"""Elsewhere a tile only bounds the scratch; smaller ones would be all launches."""


def _unary(function: Function) -> Function:
    return lambda a, _, out: function(a, out=out)


def _zero_without_sign(function: Function) -> Function:
    # In torch the position in the array decides whether 0.0 or -0.0 is returned; adding 0.0 settles it.
    def wrapped(a: Tensor, b: Tensor, out: Tensor) -> None:
        function(a, b, out=out)
        out.add_(0.0)

    return wrapped


def _copy(a: Tensor, _: Tensor, out: Tensor) -> None:
    out.copy_(a)


def _sqrt_on_cpu(a: Tensor, _: Tensor, out: Tensor) -> None:
    np.sqrt(a.numpy(), out=out.numpy())


def _sqrt_elsewhere(a: Tensor, _: Tensor, out: Tensor) -> None:
    out.copy_(a.double().sqrt())  # rounding the float64 root again gives the correctly rounded float32 root


_FUNCTIONS: Final[Mapping[str, Function]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "minimum": _zero_without_sign(torch.minimum),
    "maximum": _zero_without_sign(torch.maximum),
    "neg": _unary(torch.neg),
    "abs": _unary(torch.abs),
    "sign": _unary(torch.sign),
    "copy": _copy,
}


def compile_program(program: Program) -> Kernel:
    """The reference kernel of ``program``, for any device and for float32 and float64."""
    return _ReferenceKernel(program)


class _ReferenceKernel:
    """Slots of a running tile: arrays, registers, then the four below, then the uniforms."""

    def __init__(self, program: Program) -> None:
        self._program = program
        slots = assign_slots(program)
        self._registers = slots.registers
        self._raw_grad = slots.inputs + slots.registers
        self._low = self._raw_grad + 1
        self._grad_scale = self._raw_grad + 2
        first_uniform = self._raw_grad + 3
        self._steps = {
            "cpu": _steps(slots, first_uniform, _sqrt_on_cpu),
            "elsewhere": _steps(slots, first_uniform, _sqrt_elsewhere),
        }

    def __call__(
        self,
        param: Tensor,
        grad: Tensor,
        states: Mapping[str, Tensor],
        scalars: Mapping[str, object],
        grad_scale: float,
        low: Tensor | None,
    ) -> None:
        check_arrays(self._program.states, param, grad, states, low)
        uniforms = [evaluate(uniform, scalars) for uniform in self._program.uniforms]
        numbers = [_rounded(number, param) for number in (grad_scale, *uniforms)]
        read = self._read_grad(grad, param.dtype, grad_scale)
        write = [] if low is None else [(_copy, 0, 0, self._low)]
        steps = [*read, *self._steps["cpu" if param.is_cpu else "elsewhere"], *write]
        with np.errstate(invalid="ignore"):  # the root of a negative number is NaN, silently, as in torch
            self._run(steps, [param, grad, *states.values()], low, numbers, bool(read))

    def _read_grad(self, grad: Tensor, dtype: torch.dtype, grad_scale: float) -> list[Step]:
        """How the gradient gets into a register, converted and scaled; no steps if it is usable as is."""
        steps: list[Step] = []
        if grad.dtype != dtype:
            steps.append((_copy, self._raw_grad, self._raw_grad, GRAD))
        if grad_scale != 1.0:
            steps.append((torch.mul, GRAD if steps else self._raw_grad, self._grad_scale, GRAD))
        return steps

    def _run(
        self,
        steps: list[Step],
        arrays: list[Tensor],
        low: Tensor | None,
        numbers: list[Tensor],
        own_grad: bool,
    ) -> None:
        tile = CPU_TILE if arrays[0].is_cpu else DEVICE_TILE
        scratch = _SCRATCH.registers(self._registers + own_grad, tile, arrays[0])
        low_tiles = repeat(None) if low is None else torch.split(low, tile)
        for *tiles, low_tile in zip(*(torch.split(array, tile) for array in arrays), low_tiles, strict=False):
            count = tiles[0].numel()
            registers = scratch if count == tile else [register[:count] for register in scratch]
            raw_grad = tiles[GRAD]
            if own_grad:
                tiles[GRAD] = registers[-1]
            slots = [*tiles, *registers[: self._registers], raw_grad, low_tile, *numbers]
            for function, a, b, destination in steps:
                function(slots[a], slots[b], out=slots[destination])


def _steps(slots: SlotProgram, first_uniform: int, sqrt: Function) -> list[Step]:
    functions = {**_FUNCTIONS, "sqrt": sqrt}
    steps: list[Step] = []
    for line in slots.operations:
        operands = [a.index + (first_uniform if isinstance(a, Uniform) else 0) for a in line.arguments]
        steps.append((functions[line.operation], operands[0], operands[-1], line.destination))
    return steps


def _rounded(number: float, like: Tensor) -> Tensor:
    """A scalar as a 0-d tensor, rounded once.

    A Python number would make CUDA multiply by its reciprocal in div.
    """
    return torch.tensor(number, dtype=like.dtype).to(like.device, non_blocking=True)


class _Scratch(threading.local):
    """Registers kept between calls and shared by all kernels of a thread."""

    def __init__(self) -> None:
        self._pools: dict[Any, list[Tensor]] = {}

    def registers(self, count: int, numel: int, like: Tensor) -> list[Tensor]:
        pool = self._pools.setdefault((like.dtype, like.device), [])
        while len(pool) < count:
            pool.append(torch.empty(numel, dtype=like.dtype, device=like.device))
        return pool[:count]


_SCRATCH: Final = _Scratch()
