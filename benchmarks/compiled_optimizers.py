"""``python -m benchmarks.compiled_optimizers``: torch.compile of torch's optimizer steps, with what starting costs.

The parameters and options are those of `benchmarks.optimizers`; torch's implementation is foreach, which its compiler
fuses. Starting is the first three calls of ``step()`` in a fresh process, all that they import and compile included:
once with no code on disk, and once with what the first process has left there. Then both step in turns. It takes
minutes for each optimizer, and needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from benchmarks import machine
from benchmarks.optimizers import OPTIONS, Step, in_turns, matrices, parameters
from benchmarks.stats import Spread
from shardstep import optim

USUAL = ["SGD", "Adam", "AdamW", "RMSprop", "NAdam"]
ROUNDS = 9
STARTING = 3


def ours(name: str, small: bool) -> Step:
    """A step of ours."""
    return getattr(optim, name)(parameters(matrices(small)), **OPTIONS.get(name, {})).step


def compiled(name: str, small: bool) -> Step:
    """torch's, by its compiler."""
    kind = getattr(torch.optim, name)
    return torch.compile(kind(parameters(matrices(small)), **OPTIONS.get(name, {}), foreach=True).step)


def started(step: Step) -> tuple[float, float]:
    """(seconds, seconds of CPU with those of the C++ compiler) of the first calls."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    for _ in range(STARTING):
        step()
    return time.perf_counter() - wall, sum(os.times()[:4]) - cpu


def here(name: str, whose: str, small: bool) -> dict[str, Any]:
    """What one process measures: starting, and if it is to step both, CPU seconds in turns."""
    steps = {"compiled": compiled(name, small)} if whose != "ours" else {"ours": ours(name, small)}
    ((start_s, start_cpu_s),) = map(started, steps.values())
    found: dict[str, Any] = {"start_s": start_s, "start_cpu_s": start_cpu_s}
    if whose == "both":
        steps["ours"] = ours(name, small)
        found["turns"] = in_turns(steps, ROUNDS, uncounted=2)
    return found


def elsewhere(name: str, whose: str, small: bool, caches: str) -> dict[str, Any]:
    """The same in a fresh process, with this directory for compiled code."""
    own = {"SHARDSTEP_CACHE": f"{caches}/ours", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/torch"}
    command = [sys.executable, "-m", "benchmarks.compiled_optimizers", name, "--process", whose]
    ran = subprocess.run(
        command + ["--small"] * small, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def line(name: str, small: bool) -> str:
    """A row of the report."""
    with tempfile.TemporaryDirectory() as caches:
        os.mkdir(f"{caches}/ours", 0o700)
        cold, warm = (elsewhere(name, "ours", small, caches) for _ in range(2))
        theirs_cold = elsewhere(name, "compiled", small, caches)
        both = elsewhere(name, "both", small, caches)
    starts = [f"{one['start_s']:.2f} ({one['start_cpu_s']:.2f})" for one in (cold, warm, theirs_cold, both)]
    own, theirs = both["turns"]["ours"], both["turns"]["compiled"]
    ratio = Spread.of(t / o for o, t in zip(own, theirs, strict=True))
    times = [f"{1e3 * statistics.median(times):.1f}" for times in (own, theirs)]
    spread = f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})"
    return f"| {' | '.join([name, *starts, *times, spread])} |"


def report(names: list[str], small: bool) -> None:
    """A page for people, line by line as it comes."""
    about = machine.describe()
    print(
        f"{about['cpu']}, torch {about['torch']}, {sum(a * b for a, b in matrices(small)):,} float32 parameters in 200 "
        f"matrices, {torch.get_num_threads()} thread(s), {about['date']}, load {about['load']:.1f}\n\n"
        "| optimizer | ours from cold: s (CPU s) | from disk | torch.compile from cold | from disk "
        "| ours, CPU ms | compiled, CPU ms | compiled / ours: median (quartiles) |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for name in names:
        print(line(name, small), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_optimizers", description=__doc__)
    parser.add_argument("only", nargs="*", help=f"names of torch's optimizers ({', '.join(USUAL)})")
    parser.add_argument("--small", action="store_true", help="1 M parameters: does it run at all?")
    parser.add_argument("--process", choices=["ours", "compiled", "both"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.process:
        print(json.dumps(here(options.only[0], options.process, options.small)))
    elif not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        print("torch.compile needs a C++ compiler (g++, clang++ or CXX), and there is none: nothing is measured")
    else:
        report(options.only or USUAL, options.small)


if __name__ == "__main__":
    main()
