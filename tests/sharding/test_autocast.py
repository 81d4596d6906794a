"""torch.autocast around forward: parameters in float32, the same bits on any shards, and what torch's DDP computes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import shardstep as ss
from tests.sharding.models import Tied, Tokens, two_groups

MIXED = {"inner.blocks.0": 3, "inner.blocks.1": 1, "inner.blocks.*": 2, "": 0}
STAGES = (0, 1, 2, 3, MIXED)
LEAVES, STEPS = 4, 2


class Twice(nn.Module):
    """A language model one of whose blocks is used twice, so that autocast's cache serves it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tied()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inner.embed(tokens[:, :-1])
        for block in (*self.inner.blocks, self.inner.blocks[0]):
            x = block(x, use_all=True)
        return self.inner.head(x)


def loss_of(model: nn.Module, step: int, leaf: int, dtype: torch.dtype, cache: bool) -> Tensor:
    """Computed outside the model, inside the region."""
    tokens = torch.stack([Tokens()[(step * LEAVES + leaf) * 2 + i] for i in range(2)])
    with torch.autocast("cpu", dtype=dtype, cache_enabled=cache):
        logits = model(tokens)
        assert logits.dtype in (dtype, torch.float32)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def model_and_parameters() -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(1)
    model = Twice().eval()
    return model, two_groups(model)


def ours(dtype: torch.dtype, cache: bool, options: dict[str, Any]) -> tuple[str, list[list[float]]]:
    """The digest, and the parameters."""
    model, groups = model_and_parameters()
    optimizer = ss.optim.AdamW(groups, lr=1e-2)
    sharded = ss.shard(model, optimizer, **options)
    for step in range(STEPS):
        for leaf in range(sharded.rank, LEAVES, sharded.world_size):
            loss_of(model, step, leaf, dtype, cache).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer), [sharded.full_param(n).flatten().tolist() for n, _ in model.named_parameters()]


def ours_of(runs: list[tuple[torch.dtype, bool, dict[str, Any]]]) -> list[Any]:
    return [ours(*run) for run in runs]


def ddp(dtype: torch.dtype) -> list[list[float]]:
    """The same by torch's DDP, which divides by the ranks; it accumulates micro-batches in float32 as well."""
    model, groups = model_and_parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    wrapped = DistributedDataParallel(model)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(STEPS):
        for leaf in range(rank, LEAVES, size):
            (loss_of(wrapped, step, leaf, dtype, True) / (LEAVES / size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().flatten().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_autocast_has_the_same_bits_on_any_shards(ranks, cache):
    wanted = ours(torch.bfloat16, cache, {"stage": 0})
    runs = [(torch.bfloat16, cache, {"stage": stage}) for stage in STAGES]
    for size in (1, 2):
        for results in ranks(size).run(ours_of, runs):
            assert results == [wanted] * len(runs)


def test_autocast_trains_as_under_ddp(ranks):
    _, parameters = ours(torch.bfloat16, True, {"stage": 0})
    for theirs in ranks(2).run(ddp, torch.bfloat16):
        for one, other in zip(parameters, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-3, atol=2e-4)


def test_autocast_in_float16_with_a_loss_scale(ranks):
    options = {"loss_scale": 2.0**12}
    wanted = ours(torch.float16, True, {"stage": 0, **options})
    plain = ours(torch.bfloat16, True, {"stage": 0})
    for results in ranks(2).run(ours_of, [(torch.float16, True, {"stage": stage, **options}) for stage in (1, 3)]):
        assert results == [wanted] * 2
    for one, other in zip(wanted[1], plain[1], strict=True):
        assert (torch.tensor(one) - torch.tensor(other)).abs().mean() < 1e-3


@pytest.mark.parametrize("write", ["step", "set_full_param", "gathered", "state dict"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_region_around_several_steps_sees_new_values(stage, write):
    """torch's own cache would go on with casts of the old ones: an optimizer of torch's trains on them silently."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer = ss.optim.SGD(model.parameters(), lr=1.0)
    sharded = ss.shard(model, optimizer, stage=stage)
    x, new = torch.eye(4), torch.full((4, 4), 3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().sum().backward()
        if write == "step":
            optimizer.step()
            new = sharded.full_param("0.weight")
        elif write == "set_full_param":
            sharded.set_full_param("0.weight", new)
        elif write == "gathered":
            with ss.gathered(model), torch.no_grad():
                model[0].weight.copy_(new)
        else:
            model.load_state_dict({"0.weight": new})
        assert torch.equal(model(x), new.bfloat16().T)


def test_an_average_is_seen_inside_a_region():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer = ss.optim.SGD(model.parameters(), lr=1.0)
    sharded = ss.shard(model, optimizer, stage=2)
    average = ss.Average(model, decay=0.5)
    average.update()
    first = sharded.full_param("0.weight")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.eye(4)).float().sum().backward()
        optimizer.step()
        now = sharded.full_param("0.weight")
        assert torch.equal(model(torch.eye(4)), now.bfloat16().T)
        with average.applied():
            assert torch.equal(model(torch.eye(4)), first.bfloat16().T)
        assert torch.equal(model(torch.eye(4)), now.bfloat16().T)
