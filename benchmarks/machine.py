"""The machine: what it is, and how quiet it was while the benchmark ran."""

from __future__ import annotations

import datetime
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Cumulative counters of the whole machine. Zero where the system has no such file."""

    busy_s: float
    steal_s: float
    loopback_bytes: int

    @classmethod
    def take(cls) -> Usage:
        """Read them now."""
        fields = [int(word) for word in _read("/proc/stat").partition("\n")[0].split()[1:]] or [0] * 8
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
        busy_s = (user + nice + system + irq + softirq) * TICK_S
        return cls(busy_s, steal * TICK_S, _loopback_bytes())

    def since(self, before: Usage, wall_s: float) -> dict[str, float]:
        """What happened between two readings."""
        return {
            "wall_s": wall_s,
            "busy_s": self.busy_s - before.busy_s,
            "steal_s": self.steal_s - before.steal_s,
            "loopback_bytes": self.loopback_bytes - before.loopback_bytes,
        }


def _loopback_bytes() -> int:
    """Bytes sent over the loopback interface: gloo between local ranks sends everything there."""
    match = re.search(r"^\s*lo:\s*(.*)$", _read("/proc/net/dev"), re.MULTILINE)
    return int(match.group(1).split()[8]) if match else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def describe() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": _torch_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": os.getloadavg()[0],
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"},
    }


def available_bytes() -> int | None:
    """Memory that can still be given out without swapping."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1) if match else platform.processor() or "unknown"


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "unknown"
