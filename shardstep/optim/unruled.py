"""Optimizers that are no rule: torch's own, and why they do not run on shards."""

from collections.abc import Mapping
from typing import Final

from torch.optim import LBFGS, SparseAdam

_REASONS: Final[Mapping[type, str]] = {
    LBFGS: "it calls its closure several times a step, between updates of all parameters at once",
    SparseAdam: "a sparse gradient updates rows, which a flat shard does not know",
}


def refusal(optimizer: object) -> str:
    """The sentence that refuses to shard ``optimizer``, which is none of shardstep.optim's."""
    kind = type(optimizer)
    reason = next((why for unruled, why in _REASONS.items() if isinstance(optimizer, unruled)), None)
    return (
        f"expected an optimizer of shardstep.optim, whose rule can run on shards, got {kind.__module__}."
        f"{kind.__name__}{f': {reason}' if reason else ''}; use one of shardstep.optim, such as AdamW(...)"
    )
