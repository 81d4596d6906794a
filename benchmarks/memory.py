"""``python -m benchmarks.memory``: the most bytes of tensors that each contestant's process holds at once.

Peak RSS also counts the heap's holes, the libraries that were loaded and what they keep. Here torch's own record of
allocations is added up, from before the model is built to the end of the third step: what the allocator of a GPU would
call the peak. Beside ours stands what the formula of its buffers and the model's activations come to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import arguments, machine
from benchmarks.config import DTYPES, MODELS, ModelConfig
from benchmarks.contestants import BUILDERS
from benchmarks.model import GPT, Batches, make_model
from benchmarks.names import KNOWN, communicates, processes, stage_of
from benchmarks.team import ENVIRONMENT

STEPS = 3
DEFAULT = "plain-fused,ddp-fused,fsdp2-fused,stage0,stage1,stage2,stage3"


def peak_of(run: Callable[[], object], folder: Path) -> int:
    """The most bytes of tensors made during ``run`` that live at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    path = folder / f"{os.getpid()}.json"
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    made = [event["args"] for event in sorted(events, key=lambda event: event["ts"])]
    path.unlink()
    before = int(made[0]["Total Allocated"]) - int(made[0]["Bytes"])
    return max(int(event["Total Allocated"]) for event in made) - before


def activations(model: GPT, batch: torch.Tensor, dtype: str, folder: Path) -> int:
    """The peak of one pass forward and backward beside the parameters; gradients are dropped when they are made."""
    plain = model.to(torch.bfloat16) if dtype == "bf16" else model
    for parameter in plain.parameters():
        parameter.register_post_accumulate_grad_hook(_drop)
    return peak_of(lambda: plain(batch).backward(), folder)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def train(rank: int, name: str, dtype: str, config: ModelConfig, ranks: int, folder: str) -> None:
    """One rank of one contestant; leaves its figures in a file."""
    torch.set_num_threads(1)
    if communicates(name):
        store = dist.FileStore(f"{folder}/{name}.store", ranks)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    batches = Batches.make(config, 0, rank)
    told: dict[str, Any] = {}

    def run() -> None:
        loop = BUILDERS[name](make_model(config, 0), dtype)
        for _ in range(STEPS):
            loop.step(batches.next())
        if loop.sharded is not None:
            told["formula"] = loop.sharded.bytes.formula.total

    told["peak"] = peak_of(run, Path(folder))
    if rank == 0 and told.get("formula"):
        told["activations"] = activations(make_model(config, 0), batches.next(), dtype, Path(folder))
    Path(folder, f"{name}.{rank}.told").write_text(json.dumps(told))
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(name: str, dtype: str, config: ModelConfig, ranks: int) -> dict[str, int]:
    """The figures of the fuller rank."""
    count = processes(name, ranks)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        mp.spawn(train, (name, dtype, config, ranks, folder), nprocs=count)  # type: ignore[no-untyped-call]
        told = [json.loads(Path(folder, f"{name}.{rank}.told").read_text()) for rank in range(count)]
    return {key: max(rank.get(key, 0) for rank in told) for key in ("peak", "formula", "activations")}


def report(dtype: str, figures: dict[str, dict[str, int]]) -> str:
    """One table."""
    rows = [["contestant", "peak MB", "formula", "activations", "peak / (formula + activations)"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for name, told in figures.items():
        cells = [name, f"{told['peak'] / 1e6:.1f}"]
        if stage_of(name) is not None:
            expected = told["formula"] + told["activations"]
            cells += [f"{told['formula'] / 1e6:.1f}", f"{told['activations'] / 1e6:.1f}"]
            cells += [f"{told['peak'] / expected:.3f}"]
        rows.append([*cells, *[""] * (len(rows[0]) - len(cells))])
    return "\n".join([f"### {dtype}", "", *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> int:
    """Run one contestant after the other and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="both")
    parser.add_argument("--contestants", type=arguments.names, default=DEFAULT, help=f"from: {','.join(KNOWN)}")
    parser.add_argument("--model", choices=MODELS, default="25m")
    parser.add_argument("--ranks", type=arguments.positive, default=2)
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    about = machine.describe()
    print(
        f"{about['system']}, torch {about['torch']}, {about['date']}; {options.model}, {options.ranks} ranks",
        end="\n\n",
    )
    for dtype in DTYPES if options.dtype == "both" else (options.dtype,):
        contestants = options.contestants
        figures = {name: measure(name, dtype, MODELS[options.model], options.ranks) for name in contestants}
        print(report(dtype, figures), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
