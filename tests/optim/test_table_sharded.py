"""Every optimizer of the table gives the bits of one rank at every world size and stage, and those of itself alone."""

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from tests.optim.table import ROWS, Row

LEAVES, STEPS = 4, 2
STAGES = (0, 1, 2, 3)
SHARDABLE = {row.name: row for row in ROWS if row.shards}


class Small(nn.Module):
    """Two units that every world size cuts, and a root; all of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(47, 47) for _ in range(2)])
        self.head = nn.Linear(47, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x).square().mean()


def batch(step: int, leaf: int) -> Tensor:
    return torch.randn(2, 47, generator=torch.Generator().manual_seed(LEAVES * step + leaf))


def model_and_optimizer(row: Row) -> tuple[nn.Module, torch.optim.Optimizer]:
    """With the last of the configurations, which asks for most."""
    torch.manual_seed(4)
    model = Small()
    return model, row.optimizer(model.parameters(), **list(row.configs.values())[-1])


def sharded_digest(name: str, stage: int) -> str:
    """The schedule per leaf: rank r takes the leaves r, r + world size, …"""
    model, optimizer = model_and_optimizer(SHARDABLE[name])
    ss.shard(model, optimizer, stage=stage)
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ranked() else (0, 1)
    for step in range(STEPS):
        for leaf in range(rank, LEAVES, size):
            model(batch(step, leaf)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer)


def ranked() -> bool:
    return torch.distributed.is_initialized()


def sharded_digests(stages: tuple[int, ...]) -> dict[str, list[str]]:
    return {name: [sharded_digest(name, stage) for stage in stages] for name in SHARDABLE}


def alone_digest(row: Row) -> str:
    """Of the mean over the leaves' gradients, added as the tree adds them."""
    model, optimizer = model_and_optimizer(row)
    for step in range(STEPS):
        leaves = [torch.autograd.grad(model(batch(step, leaf)), list(model.parameters())) for leaf in range(LEAVES)]
        for param, (a, b, c, d) in zip(model.parameters(), zip(*leaves, strict=True), strict=True):
            param.grad = ((a + b) + (c + d)) / LEAVES
        optimizer.step()
    return ss.digest(model, optimizer)


@pytest.fixture(scope="module")
def expected(ranks) -> dict[str, str]:
    return {name: digests[0] for name, digests in ranks(1).run(sharded_digests, (0,))[0].items()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_world_size_and_stage_gives_the_bits_of_one_rank(ranks, expected, world_size):
    for digests in ranks(world_size).run(sharded_digests, STAGES):
        assert digests == {name: [digest] * len(STAGES) for name, digest in expected.items()}


@pytest.mark.parametrize("name", [name for name, row in SHARDABLE.items() if row.locality == "elementwise"])
def test_an_optimizer_alone_gives_the_same_bits(expected, name):
    """Where there are no sums over tensors, whose borders of blocks are those of the flat space."""
    assert alone_digest(SHARDABLE[name]) == expected[name]
