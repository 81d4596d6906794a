"""A rule that looks at whole tensors in some branch runs as one of elements where that branch is not taken."""

from typing import Any

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.optim import keras
from shardstep.rules import rule
from shardstep.rules.compiled import CompiledRule, compile_rule
from shardstep.rules.flags import compile_plainness
from shardstep.rules.functions import mean, norm
from shardstep.rules.language import state, zeros
from shardstep.rules.lower import program_of
from tests.sharding.models import Tied, Tokens, two_groups


@rule
def late(param, grad, *, step, lr=0.1, limit=0.0, centre=False, after=0):
    g = grad
    if step > after:
        g = g / norm(grad) * limit if limit > 0 else g
    if centre:
        g = g - mean(grad)
    return param - lr * g


@rule
def always(param, grad, *, lr=0.1, fast=False):
    g = 2 * grad if fast else grad
    return param - lr * g / norm(grad)


@rule
def by_dimensions(param, grad, m=zeros, *, ndim, lr=0.1, clips=False):
    if ndim > 1:
        m = m + grad
    g = grad / norm(grad) if clips else grad
    return param - lr * g, m


@rule
def counted(param, grad, count=state(shape="tensor"), *, lr=0.1, clips=False):
    g = grad / norm(grad) if clips else grad
    return param - lr / (count + 1) * g, count + 1


@pytest.mark.parametrize(
    ("given", "flags", "plain"),
    [
        (late, {}, True),
        (late, {"limit": 1.0}, False),
        (late, {"limit": 1.0, "after": 100}, False),
        (late, {"centre": True}, False),
        (late, {"limit": torch.tensor(0.0)}, True),
        (always, {}, False),
        (always, {"fast": True}, False),
        (by_dimensions, {}, False),
        (counted, {}, False),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else str(value),
)
def test_a_branch_counts_where_it_may_be_taken_at_some_step(given, flags, plain):
    is_plain = compile_plainness(program_of(given))
    assert is_plain({**given.hyperparameters, **flags}) == plain
    assert is_plain({**given.hyperparameters, **flags}) == plain, "and again, from what was found"


def test_all_groups_must_agree():
    compiled = compile_rule(keras.Adam.rule)
    one, other = (keras.Adam([nn.Parameter(torch.ones(2))], clipnorm=clip).hypers for clip in (None, 1.0))
    assert compiled.is_plain_with(one)
    assert not compiled.is_plain_with(other)
    assert not compiled.is_plain_with([*one, *other])
    assert compiled.is_by_tensor_with([*one, *other])
    assert compile_rule(keras.Adam.rule.stored(momentum="dynamic8")).is_by_tensor_with(one)


def trained(clips: tuple[float, float], stage: int) -> tuple[str, list[int]]:
    """Keras's Adam with two groups: the digest, and how many segments each update had."""
    lengths: list[int] = []
    update = CompiledRule.update

    def counting(self: CompiledRule, batch: Any, groups: Any) -> None:
        lengths.append(len(batch.segments))
        update(self, batch, groups)

    torch.manual_seed(1)
    model = Tied()
    groups = [
        {"params": group["params"], "clipnorm": clip} for group, clip in zip(two_groups(model), clips, strict=True)
    ]
    optimizer = keras.Adam(groups, learning_rate=0.01)
    sharded = ss.shard(model, optimizer, stage=stage)
    CompiledRule.update = counting  # type: ignore[method-assign]
    try:
        for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=5):
            model(micro.batch).backward()
            if micro.last:
                optimizer.step()
                optimizer.zero_grad()
                if micro.step == 1:
                    break
    finally:
        CompiledRule.update = update  # type: ignore[method-assign]
    return ss.digest(model, optimizer), lengths


def all_trained(runs: list[tuple[tuple[float, float], int]]) -> list[str]:
    return [trained(clips, stage)[0] for clips, stage in runs]


def test_without_clipping_a_segment_runs_over_tensors():
    (off, few), (on, many) = trained((0.0, 0.0), 1), trained((0.0, 0.1), 1)
    assert (max(few), max(many)) == (5, 8), "runs of a group in a block, and tensors of a block"
    assert off != on


@pytest.mark.parametrize("clips", [(0.0, 0.0), (0.0, 0.1), (0.1, 0.1)], ids=["off", "one group", "on"])
def test_the_bits_do_not_depend_on_the_cut(ranks, clips):
    expected = trained(clips, 0)[0]
    for world_size in (1, 2, 4):
        for found in ranks(world_size).run(all_trained, [(clips, stage) for stage in (0, 1, 2, 3)]):
            assert found == [expected] * 4


def test_a_group_that_does_not_clip_has_the_bits_that_it_has_alone():
    """One optimizer with a group that clips, which is updated tensor by tensor, and one without."""
    torch.manual_seed(0)
    start, grad = torch.randn(7, 5), torch.randn(7, 5)
    results = []
    for others in ([], [{"params": [nn.Parameter(torch.ones(3))], "clipnorm": 1.0}]):
        param = nn.Parameter(start.clone())
        optimizer = keras.Adam([{"params": [param]}, *others], use_ema=True)
        for _ in range(3):
            for group in optimizer.param_groups:
                group["params"][0].grad = grad.clone() if group["params"][0] is param else torch.ones(3)
            optimizer.step()
        results.append([param.detach(), *optimizer.state[param].values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
