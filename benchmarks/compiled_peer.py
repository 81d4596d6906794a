"""The peer of ``benchmarks.kernels --compile``: an AdamW step by torch.compile, one function over one flat tensor.

Written as its compiler likes it best: pure arithmetic and copies at the end, and the numbers of a step as tensors,
since it compiles anew for every Python number that changes. It needs a C++ compiler, and many seconds for a function.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def update(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, numbers: tuple[Tensor, ...]) -> Tensor:
    """The new param; the moments are stored."""
    decay, first, beta2, second, root, eps, lr = numbers
    new_m = m + first * (grad - m)
    new_v = beta2 * v + second * grad * grad
    new = param * decay - lr * new_m / (new_v.sqrt() / root + eps)
    m.copy_(new_m)
    v.copy_(new_v)
    param.copy_(new)
    return new


def exact(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, numbers: tuple[Tensor, ...]) -> None:
    """All in float32."""
    update(param, grad, m, v, numbers)


def mixed(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, low: Tensor, scale: Tensor, numbers: tuple[Tensor, ...]
) -> None:
    """With a scaled gradient in bfloat16, and a copy of the new param in it."""
    low.copy_(update(param, grad.float() * scale, m, v, numbers))


def numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> tuple[Tensor, ...]:
    """What `update` needs to know of a step."""
    beta1, beta2 = betas
    root, lr_now = (1 - beta2**step) ** 0.5, lr / (1 - beta1**step)
    return tuple(map(torch.tensor, (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, root, eps, lr_now)))


def compiled(streams: dict[str, Tensor], group: dict[str, Any], scale: float) -> dict[str, Callable[[], Any]]:
    """Two contestants on the streams of `benchmarks.kernels`, compiled anew for the number of threads there is now."""
    torch._dynamo.reset()
    of_step, scale_now = numbers(**group, step=2), torch.tensor(scale)
    one, two = torch.compile(exact, dynamic=False), torch.compile(mixed, dynamic=False)
    param, grad, m, v, grad16, low = streams.values()
    return {
        "fp32, torch.compile": lambda: one(param, grad, m, v, of_step),
        "mixed, torch.compile": lambda: two(param, grad16, m, v, low, scale_now, of_step),
    }


def cold_starts(runs: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """(seconds, seconds of CPU with those of the C++ compiler) of the first call of each."""
    found = {}
    for name, run in runs.items():
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        run()
        found[name] = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
    return found
