"""The contestants' names and what follows from a name. No torch here, so that the driver stays small."""

from __future__ import annotations

PEERS = ("ddp", "ddp-fused", "fsdp2", "fsdp2-fused")
OURS = ("stage0", "stage1", "stage2", "stage3")
DEFAULT = ("plain", "plain-x2", *PEERS, *OURS)
KNOWN = (*DEFAULT, "plain-fused", "plain-x2-fused")


def processes(name: str, ranks: int) -> int:
    """``plain`` is one process beside an idle core; everybody else keeps all ranks' cores busy."""
    return 1 if name in ("plain", "plain-fused") else ranks


def communicates(name: str) -> bool:
    """The plain loops have no process group, also where several of them run side by side."""
    return not name.startswith("plain")


def stage_of(name: str) -> int | None:
    """The stage of one of our own contestants; None for a peer."""
    return int(name.removeprefix("stage")) if name in OURS else None


def formula_sent_bytes(name: str, dtype: str, params_numel: int, ranks: int) -> float | None:
    """What one rank must send in a step: 2Ψ(N−1)/N, or 3Ψ(N−1)/N where parameters are sharded.

    One micro-batch a rank and step. Ψ in bytes of the dtype that travels; DDP under autocast reduces fp32.
    """
    if not communicates(name):
        return None
    times = 3 if name.startswith("fsdp2") or stage_of(name) == 3 else 2
    element_bytes = 2 if dtype == "bf16" and not name.startswith("ddp") else 4
    return times * params_numel * element_bytes * (ranks - 1) / ranks
