"""Rules with rows, columns and one number for each tensor on shards: the bits of one rank, and known bytes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardstep as ss
from shardstep.rules.functions import col_mean, fma, lerp, maximum, mean, row_mean, rsqrt, sqrt


@ss.rule
def by_lines(
    param,
    grad,
    row=ss.state(shape="row"),
    column=ss.state(0.5, shape="column"),
    power=ss.state(1.0, shape="tensor"),
    variance=ss.zeros,
    start=ss.state("param"),
    *,
    ndim,
    lr=0.01,
    beta=0.9,
    norms=False,
):
    """All kinds of states; which of them a parameter has depends on its dimensions."""
    power = power * beta
    if ndim > 1:
        row = lerp(row_mean(grad**2), row, beta)
        column = lerp(col_mean(grad**2), column, beta)
        update = grad * rsqrt(row / maximum(col_mean(row), 1e-30) + 1e-12) * rsqrt(column + 1e-12)
    else:
        variance = fma(1 - beta, grad**2, beta * variance)
        update = grad * rsqrt(variance / (1 - power) + 1e-12)
    if ndim == 1:
        start = lerp(start, param, 0.5)
        update = update + 0.1 * (param - start)
    if norms:
        update = update / maximum(1.0, sqrt(mean(update**2)))
    return param - lr * update, row, column, power, variance, start


ByLines = by_lines.optimizer()


class Shapes(nn.Module):
    """Parameters of no to four dimensions, a frozen one, and one that is used now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 36)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.mix = nn.Parameter(torch.randn(2, 36, 40) / 6)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(36), requires_grad=False)
        self.sometimes = nn.Linear(36, 36)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1]) * self.gain * self.frozen
        for block in self.blocks:
            x = x + F.gelu(block(x.unflatten(2, (9, 4)).permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(2)
        if int(tokens[0, 0]) % 2:
            x = self.sometimes(x)
        logits = (x @ self.mix).mean(0) if x.ndim == 4 else (x @ self.mix.sum(0))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Tokens:
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(40, (9,), generator=torch.Generator().manual_seed(index))


def run(stage: Any, *, norms: bool = False, bf16: bool = False, reload: bool = False) -> str:
    torch.manual_seed(2)
    model = Shapes()
    optimizer = ByLines([p for p in model.parameters() if p.requires_grad], lr=0.01, norms=norms)
    precision = ss.Precision(torch.bfloat16, torch.bfloat16) if bf16 else None
    sharded = ss.shard(model, optimizer, stage=stage, precision=precision)
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=1):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if reload:
                optimizer.load_state_dict(optimizer.state_dict())
    assert sharded.bytes.peak.state == sharded.bytes.formula.state
    return ss.digest(model, optimizer)


@pytest.mark.parametrize(
    "options", [{}, {"norms": True}, {"bf16": True, "reload": True}], ids=["lines", "norms", "bf16 reloaded"]
)
def test_every_layout_gives_the_bits_of_one_rank(ranks, options):
    want = run(0, **options)
    for world_size in (1, 2, 4):
        for stage in (0, 1, 2, 3):
            assert set(ranks(world_size).run(run_with, stage, options)) == {want}, (world_size, stage)


def run_with(stage: int, options: dict[str, Any]) -> str:
    return run(stage, **options)


def alone_and_on_one_rank() -> tuple[str, str]:
    digests = []
    for shards in (False, True):
        torch.manual_seed(1)
        model = Shapes()
        optimizer = ByLines([p for p in model.parameters() if p.requires_grad])
        if shards:
            ss.shard(model, optimizer, stage=3)
        for step in range(3):
            model(torch.stack([Tokens()[4 * step + i] for i in range(4)])).backward()
            optimizer.step()
            optimizer.zero_grad()
        digests.append(ss.digest(model, optimizer))
    return digests[0], digests[1]


def test_rows_and_columns_give_the_bits_of_the_optimizer_alone():
    alone, sharded = alone_and_on_one_rank()
    assert alone == sharded


def shapes_of_states(stage: int) -> dict[str, dict[str, tuple[int, ...]]]:
    torch.manual_seed(2)
    model = Shapes()
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    optimizer = ByLines(named.values())
    ss.shard(model, optimizer, stage=stage)
    model(torch.stack([Tokens()[i] for i in range(4)])).backward()
    optimizer.step()
    states = optimizer.state_dict()["state"]
    assert {values.dtype for state in states.values() for values in state.values()} == {torch.float32}
    return {list(named)[i]: {name: tuple(v.shape) for name, v in state.items()} for i, state in states.items()}


def test_a_parameter_has_the_states_of_its_dimensions(ranks):
    one, other = ranks(2).run(shapes_of_states, 3)
    assert one == other
    assert one["gain"] == {"step": (), "power": (), "variance": ()}
    assert one["blocks.0.weight"] == {"step": (), "row": (4, 4, 3, 1), "column": (4, 4, 1, 3), "power": ()}
    assert one["blocks.0.bias"] == {"step": (), "power": (), "variance": (4,), "start": (4,)}
