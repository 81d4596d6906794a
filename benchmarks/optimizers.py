"""``python -m benchmarks.optimizers``: one step of every optimizer, and of torch's where torch has it.

Against torch's fused kernels where there are such on the CPU, else its foreach, else its for-loop: 25 M parameters in
200 matrices, large and small. Both step in turns, in an order that is shuffled anew each round; ratios are taken within
one. What is measured is the CPU time of the whole ``optimizer.step()``, which a busy machine disturbs least. Bytes are
those that a step reads and writes; of rules with matrix products, which compute most of the time, they say little.
torch.compile of torch's steps, and what starting costs, are measured by `compiled_optimizers`.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine
from benchmarks.stats import Spread
from shardstep import optim
from shardstep.rules.compiled import compile_rule

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9},
    "Shampoo": {"update_freq": 1000},
}
"""What is measured in the place of the defaults: for Shampoo, a step between those that compute roots."""

Step = Callable[[], Any]

Shape = tuple[int, int]


@dataclass(frozen=True)
class Result:
    """One optimizer: CPU seconds of each round, ours and torch's; ``peer`` says which of torch's, if any."""

    name: str
    peer: str | None
    step_bytes: int
    ours_s: list[float]
    theirs_s: list[float]

    @property
    def ratio(self) -> Spread | None:
        """torch's time over ours."""
        return Spread.of(t / o for o, t in zip(self.ours_s, self.theirs_s, strict=True)) if self.peer else None


def measured(kind: type[optim.Optimizer], shapes: list[Shape], rounds: int) -> Result:
    """Both on buffers of their own; the first two rounds compile and make the states, and do not count."""
    options = OPTIONS.get(kind.__name__, {})
    theirs, peer = peer_of(kind)
    own = kind(parameters(shapes), **options)
    steps: dict[str, Step] = {"ours": own.step}
    if theirs is not None:
        steps["theirs"] = theirs(parameters(shapes), **options, **({peer: True} if peer != "for-loop" else {})).step
    seconds = in_turns(steps, rounds, uncounted=2)
    state_bytes = sum(values.nbytes for state in own.state.values() for values in state.values())
    step_bytes = 3 * 4 * sum(rows * columns for rows, columns in shapes) + 2 * state_bytes
    return Result(kind.__name__, peer, step_bytes, seconds["ours"], seconds.get("theirs", []))


def in_turns(steps: dict[str, Step], rounds: int, uncounted: int) -> dict[str, list[float]]:
    """CPU seconds of each, all of them once a round."""
    chance, seconds = random.Random(0), {name: list[float]() for name in steps}
    for turn in range(rounds + uncounted):
        for name in chance.sample(list(steps), len(steps)):
            begin = time.process_time()
            steps[name]()
            if turn >= uncounted:
                seconds[name].append(time.process_time() - begin)
    return seconds


def peer_of(kind: type[optim.Optimizer]) -> tuple[Callable[..., torch.optim.Optimizer] | None, str | None]:
    """torch's class of the same name, and the fastest of its implementations."""
    theirs = getattr(torch.optim, kind.__name__, None)
    if theirs is None:
        return None, None
    known = inspect.signature(theirs).parameters
    return theirs, next((way for way in ("fused", "foreach") if way in known), "for-loop")


def matrices(small: bool) -> list[Shape]:
    """25 M elements, or 1 M if ``small``."""
    return [(99, 100)] * 100 + [(10, 10)] * 100 if small else [(495, 500)] * 100 + [(50, 50)] * 100


def parameters(shapes: list[Shape]) -> list[torch.nn.Parameter]:
    """Random ones, with gradients."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in made:
        param.grad = torch.randn(param.shape, generator=generator)
    return made


def kinds(only: list[str]) -> Iterator[type[optim.Optimizer]]:
    """The optimizers that run in kernels, which those are that shard; the reference is not meant to be fast."""
    for name in only or optim.__all__:
        kind = getattr(optim, name)
        if hasattr(kind, "rule") and compile_rule(kind.rule).is_shardable:
            yield kind


def report(results: list[Result], numel: int, threads: int) -> str:
    """A page for people."""
    about = machine.describe()
    lines = [
        f"{about['cpu']}, torch {about['torch']}, {numel:,} float32 parameters in 200 matrices, {threads} thread(s), "
        f"{about['date']}, load {about['load']:.1f}",
        "",
        "| optimizer | CPU ms | GB/s | torch's | CPU ms | torch's time / ours: median (quartiles) |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        ours, ratio = statistics.median(result.ours_s), result.ratio
        line = f"| {result.name} | {1e3 * ours:.1f} | {result.step_bytes / ours / 1e9:.1f} "
        if ratio is None:
            line += "| – | – | – |"
        else:
            theirs = statistics.median(result.theirs_s)
            line += f"| {result.peer} | {1e3 * theirs:.1f} | {ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f}) |"
        lines.append(line)
    ratios = [result.ratio.median for result in results if result.ratio]
    if ratios:
        lines += ["", f"Median of the ratios: {statistics.median(ratios):.2f}; the smallest: {min(ratios):.2f}."]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=__doc__)
    parser.add_argument("only", nargs="*", help="names of optimizers (all)")
    parser.add_argument("--small", action="store_true", help="1 M parameters: does it run at all?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = matrices(options.small)
    results = []
    for kind in kinds(options.only):
        results.append(measured(kind, shapes, options.rounds))
        gc.collect()
    print(report(results, sum(rows * columns for rows, columns in shapes), options.threads))


if __name__ == "__main__":
    main()
