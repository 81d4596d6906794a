"""The first law: one digest for every world size, stage, schedule, prefetch depth, with clipping and dropout."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import shardstep as ss
from tests.sharding.models import BF16, Convolutions, Images, Tied, Tokens, train

MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}
SHARDING_GRADS = (2, 3, MIXED)
STAGES = (0, 1, *SHARDING_GRADS)


def digest_of_run(options: dict[str, Any]) -> str:
    model, optimizer, _ = train(Tied, Tokens(), **options)
    return ss.digest(model, optimizer)


def digests_of_runs(all_options: list[dict[str, Any]]) -> list[str]:
    return [digest_of_run(options) for options in all_options]


@cache
def reference(bf16: bool, clip: bool, leaves: int = 4) -> str:
    return digest_of_run({"stage": 0, "leaves": leaves, **chosen(bf16, clip)})


def chosen(bf16: bool, clip: bool) -> dict[str, Any]:
    return {"precision": BF16 if bf16 else None, "clip_norm": 0.05 if clip else None}


def every_layout() -> list[dict[str, Any]]:
    per_leaf = [{"stage": stage, "prefetch": prefetch} for stage in STAGES for prefetch in (0, 2)]
    per_step = [{"stage": stage, "schedule": "per step"} for stage in (0, 1, {"blocks.1": 0, "*": 1})]
    return per_leaf + per_step


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("world_size", "machines"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)])
def test_every_layout_gives_the_bits_of_the_one_rank_run(ranks, world_size, machines, bf16, clip):
    layouts = every_layout()
    runs = [{**layout, **chosen(bf16, clip)} for layout in layouts]
    for digests in ranks(world_size, machines).run(digests_of_runs, runs):
        differing = [layout for layout, d in zip(layouts, digests, strict=True) if d != reference(bf16, clip)]
        assert not differing


def test_the_digest_sees_what_should_differ():
    assert reference(False, False) != reference(False, True)
    assert reference(False, False) != reference(True, False)
    assert reference(False, False) != digest_of_run({"stage": 0, "steps": 2})


@pytest.mark.parametrize(("world_size", "leaves"), [(2, 6), (3, 6), (3, 3), (4, 12), (2, 2)])
def test_numbers_of_leaves_that_are_no_power_of_two(ranks, world_size, leaves):
    runs = [{"stage": stage, "leaves": leaves, "clip_norm": 0.05, "precision": BF16} for stage in STAGES]
    runs += [{**run, "precision": None} for run in runs]
    wanted = [reference(run["precision"] is not None, True, leaves) for run in runs]
    for digests in ranks(world_size).run(digests_of_runs, runs):
        assert digests == wanted


def convolution_run(options: dict[str, Any]) -> tuple[str, dict[str, list[float]]]:
    model, optimizer, _ = train(Convolutions, Images(), **options)
    buffers = {name: buffer.flatten().tolist() for name, buffer in model.named_buffers()}
    return ss.digest(model, optimizer), buffers


@pytest.mark.parametrize("units", [None, ["stages.*.*"], [nn.BatchNorm2d, "head"]], ids=["found", "named", "classes"])
def test_batch_norm_and_nested_containers(ranks, units):
    wanted, _ = convolution_run({"stage": 0})
    for stage in (1, 3):
        results = ranks(2).run(convolution_run, {"stage": stage, "units": units})
        assert [digest for digest, _ in results] == [wanted, wanted]
        assert results[0][1] == results[1][1], "running statistics follow rank 0"


def unsharded_run() -> str:
    torch.manual_seed(1)
    model = Tied().double()
    optimizer = ss.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        torch.manual_seed(step)
        model(torch.stack([Tokens()[i] for i in range(4)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer)


def one_leaf_run() -> str:
    torch.manual_seed(1)
    model = Tied().double()
    optimizer = ss.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ss.shard(model, optimizer, stage=3)
    for step in range(3):
        torch.manual_seed(step)
        model(torch.stack([Tokens()[i] for i in range(4)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer)


def test_one_micro_batch_gives_the_bits_of_the_optimizer_alone_in_float64():
    assert one_leaf_run() == unsharded_run()
