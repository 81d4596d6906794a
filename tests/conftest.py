"""Warm ranks: processes that are started once a session and run one test function after another.

``ranks(n)`` gives a team whose ``run(function, *args)`` calls a module-level function on each of n ranks, which
are connected over gloo, and returns what each returned. ``ranks(n, machines=m)`` has them believe that they are on m
machines. One rank runs here, without a process group. The
number of threads is the same everywhere: it is part of the bits.
"""

import multiprocessing
import os
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from shardstep import collectives
from shardstep.collectives import neighbours, reading
from shardstep.sharding import units

THREADS = 1
TIMEOUT_S = 20.0
torch.set_num_threads(THREADS)
units.SMALL_NUMEL = 0  # the models here are tiny, and most tests are about units that are not joined
hypothesis.settings.register_profile("shardstep", deadline=None)  # the machines that run this are shared
hypothesis.settings.load_profile("shardstep")


class RankFailed(Exception):
    """A rank raised; carries the type name and text of what each rank raised (None where it did not)."""

    def __init__(self, failures: list[tuple[str, str] | None], report: str) -> None:
        super().__init__(report)
        self.failures = failures


class Team:
    """``size`` processes in one process group, restarted after a failure (which may have broken the group)."""

    def __init__(self, size: int, machines: int = 1) -> None:
        self.size, self._machines = size, machines
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returned on each rank. Raises RankFailed if any of them raised."""
        if self.size == 1:
            return [function(*args)]
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((None, ("died", f"exit status {self._processes[rank].exitcode}"), ""))
        if any(failure for _, failure, _ in answers):
            self.stop()
            report = "\n".join(f"rank {rank}: {text}" for rank, (_, _, text) in enumerate(answers) if text)
            raise RankFailed([failure for _, failure, _ in answers], report)
        return [result for result, _, _ in answers]

    def stop(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.terminate()
            process.join()
            pipe.close()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "shardstep.sharding"])  # once, not in each of the ranks
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (rank, self.size, self._machines, store, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)


def _serve(rank: int, size: int, machines: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(THREADS)
    neighbours._machine = lambda: 1 + rank * machines // size
    collectives.connect_local(rank, size, store, TIMEOUT_S)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((function(*args), None, ""))
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            pipe.send((None, (type(error).__name__, str(error)), text))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., Team]]:
    teams: dict[tuple[int, int], Team] = {}

    def team(size: int, machines: int = 1) -> Team:
        return teams.setdefault((size, machines), Team(size, machines))

    yield team
    for one in teams.values():
        one.stop()


@pytest.fixture(scope="session")
def neighbourly() -> None:
    """Where the system does not let a process read another one's memory, no ranks are neighbours."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        reading.read_into(torch.empty(1), child.pid, 8)
    except RuntimeError as error:
        allowed = "Bad address" in str(error)
    finally:
        child.kill()
        child.wait()
    if not allowed and "neighbours" not in os.environ.get("SHARDSTEP_REQUIRE", "").split(","):
        pytest.skip("this system does not let a process read another one's memory")
