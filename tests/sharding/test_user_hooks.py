"""Hooks of users on gradients: what they see of a sharded parameter, what they may change, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from tests.sharding.models import BF16, Tied, Tokens, two_groups

STAGES = (0, 1, 2, 3)
NAME = "blocks.1.up.weight"
LEAVES = 4


def trained(install: Callable[[nn.Module], None], stage: int, late: bool, **options: Any) -> str:
    """The digest of two steps with hooks that ``install`` registers before shard(), or ``late`` after it."""
    torch.manual_seed(1)
    model = Tied()
    optimizer = ss.optim.AdamW(two_groups(model), lr=1e-2)
    if not late:
        install(model)
    sharded = ss.shard(model, optimizer, stage=stage, **options)
    if late:
        install(model)
    for micro in sharded.micro_batches(Tokens(), global_batch=2 * LEAVES, micro_batch=2, seed=5):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if micro.step == 1:
                break
    return ss.digest(model, optimizer)


def nothing(model: nn.Module) -> None:
    pass


def clip_each(model: nn.Module) -> None:
    """Changes the gradient of each micro-batch."""
    model.get_parameter(NAME).register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))


def clip_each_after(model: nn.Module) -> None:
    """The same, where autograd has put it into ``.grad``."""

    def clip(parameter: Tensor) -> None:
        parameter.grad.clamp_(-1e-3, 1e-3)

    model.get_parameter(NAME).register_post_accumulate_grad_hook(clip)


def runs_of(runs: list[tuple[Any, ...]]) -> list[str]:
    return [trained(install, stage, late, precision=precision) for install, stage, late, precision in runs]


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
def test_hooks_on_gradients_change_each_leaf_at_every_stage(ranks, precision):
    wanted = trained(clip_each, 0, late=False, precision=precision)
    assert wanted != trained(nothing, 0, late=False, precision=precision)
    kinds = [(clip_each, False), (clip_each, True), (clip_each_after, False)]
    runs = [(install, stage, late, precision) for stage in STAGES for install, late in kinds]
    for digests in ranks(2).run(runs_of, runs):
        assert digests == [wanted] * len(runs)


def small(**options: Any) -> tuple[nn.Module, ss.optim.SGD]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = ss.optim.SGD(model.parameters(), lr=0.5)
    return model, optimizer


@pytest.mark.parametrize("stage", STAGES)
def test_a_hook_sees_the_gradient_of_this_micro_batch_alone(stage):
    model, optimizer = small()
    seen: list[tuple[str, Tensor]] = []
    weight = model[0].weight
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(("after", p.grad.clone())))
    ss.shard(model, optimizer, stage=stage)
    handle = weight.register_hook(lambda grad: seen.append(("before", grad.clone())))
    for _ in range(2):
        model(torch.ones(4, 3)).sum().backward()
    assert [what for what, _ in seen] == ["before", "after"] * 2
    assert all(torch.equal(grad, seen[0][1]) for _, grad in seen)
    handle.remove()
    model(torch.ones(4, 3)).sum().backward()
    assert len(seen) == 5


def test_a_hook_that_runs_after_ours_is_told_that_the_gradient_is_spread():
    model, optimizer = small()
    ss.shard(model, optimizer, stage=2)
    seen = []

    def look(parameter: Tensor) -> None:
        assert parameter.grad.shape == (2, 3)
        with pytest.raises(ss.UnsupportedError, match=r"values of the gradient of '0.weight'.*register_hook"):
            parameter.grad.mul_(2)
        seen.append(True)

    model[0].weight.register_post_accumulate_grad_hook(look)
    model(torch.ones(4, 3)).sum().backward()
    assert seen == [True]


def test_a_gradient_that_a_hook_has_taken_away_is_missed():
    """As hooks do that step an optimizer of their own in backward."""
    model, optimizer = small()

    def take(parameter: Tensor) -> None:
        parameter.grad = None

    model[0].weight.register_post_accumulate_grad_hook(take)
    ss.shard(model, optimizer, stage=1)
    with pytest.raises(ss.SequenceError, match=r"gradient of '0.weight' in .grad .*, got None: a hook .* took it away"):
        model(torch.ones(4, 3)).sum().backward()


@pytest.mark.parametrize("stage", STAGES)
def test_hooks_on_modules_and_the_scale_of_the_loss(stage):
    """Module backward hooks work; with a loss scale, what hooks inside the model see is scaled."""
    seen: dict[float, list[Tensor]] = {}
    for scale in (None, 8.0):
        model, optimizer = small()
        ss.shard(model, optimizer, stage=stage, units=["1"], loss_scale=scale)
        own = seen.setdefault(scale or 1.0, [])
        model[1].register_full_backward_hook(lambda module, grad_in, grad_out, own=own: own.append(grad_out[0].clone()))
        model[1].weight.register_hook(lambda grad, own=own: own.append(grad.clone()))
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
    assert [len(grads) for grads in seen.values()] == [2, 2]
    for plain, scaled in zip(seen[1.0], seen[8.0], strict=True):
        assert torch.equal(plain * 8, scaled)
