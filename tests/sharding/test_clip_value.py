"""Clipping by value: torch's clip_grad_value_ of the mean gradient, with the same bits on any shards."""

from typing import Any

import pytest
import torch
from torch import nn

import shardstep as ss
from tests.sharding.models import BF16, Tied, Tokens, train

LAYOUTS = [{"stage": stage} for stage in (0, 1, 2, 3)] + [{"stage": 0, "schedule": "per step"}]
KINDS = [{"clip_value": 2.0**-6}, {"clip_value": 2.0**-6, "precision": BF16}, {"clip_value": 0.01, "leaves": 3}]


def digests_of(runs: list[dict[str, Any]]) -> list[str]:
    return [ss.digest(*train(Tied, Tokens(), steps=2, **run)[:2]) for run in runs]


def test_clipping_by_value_has_the_same_bits_everywhere(ranks):
    wanted = digests_of([{"stage": 0, **kind} for kind in KINDS])
    assert wanted[0] != digests_of([{"stage": 0}])[0]
    runs = [{**layout, **kind} for layout in LAYOUTS for kind in KINDS[:2]]
    for digests in ranks(2).run(digests_of, runs):
        assert digests == wanted[:2] * len(LAYOUTS)
    assert digests_of([{"stage": 3, **KINDS[2]}]) == wanted[2:]


@pytest.mark.parametrize("scale", [None, 2.0**10])
@pytest.mark.parametrize("leaves", [1, 3])
def test_clipping_by_value_means_what_torch_means(leaves, scale):
    """After one step of SGD with lr 1, what has moved is the clipped mean; a scale of the loss changes nothing."""
    results = []
    for ours in (False, True):
        torch.manual_seed(1)
        model = Tied().eval()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = (ss.optim.SGD if ours else torch.optim.SGD)(trained, lr=1.0)
        if ours:
            ss.shard(model, optimizer, stage=1, clip_value=0.02, loss_scale=scale)
        for leaf in range(leaves):
            (model(torch.stack([Tokens()[leaf]])) / (1 if ours else leaves)).backward()
        if not ours:
            nn.utils.clip_grad_value_(trained, 0.02)
        optimizer.step()
        results.append([p.detach().clone() for p in trained])
    for ours, torchs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


class Product(nn.Module):
    """Its input is its parameter's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


@pytest.mark.parametrize(("scale", "moved", "skipped"), [(None, [-0.5, -0.25], 0), (4.0, [0.0, 0.0], 1)])
def test_an_infinity_is_clipped_as_in_torch_and_left_out_under_a_scale(scale, moved, skipped):
    model = Product()
    optimizer = ss.optim.SGD(model.parameters(), lr=1.0)
    sharded = ss.shard(model, optimizer, clip_value=0.5, loss_scale=scale)
    model(torch.tensor([float("inf"), 0.25])).backward()
    optimizer.step()
    assert (sharded.full_param("weight").tolist(), sharded.skipped) == (moved, skipped)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clip_value": 0}, "clip_value to be a positive number or None, got 0"),
        ({"clip_value": "1"}, "clip_value to be a positive number or None, got '1'"),
        ({"clip_value": 1.0, "clip_norm": 2.0}, "clip_value=1.0 and clip_norm=2.0; leave one out"),
    ],
)
def test_what_is_refused(options, text):
    model = nn.Linear(2, 2)
    with pytest.raises(ss.ConfigError, match=text):
        ss.shard(model, ss.optim.SGD(model.parameters()), **options)


def test_an_optimizer_that_clips_by_the_norm_is_refused_too():
    model = nn.Linear(2, 2)
    optimizer = ss.optim.keras.SGD(list(model.parameters()), global_clipnorm=1.0)
    with pytest.raises(ss.ConfigError, match=r"clip_value=1.0 and an optimizer that clips by the norm"):
        ss.shard(model, optimizer, clip_value=1.0)
