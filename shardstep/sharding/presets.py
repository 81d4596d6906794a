"""Named choices of `shard`'s arguments, for those who come from elsewhere.

A preset is plain keyword arguments and nothing more: whatever it says can be said to `shard` itself.
"""

from typing import TypedDict


class MegatronOptions(TypedDict, total=False):
    """What `megatron` chooses."""

    stage: int
    schedule: str
    overlap_grad_reduce: bool
    overlap_param_gather: bool


def megatron(*, overlap_grad_reduce: bool = True, overlap_param_gather: bool = True) -> MegatronOptions:
    """Megatron's distributed optimizer: ``shard(model, optimizer, **megatron())``, beside any other arguments.

    Stage 1: gradients and parameters whole in flat buffers that are aligned to the ranks, optimizer state and masters
    sharded. ``overlap_grad_reduce``: each micro-batch's gradients travel while its backward goes on (add
    ``schedule="per step"`` to send once a step, during the last backward); without, every rank adds up its own
    micro-batches, a power of two of them, and ``optimizer.step()`` exchanges the sums. ``overlap_param_gather``:
    ``optimizer.step()`` leaves updated parameters on their way, and each unit's next forward waits for its own.
    """
    options: MegatronOptions = {"stage": 1, "overlap_param_gather": overlap_param_gather}
    if not overlap_grad_reduce:
        options |= {"schedule": "per step", "overlap_grad_reduce": overlap_grad_reduce}
    return options
