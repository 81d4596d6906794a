"""``python -m benchmarks.kernels``: one AdamW step by the compiled kernel, by torch, and as fast as memory allows.

Contestants take turns in every round, in an order that is shuffled anew, on the same buffers; ratios are taken within
a round. The ceiling is a stream ``a = q * a``, since an update is mostly reading and writing in place. Where streams
lie matters (those whose addresses are equal modulo large powers of two fight for the same places in caches), so
everything is measured with ordinary tensors, and with streams that are skewed by 17 KiB each in one arena.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.stats import Spread
from shardstep.rules.backends.llvm import LlvmKernel, Row, compile_phase
from shardstep.rules.binding import Binding
from shardstep.rules.ir import Phase, parse_text, verify

ADAMW = """rule adamw
state m element = 0.0
state v element = 0.0
hyper s0
hyper s1
hyper s2
hyper s3
hyper s4
hyper s5
hyper s6
hyper s7
%0 = load param : real element
%1 = load grad : real element
%2 = load m : real element
%3 = load v : real element
%4 = hyper s0 : real uniform
%5 = mul %1 %4 : real element
%6 = sub %5 %2 : real element
%7 = hyper s1 : real uniform
%8 = fma %7 %6 %2 : real element
%9 = hyper s2 : real uniform
%10 = mul %9 %5 : real element
%11 = hyper s3 : real uniform
%12 = mul %3 %11 : real element
%13 = fma %10 %5 %12 : real element
%14 = sqrt %13 : real element
%15 = hyper s4 : real uniform
%16 = div %14 %15 : real element
%17 = hyper s5 : real uniform
%18 = add %16 %17 : real element
%19 = hyper s6 : real uniform
%20 = mul %8 %19 : real element
%21 = div %20 %18 : real element
%22 = hyper s7 : real uniform
%23 = mul %0 %22 : real element
%24 = sub %23 %21 : real element
store param %24
store m %8
store v %13
"""
GRAD_SCALE = 0.37
SCALARS = (GRAD_SCALE, 0.1, 0.001, 0.999, 0.8, 1e-8, 1e-3, 0.99999)
STEP_BYTES, STREAM_BYTES = 28, 8
SKEW_BYTES = 17_408
STREAMS = {"param": 4, "grad": 4, "m": 4, "v": 4, "grad16": 2, "low": 2}

FP32 = Binding(torch.float32, tuple((name, torch.float32) for name in ("param", "grad", "m", "v")))
MIXED = Binding(
    torch.float32, tuple((n, torch.bfloat16 if n == "grad" else torch.float32) for n, _ in FP32.stored), torch.bfloat16
)

Run = Callable[[], Any]


def compiled(binding: Binding) -> LlvmKernel:
    """The kernel that is measured."""
    return compile_phase(Phase(verify(parse_text(ADAMW)), tuple(range(len(SCALARS)))), binding)


def buffers(numel: int, skewed: bool) -> dict[str, Tensor]:
    """The streams, filled: each its own tensor, or parts of one arena at skewed places."""
    arena = torch.empty(sum(STREAMS.values()) * numel + len(STREAMS) * (SKEW_BYTES + 64), dtype=torch.uint8)
    at, found = -arena.data_ptr() % 64, {}
    for name, size in STREAMS.items():
        dtype = torch.float32 if size == 4 else torch.bfloat16
        if skewed:
            found[name] = arena[at : at + size * numel].view(dtype)
            at += -(-size * numel // 64) * 64 + SKEW_BYTES
        else:
            found[name] = torch.empty(numel, dtype=dtype)
    for name, tensor in found.items():
        tensor.normal_(0.0, 0.02)
        if name == "v":
            tensor.square_()
    return found


def contestants(streams: dict[str, Tensor], sizes: list[int]) -> dict[str, Run]:
    """One whole step each, by name; ``sizes`` are those of the 200 tensors."""
    param, grad, m, v, grad16, low = (streams[name] for name in STREAMS)
    split = {name: torch.split(tensor, sizes) for name, tensor in streams.items()}
    whole, parts = fused([param], [grad], [m], [v]), fused(*(split[name] for name in ("param", "grad", "m", "v")))
    ours, mixed = compiled(FP32), compiled(MIXED)
    exact = {"param": param, "grad": grad, "m": m, "v": v}
    narrow = {**exact, "grad": grad16}

    def best() -> None:
        grad.copy_(grad16)
        grad.mul_(GRAD_SCALE)
        whole.step()
        low.copy_(param)

    def common() -> None:
        fresh = grad16.float()
        fresh.mul_(GRAD_SCALE)
        owner = whole.param_groups[0]["params"][0]
        owner.grad = fresh
        whole.step()
        owner.grad = grad
        low.copy_(param)

    def rows(names: dict[str, str], low_too: bool) -> list[Row]:
        return [
            Row({n: split[s][k] for n, s in names.items()}, SCALARS, low=split["low"][k] if low_too else None)
            for k in range(len(sizes))
        ]

    names = {name: name for name in exact}
    return {
        "stream a = q * a": lambda: m.mul_(0.9999),
        "fp32, torch fused": whole.step,
        "fp32, torch fused, 200 tensors": parts.step,
        "fp32, ours": lambda: ours(exact, SCALARS),
        "fp32, ours, 200 tensors": lambda: ours.many(rows(names, False)),
        "mixed, torch, reused buffers": best,
        "mixed, torch, g.float()": common,
        "mixed, ours": lambda: mixed(narrow, SCALARS, low=low),
        "mixed, ours, 200 tensors": lambda: mixed.many(rows({**names, "grad": "grad16"}, True)),
    }


def fused(params: Any, grads: Any, first: Any, second: Any) -> torch.optim.AdamW:
    """torch's fused optimizer on given memory, with the state of its second step."""
    leaves = [torch.nn.Parameter(param) for param in params]
    optimizer = torch.optim.AdamW(leaves, fused=True)
    for leaf, grad, m, v in zip(leaves, grads, first, second, strict=True):
        leaf.grad = grad
        optimizer.state[leaf] = {"step": torch.tensor(2.0), "exp_avg": m, "exp_avg_sq": v}
    return optimizer


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; the first round does not count."""
    chance, seconds = random.Random(0), {name: list[float]() for name in runs}
    for turn in range(rounds + 1):
        for name in chance.sample(list(runs), len(runs)):
            begin = time.perf_counter()
            runs[name]()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def call_costs(repeats: int) -> dict[str, float]:
    """Microseconds of a call on 1,024 elements: the best of some, since others only add."""
    streams = buffers(1024, skewed=False)
    runs = contestants(streams, [1024])
    costs = {}
    for name in ("fp32, torch fused", "fp32, ours", "mixed, ours"):
        best = float("inf")
        for _ in range(repeats):
            begin = time.perf_counter()
            for _ in range(1000):
                runs[name]()
            best = min(best, time.perf_counter() - begin)
        costs[name] = best * 1e3
    return costs


COLD = """
import gc, time, torch
from benchmarks import kernels
gc.collect()  # of torch's objects: 90 ms, which otherwise fall on whoever makes the next few
a = time.process_time(); import shardstep.rules.backends.llvm.compiler as c; c.find_target(None)
b = time.process_time(); kernels.compiled(kernels.MIXED)
print(1e3 * (b - a), 1e3 * (time.process_time() - b))
"""


def cold_costs(repeats: int) -> dict[str, float]:
    """Milliseconds of CPU in fresh processes: to open LLVM, to compile a rule, to find it on disk."""
    opening, compiling, finding = [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o700)
            for times in (compiling, finding):
                ran = subprocess.run(
                    [sys.executable, "-c", COLD],
                    env={**os.environ, "SHARDSTEP_CACHE": directory},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                first, second = map(float, ran.stdout.split())
                opening.append(first)
                times.append(second)
    named = {"import and start LLVM": opening, "compile from cold": compiling, "find on disk": finding}
    return {name: statistics.median(times) for name, times in named.items()}


def table(seconds: dict[str, list[float]], numel: int) -> list[str]:
    """A line a contestant: milliseconds, GB/s, share of the ceiling, and time over ours."""
    lines = [f"{'':32}{'ms':>9}{'best':>9}{'GB/s':>7}  {'of the ceiling':22}time / ours"]
    ceiling = seconds["stream a = q * a"]
    for name, times in seconds.items():
        spread, size = Spread.of(times), STREAM_BYTES if name.startswith("stream") else STEP_BYTES
        share = [100 * size / STREAM_BYTES * c / t for c, t in zip(ceiling, times, strict=True)]
        rival = name.split(",")[0] + ", ours" + (", 200 tensors" if name.endswith("200 tensors") else "")
        ratio = [t / o for t, o in zip(times, seconds.get(rival, times), strict=True)]
        lines.append(
            f"{name:32}{1e3 * spread.median:9.2f}{1e3 * spread.low:9.2f}{size * numel / spread.median / 1e9:7.1f}"
            f"  {quartiles(share, 0):22}{quartiles(ratio, 2)}"
        )
    return lines


def quartiles(values: list[float], digits: int) -> str:
    """The median, and between what half of the rounds were."""
    spread = Spread.of(values)
    return f"{spread.median:.{digits}f} ({spread.q1:.{digits}f} to {spread.q3:.{digits}f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 M elements, 3 rounds: does it run at all?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print the raw times instead of tables")
    options = parser.parse_args()
    numel, rounds, repeats = (2_000_000, 3, 1) if options.quick else (100_000_000, options.rounds, 5)
    sizes = [numel * 99 // 10_000] * 100 + [numel // 10_000] * 100
    tables: dict[str, dict[str, list[float]]] = {}
    for skewed in (False, True):
        runs = contestants(buffers(numel, skewed), sizes)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            title = f"{threads} thread{'s' * (threads > 1)}, {'skewed' if skewed else 'ordinary'} buffers"
            tables[title] = measure(runs, rounds)
        del runs
    torch.set_num_threads(1)
    result = {"machine": machine.describe(), "numel": numel, "seconds": tables}
    result |= {"call_us": call_costs(5 * repeats), "cpu_ms": cold_costs(repeats)}
    print(json.dumps(result) if options.json else report(result))


def report(result: dict[str, Any]) -> str:
    """Everything, for people."""
    lines = [f"{result['machine']['cpu']}, torch {result['machine']['torch']}, {result['numel']:,} elements"]
    for title, seconds in result["seconds"].items():
        lines += ["", title, *table(seconds, result["numel"])]
    lines += ["", "one call on 1,024 elements, µs"] + [f"{name:32}{us:9.2f}" for name, us in result["call_us"].items()]
    lines += ["", "CPU in a fresh process, ms"] + [f"{name:32}{ms:9.1f}" for name, ms in result["cpu_ms"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
