"""Starts local ranks: processes on this machine that run one function and hand back its results.

Results and failures travel to the parent as JSON over private pipes. This room never listens on anything,
never starts a rank on another machine (that is ``torchrun``'s job) and never restarts one that died.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn

import torch

from shardstep import collectives
from shardstep.errors import CollectiveError, ConfigError

GRACE_S = 5.0
"""How long the other ranks may go on once one has failed: enough to say which collective they were in."""


def run_local(
    function: Callable[..., Any], world_size: int, *args: Any, threads: int = 1, timeout_s: float = 300.0
) -> list[Any]:
    """What ``function(*args)`` returned on each of ``world_size`` local ranks, in rank order.

    ``function`` must be importable by name and return JSON-able values. ``timeout_s`` bounds each collective,
    not the run. One rank runs in this process, without any process group.
    """
    if world_size < 1:
        raise ConfigError(
            f"expected a world size of at least 1 for run_local, got {world_size}; start at least one rank"
        )
    if world_size == 1:
        return [_run_here(function, args, threads)]
    with tempfile.TemporaryDirectory(prefix="shardstep-") as folder:
        spec = _Spec(world_size, str(Path(folder) / "store"), threads, timeout_s)
        with _bounded_heap():
            ranks = [_start(rank, spec, function, args) for rank in range(world_size)]
        try:
            _collect(ranks)
        finally:
            _end(ranks)
    _raise_first_cause(ranks)
    return [rank.report["result"] for rank in ranks if rank.report is not None]


@dataclass(frozen=True)
class _Spec:
    """What every rank must agree on."""

    world_size: int
    store_path: str
    threads: int
    timeout_s: float


@dataclass
class _Rank:
    """The parent's view of one rank. ``report`` stays None when it died without a word."""

    rank: int
    process: SpawnProcess
    pipe: Connection
    report: dict[str, Any] | None = field(default=None)
    done: bool = field(default=False)

    @property
    def failed(self) -> bool:
        return self.done and (self.report is None or "error" in self.report)


def _run_here(function: Callable[..., Any], args: tuple[Any, ...], threads: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # the number of threads decides the order of sums, so it is part of the bits
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)


# --- the parent's side


@contextmanager
def _bounded_heap() -> Iterator[None]:
    """Processes started inside keep no per-thread caches in glibc's malloc, unless the user has tuned it.

    gloo's threads free small blocks that the main thread allocated; in their caches these split the heap, and
    with glibc 2.36 a rank grew by 0.5 MB a step over hundreds of steps (FSDP2 likewise). Without, it stays, and
    the CPU time is the same.
    """
    if "GLIBC_TUNABLES" in os.environ:
        yield
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0"
    try:
        yield
    finally:
        del os.environ["GLIBC_TUNABLES"]


def _start(rank: int, spec: _Spec, function: Callable[..., Any], args: tuple[Any, ...]) -> _Rank:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_run_rank, args=(rank, spec, theirs, function, args), name=f"rank {rank}", daemon=True
    )
    process.start()
    theirs.close()  # so that the child's end is the only one, and its death reads as the end of the pipe
    return _Rank(rank, process, ours)


def _collect(ranks: Sequence[_Rank]) -> None:
    """Wait until every rank has reported; after the first failure, only for the grace."""
    deadline: float | None = None
    while pending := [rank for rank in ranks if not rank.done]:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        ready = wait([rank.pipe for rank in pending], left)
        for rank in pending:
            if rank.pipe in ready:
                _read_report(rank)
        if deadline is None and any(rank.failed for rank in ranks):
            deadline = time.monotonic() + GRACE_S


def _read_report(rank: _Rank) -> None:
    rank.done = True
    try:
        rank.report = json.loads(rank.pipe.recv_bytes())
    except (EOFError, ConnectionError):
        rank.process.join()


def _end(ranks: Sequence[_Rank]) -> None:
    """Leave no process behind, however the run ended."""
    complete = all(rank.done and not rank.failed for rank in ranks)
    for rank in ranks:
        if complete:
            rank.process.join(GRACE_S)
        rank.process.terminate()
    for rank in ranks:
        rank.process.join(GRACE_S)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
        rank.pipe.close()


def _raise_first_cause(ranks: Sequence[_Rank]) -> None:
    """Raise for the failure that is the cause; the other ranks fail because their peer is gone."""
    failed = [rank for rank in ranks if rank.failed]
    if not failed:
        return
    cause = min(failed, key=_echo)
    if cause.report is None:
        raise CollectiveError(f"rank {cause.rank} ended {_manner(cause.process)}, before it returned a result")
    sys.stderr.write(cause.report["traceback"])
    raise CollectiveError(f"rank {cause.rank} ended with {cause.report['error']}: {cause.report['text']}")


def _echo(rank: _Rank) -> tuple[int, float]:
    """How likely a failure only echoes another one: a silent death never does, a failed collective mostly."""
    if rank.report is None:
        return 0, 0.0
    return (2 if rank.report["collective"] else 1), rank.report["failed_at"]


def _manner(process: SpawnProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"by signal {signal.Signals(-code).name}"
    return f"with exit status {code}"


# --- the rank's side


def _run_rank(rank: int, spec: _Spec, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(spec.threads)
        collectives.connect_local(rank, spec.world_size, spec.store_path, spec.timeout_s)
        report = json.dumps({"result": function(*args)})
        collectives.disconnect()
        status = 0
    except BaseException as error:
        collectives.tell_failure(error)
        report, status = json.dumps(_describe(error)), 1
    pipe.send_bytes(report.encode())
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End at once: threads of torch that still run while the interpreter is taken down may abort or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _describe(error: BaseException) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "text": str(error),
        "collective": isinstance(error, CollectiveError),
        "failed_at": time.time(),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _end_with_parent() -> None:
    """A parent that is killed outright cannot end its ranks, so they watch it and end themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
