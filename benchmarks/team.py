"""A contestant as the driver sees it: its worker processes, paused until they are given a turn."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.config import SessionConfig
from benchmarks.names import processes

Message = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}


class ContestantFailed(Exception):
    """A worker died, answered with an error, or did not answer in time."""


class Team:
    """The processes of one contestant."""

    def __init__(self, name: str, dtype: str, config: SessionConfig, folder: Path) -> None:
        self.name = name
        self.timeout_s = config.timeout_s
        self.folder = folder
        self.workers = [self._spawn(rank) for rank in range(processes(name, config.ranks))]
        try:
            self.params_numel = self._build(dtype, config)
        except BaseException:
            self.kill()
            raise
        self._signal(signal.SIGSTOP)

    def _spawn(self, rank: int) -> subprocess.Popen[str]:
        with open(self._log(rank), "w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
            )

    def _log(self, rank: int) -> Path:
        return self.folder / f"{self.name}.{rank}.log"

    def _build(self, dtype: str, config: SessionConfig) -> int:
        common = {
            "name": self.name,
            "dtype": dtype,
            "ranks": config.ranks,
            "store": str(self.folder / f"{self.name}.store"),
            "model": asdict(config.model),
            "seed": config.seed,
            "timeout_s": config.timeout_s,
        }
        replies = self._ask([common | {"rank": rank} for rank in range(len(self.workers))])
        return int(replies[0]["params_numel"])

    def turn(self, steps: int) -> list[list[Message]]:
        """Let all ranks take ``steps`` steps now; the records by step, then by rank."""
        self._signal(signal.SIGCONT)
        self._ask([{"steps": steps}] * len(self.workers))
        replies = self._ask([{"met": True}] * len(self.workers))
        self._signal(signal.SIGSTOP)
        return [list(records) for records in zip(*(reply["steps"] for reply in replies), strict=True)]

    def finish(self) -> list[Message]:
        """End the processes in good order; what each says of its memory."""
        self._signal(signal.SIGCONT)
        replies = self._ask([{"stop": True}] * len(self.workers))
        for worker in self.workers:
            try:
                worker.wait(timeout=10)
            except subprocess.TimeoutExpired:
                worker.kill()  # its figures are in; a hang while it leaves is not the benchmark's matter
        return replies

    def kill(self) -> None:
        """End whatever still runs."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Pause and wake: gloo's threads poll a hundred times a second even when nothing is to be done."""
        for worker in self.workers:
            worker.send_signal(number)

    def _ask(self, requests: list[Message]) -> list[Message]:
        for worker, request in zip(self.workers, requests, strict=True):
            assert worker.stdin is not None
            try:
                worker.stdin.write(json.dumps(request) + "\n")
                worker.stdin.flush()
            except BrokenPipeError:
                continue  # its reply, or the lack of one, tells why
        return self._answers()

    def _answers(self) -> list[Message]:
        """One line from each worker, in any order: a dead rank must not hide behind one that waits for it."""
        replies: dict[int, Message] = {}
        with selectors.DefaultSelector() as selector:
            for rank, worker in enumerate(self.workers):
                assert worker.stdout is not None
                selector.register(worker.stdout, selectors.EVENT_READ, rank)
            while len(replies) < len(self.workers):
                events = selector.select(self.timeout_s)
                if not events:
                    raise ContestantFailed(f"no answer within {self.timeout_s:.0f} s")
                for key, _ in events:
                    replies[key.data] = self._answer(key.data)
                    selector.unregister(key.fileobj)
        return [replies[rank] for rank in range(len(self.workers))]

    def _answer(self, rank: int) -> Message:
        stdout = self.workers[rank].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise ContestantFailed(f"rank {rank} died: {self._last_words(rank)}")
        reply: Message = json.loads(line)
        if "error" in reply:
            raise ContestantFailed(f"rank {rank}: {scrub(reply['error'])}")
        return reply

    def _last_words(self, rank: int) -> str:
        lines = self._log(rank).read_text(errors="replace").strip().splitlines()
        return scrub(lines[-1]) if lines else "no message"


def scrub(text: str) -> str:
    """Results are published: no paths of this machine in them, and not more than a line or two."""
    return " ".join(text.replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".").split())[:300]
