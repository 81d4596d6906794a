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

from benchmarks import compiled_peer, machine
from benchmarks.stats import Spread
from shardstep.optim.adam import adamw
from shardstep.rules.compiled import compile_rule
from shardstep.types import Batch, Segment

GRAD_SCALE = 0.37
GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2} | {
    "amsgrad": False,
    "decoupled_weight_decay": True,
}
STEP_BYTES, STREAM_BYTES = 28, 8
SKEW_BYTES = 17_408
STREAMS = {"param": 4, "grad": 4, "m": 4, "v": 4, "grad16": 2, "low": 2}

Run = Callable[[], Any]


def ours(segments: list[Segment]) -> Run:
    """An update of ``segments`` as an optimizer asks for it."""
    batch = Batch(segments, [(segment.group, segment.step) for segment in segments], lambda sums, _: sums)
    return lambda: compile_rule(adamw).update(batch, [GROUP])


def segment(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, low: Tensor | None) -> Segment:
    """One tensor in its second step."""
    scale = 1.0 if low is None else GRAD_SCALE
    return Segment(0, 2, param, grad, {"exp_avg": m, "exp_avg_sq": v}, low, scale)


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
    tensors = [{name: parts[k] for name, parts in split.items()} for k in range(len(sizes))]
    exact = [segment(t["param"], t["grad"], t["m"], t["v"], None) for t in tensors]
    mixed = [segment(t["param"], t["grad16"], t["m"], t["v"], t["low"]) for t in tensors]

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

    return {
        "stream a = q * a": lambda: m.mul_(0.9999),
        "fp32, torch fused": whole.step,
        "fp32, torch fused, 200 tensors": parts.step,
        "fp32, ours": ours([segment(param, grad, m, v, None)]),
        "fp32, ours, 200 tensors": ours(exact),
        "mixed, torch, reused buffers": best,
        "mixed, torch, g.float()": common,
        "mixed, ours": ours([segment(param, grad16, m, v, low)]),
        "mixed, ours, 200 tensors": ours(mixed),
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
b = time.process_time(); kernels.ours([kernels.segment(*torch.ones(4, 64), None)])()
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
    parser.add_argument("--compile", action="store_true", help="torch.compile too: needs g++, and a minute or two")
    parser.add_argument("--json", action="store_true", help="print the raw times instead of tables")
    options = parser.parse_args()
    numel, rounds, repeats = (2_000_000, 3, 1) if options.quick else (100_000_000, options.rounds, 5)
    sizes = [numel * 99 // 10_000] * 100 + [numel // 10_000] * 100
    caches = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches.name  # an empty one: first calls are cold
    tables: dict[str, dict[str, list[float]]] = {}
    starts: dict[str, tuple[float, float]] = {}
    for skewed in (False, True):
        streams = buffers(numel, skewed)
        runs = contestants(streams, sizes)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            if options.compile:  # anew: it compiles for a number of threads
                peers = compiled_peer.compiled(streams, GROUP, GRAD_SCALE)
                starts = starts or compiled_peer.cold_starts(peers)
                runs |= peers
            title = f"{threads} thread{'s' * (threads > 1)}, {'skewed' if skewed else 'ordinary'} buffers"
            tables[title] = measure(runs, rounds)
        del runs, streams
    torch.set_num_threads(1)
    result = {"machine": machine.describe(), "numel": numel, "seconds": tables}
    result |= {"call_us": call_costs(5 * repeats), "cpu_ms": cold_costs(repeats), "first_call_s": starts}
    print(json.dumps(result) if options.json else report(result))
    caches.cleanup()


def report(result: dict[str, Any]) -> str:
    """Everything, for people."""
    lines = [f"{result['machine']['cpu']}, torch {result['machine']['torch']}, {result['numel']:,} elements"]
    for title, seconds in result["seconds"].items():
        lines += ["", title, *table(seconds, result["numel"])]
    lines += ["", "one call on 1,024 elements, µs"] + [f"{name:32}{us:9.2f}" for name, us in result["call_us"].items()]
    lines += ["", "CPU in a fresh process, ms"] + [f"{name:32}{ms:9.1f}" for name, ms in result["cpu_ms"].items()]
    for name, (wall, cpu) in result["first_call_s"].items():
        lines += ["", f"first call of {name}, nothing cached: {wall:.1f} s, {cpu:.1f} s of CPU"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
