"""One rank of one contestant: a process that blocks on its stdin and trains when it is told to.

Requests and replies are lines of JSON. Stdout is kept for replies alone; whatever else is printed goes to
stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO

import torch
import torch.distributed as dist

from benchmarks.config import ModelConfig
from benchmarks.contestants import BUILDERS, EngineLoop, Loop
from benchmarks.model import Batches, make_model
from benchmarks.names import communicates

Message = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """The process's cumulative counters at one moment."""

    wall_s: float
    user_s: float
    sys_s: float
    faults: int
    sent_bytes: int | None
    wait_s: float | None
    calls: int | None

    @classmethod
    def take(cls, sharded: Any) -> Reading:
        """All threads of this process; ``sharded`` is our handle with its counters, or None for a peer."""
        traffic = getattr(sharded, "traffic", None)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        wall_s = time.perf_counter()
        counters = (traffic.sent_bytes, traffic.wait_s, traffic.calls) if traffic is not None else (None,) * 3
        return cls(wall_s, usage.ru_utime, usage.ru_stime, usage.ru_minflt, *counters)

    def since(self, before: Reading) -> Message:
        """What happened between two readings."""
        names = self.__dataclass_fields__
        pairs = ((name, getattr(self, name), getattr(before, name)) for name in names)
        return {name: now - then for name, now, then in pairs if now is not None and then is not None}


def join(spec: Message) -> None:
    """A gloo group on loopback through a file: the same transport for all contestants."""
    store = dist.FileStore(spec["store"], spec["ranks"])  # type: ignore[attr-defined]
    timeout = timedelta(seconds=spec["timeout_s"])
    dist.init_process_group("gloo", store=store, rank=spec["rank"], world_size=spec["ranks"], timeout=timeout)


def train(loop: Loop | EngineLoop, batches: Batches, steps: int, meet: Callable[[], None]) -> list[Message]:
    """Take the steps. The last one ends when all ranks meet, so that background work counts too."""
    records = []
    for index in range(steps):
        batch = batches.next()
        before = Reading.take(loop.sharded)
        loss = loop.step(batch)
        if index == steps - 1:
            meet()
        records.append(Reading.take(loop.sharded).since(before) | {"loss": loss.item()})
    return records


def byte_counts(sharded: Any) -> Message:
    """The engine's own account of its buffers: measured peak and formula, where it has them."""
    counts = {}
    for part in ("peak", "formula"):
        value = sharded
        for attribute in ("bytes", part, "total"):
            value = getattr(value, attribute, None)
        if value is not None:
            counts[f"bytes_{part}"] = int(value)
    return counts


def rss_peak_bytes() -> int:
    """The high-water mark of this process's resident memory (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Driver:
    """The other end of the pipes."""

    requests: TextIO
    replies: TextIO

    def ask(self) -> Message:
        """The next request; an end of the stream means that the driver is gone."""
        line = self.requests.readline()
        message: Message = json.loads(line) if line else {"stop": True}
        return message

    def reply(self, message: Message) -> None:
        """Answer the last request."""
        print(json.dumps(message), file=self.replies, flush=True)

    def meet(self) -> None:
        """Say that this rank has arrived, and wait until all have."""
        self.reply({"arrived": True})
        self.ask()


def serve(driver: Driver) -> None:
    """Build the contestant from the first request, then answer ``steps`` until ``stop``."""
    spec = driver.ask()
    config = ModelConfig(**spec["model"])
    base_bytes = rss_peak_bytes()
    if communicates(spec["name"]):
        join(spec)
    model = make_model(config, spec["seed"])
    params_numel = sum(p.numel() for p in model.parameters())
    batches = Batches.make(config, spec["seed"], spec["rank"])
    loop = BUILDERS[spec["name"]](model, spec["dtype"])
    driver.reply({"params_numel": params_numel})
    while "steps" in (request := driver.ask()):
        driver.reply({"steps": train(loop, batches, request["steps"], driver.meet)})
    memory = {"rss_base_bytes": base_bytes, "rss_peak_bytes": rss_peak_bytes()}
    driver.reply(memory | byte_counts(loop.sharded))


def die_with_parent() -> None:
    """Ask Linux to end this process with the driver: a paused worker would not notice by itself."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, int(signal.SIGKILL))


def main() -> None:
    """Keep the real stdout for replies, run, and report an exception as the last reply."""
    die_with_parent()
    driver = Driver(sys.stdin, os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    torch.set_num_threads(1)
    try:
        serve(driver)
    except Exception as error:
        driver.reply({"error": f"{type(error).__name__}: {error}"})
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
