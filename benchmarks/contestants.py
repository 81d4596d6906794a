"""The contestants: how each library is asked to train the same model. One builder a library."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.model import GPT

LR = 3e-4


@dataclass
class Loop:
    """What one training step needs; ``sharded`` is the handle of our own contestants."""

    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    sharded: Any = None

    def step(self, batch: Tensor) -> Tensor:
        """The loop that every user writes."""
        loss = self.forward(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


@dataclass
class EngineLoop:
    """A training step in DeepSpeed's words."""

    engine: Any
    sharded: None = None

    def step(self, batch: Tensor) -> Tensor:
        """The loop that DeepSpeed's users write."""
        loss: Tensor = self.engine(batch)
        self.engine.backward(loss)
        self.engine.step()
        return loss


Builder = Callable[[GPT, str], Loop | EngineLoop]


def adamw(module: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """torch's AdamW: ``fused`` as asked, or the default that torch picks (on CPU: its for-loop)."""
    if fused:
        return torch.optim.AdamW(module.parameters(), lr=LR, fused=True)
    return torch.optim.AdamW(module.parameters(), lr=LR)


def autocast(module: nn.Module, dtype: str) -> Callable[[Tensor], Tensor]:
    """The module's forward, under bf16 autocast when ``dtype`` asks for it (parameters stay fp32)."""

    def forward(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss: Tensor = module(batch)
        return loss

    return forward


def build_plain(model: GPT, dtype: str, fused: bool = False) -> Loop:
    """One process, no communication."""
    return Loop(autocast(model, dtype), adamw(model, fused))


def build_ddp(model: GPT, dtype: str, fused: bool = False) -> Loop:
    """DistributedDataParallel with its default settings."""
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model)
    return Loop(autocast(wrapped, dtype), adamw(wrapped, fused))


def build_fsdp2(model: GPT, dtype: str, fused: bool = False) -> Loop:
    """``fully_shard`` on every block and the root, default resharding (a block is freed after forward)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16 if dtype == "bf16" else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half),
    }
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return Loop(model, adamw(model, fused))


def build_ddp_zero(model: GPT, dtype: str) -> Loop:
    """DistributedDataParallel with torch's ZeroRedundancyOptimizer, which shards the optimizer's state (stage 1)."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, lr=LR, fused=True)
    return Loop(autocast(wrapped, dtype), optimizer)


def build_deepspeed(model: GPT, dtype: str, stage: int, tuned: bool = False) -> EngineLoop:
    """DeepSpeed with torch's fused AdamW, without clipping (it clips to 1.0 by default).

    ``tuned``: sized by the model's blocks, since stage 3 frees nothing of models of this size by default.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)}
    import deepspeed

    zero: dict[str, Any] = {"stage": stage}
    if tuned:
        numel = 2 * max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
        zero |= {"reduce_bucket_size": numel, "stage3_prefetch_bucket_size": numel, "stage3_max_live_parameters": numel}
        zero |= {"stage3_max_reuse_distance": 0, "sub_group_size": numel, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw(model, fused=True), config=config, dist_init_required=False
    )
    return EngineLoop(engine)


def build_shardstep(model: GPT, dtype: str, stage: int) -> Loop:
    """shardstep with its default settings at one stage."""
    import shardstep as ss

    options: dict[str, Any] = {"stage": stage}
    if dtype == "bf16":
        options["precision"] = ss.Precision(params=torch.bfloat16, reduce=torch.bfloat16, master=torch.float32)
    optimizer = ss.optim.AdamW(model.parameters(), lr=LR)
    sharded = ss.shard(model, optimizer, **options)
    return Loop(model, optimizer, sharded)


BUILDERS: dict[str, Builder] = {
    "plain": build_plain,
    "plain-fused": partial(build_plain, fused=True),
    "plain-x2": build_plain,
    "plain-x2-fused": partial(build_plain, fused=True),
    "ddp": build_ddp,
    "ddp-fused": partial(build_ddp, fused=True),
    "fsdp2": build_fsdp2,
    "fsdp2-fused": partial(build_fsdp2, fused=True),
    "ddp-zero": build_ddp_zero,
    "deepspeed1": partial(build_deepspeed, stage=1),
    "deepspeed2": partial(build_deepspeed, stage=2),
    "deepspeed3": partial(build_deepspeed, stage=3),
    "deepspeed3-tuned": partial(build_deepspeed, stage=3, tuned=True),
    "stage0": partial(build_shardstep, stage=0),
    "stage1": partial(build_shardstep, stage=1),
    "stage2": partial(build_shardstep, stage=2),
    "stage3": partial(build_shardstep, stage=3),
    "stage3-alone": partial(build_shardstep, stage=3),
}
