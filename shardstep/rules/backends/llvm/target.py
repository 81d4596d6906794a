"""Which machine code is made for. Plain data: the compiler asks LLVM whether it can."""

from dataclasses import dataclass
from typing import Final

from shardstep.errors import RuleError


class TargetUnsupported(RuleError):
    """LLVM cannot make code for this machine, or not the code that was asked for."""


@dataclass(frozen=True)
class Target:
    """``cpu`` and ``features`` in LLVM's words. ``x86``: whether the code may use what only those machines have."""

    cpu: str
    features: str
    x86: bool


NAMED: Final = {
    "sse2": ("x86-64", "sse2"),
    "avx2": ("x86-64-v3", "avx2"),
    "avx512": ("x86-64-v4", "avx512vl"),
}
"""Name to LLVM's name of the cpu, and a feature that the machine must have to run it. To compare bits with."""
