"""The contestants' names and what follows from a name. No torch here, so that the driver stays small."""

from __future__ import annotations

PEERS = ("ddp", "ddp-fused", "fsdp2", "fsdp2-fused")
OURS = ("stage0", "stage1", "stage2", "stage3")
DEFAULT = ("plain", "plain-x2", *PEERS, *OURS)
DEEPSPEED = ("deepspeed1", "deepspeed2", "deepspeed3", "deepspeed3-tuned")
"""DeepSpeed must be installed for these; it compiles a C++ extension when it is first started."""

ALONE = ("plain", "plain-fused", "stage3-alone")
"""One process beside an idle core."""

KNOWN = (*DEFAULT, "plain-fused", "plain-x2-fused", "stage3-alone", "ddp-zero", *DEEPSPEED)


def processes(name: str, ranks: int) -> int:
    """Some are one process beside an idle core; everybody else keeps all ranks' cores busy."""
    return 1 if name in ALONE else ranks


def communicates(name: str) -> bool:
    """The plain loops have no process group, also where several of them run side by side."""
    return name not in ALONE and not name.startswith("plain")


def stage_of(name: str) -> int | None:
    """The stage of one of our own contestants; None for a peer."""
    return int(name.removeprefix("stage").removesuffix("-alone")) if name in (*OURS, "stage3-alone") else None


def formula_sent_bytes(name: str, dtype: str, params_numel: int, ranks: int) -> float | None:
    """What one rank must send in a step of one micro-batch a rank: so many bytes a parameter, times Ψ(N−1)/N.

    Gathering costs a parameter its own bytes, and so does reducing a gradient: two journeys, or three where
    parameters are sharded. In bf16 all journeys are of 2 bytes, but DDP under autocast reduces and returns fp32,
    and our stage 0 returns the fp32 sum of its bf16 leaves.
    """
    if not communicates(name) or name in DEEPSPEED:
        return None
    half = 2 if dtype == "bf16" else 4
    if name.startswith("ddp"):
        journeys = 4 + 4
    elif name == "stage0":
        journeys = half + 4
    else:
        journeys = (3 if name.startswith("fsdp2") or stage_of(name) == 3 else 2) * half
    return journeys * params_numel * (ranks - 1) / ranks
