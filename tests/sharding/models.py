"""Small models with everything that makes sharding hard, and one loop that trains any of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardstep as ss


class Block(nn.Module):
    """Odd sizes, dropout, a frozen parameter, one of a single element, and one that is used now and then."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 15)
        self.down = nn.Linear(15, width, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, width), requires_grad=False)
        self.sometimes = nn.Linear(width, width)

    def forward(self, x: Tensor, use_all: bool) -> Tensor:
        y = self.down(F.dropout(F.gelu(self.up(self.norm(x) * self.frozen)), 0.2, self.training)) * self.gain
        return x + y + (self.sometimes(x) if use_all else 0)


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, width: int = 7, vocabulary: int = 50, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for number, block in enumerate(self.blocks):
            x = block(x, use_all=bool((tokens[0, 0] + number) % 2))
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), tokens[:, 1:].flatten())


class Convolutions(nn.Module):
    """BatchNorm and nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.stages = nn.ModuleDict(
            {name: nn.Sequential(*(self._block() for _ in range(2))) for name in ("early", "late")}
        )
        self.head = nn.Linear(5, 4)

    @staticmethod
    def _block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        x = self.stem(x)
        for stage in self.stages.values():
            x = x + stage(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), label)


class Tokens:
    """A map-style dataset of token windows."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(50, (9,), generator=torch.Generator().manual_seed(index))


class Images:
    """A map-style dataset of (image, label)."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 6, 6, generator=generator), torch.randint(4, (), generator=generator)


BF16 = ss.Precision(params=torch.bfloat16, reduce=torch.bfloat16, master=torch.float32)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """No decay and a higher rate for vectors, as people have it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "lr": 2e-2},
    ]


def train(
    make: Callable[[], nn.Module],
    dataset: Any,
    *,
    leaves: int = 4,
    micro_batch: int = 2,
    steps: int = 3,
    **options: Any,
) -> tuple[nn.Module, ss.optim.AdamW, ss.Sharded]:
    """Train a fresh model for a few steps with ``shard(**options)``."""
    torch.manual_seed(1)
    model = make()
    optimizer = ss.optim.AdamW(two_groups(model), lr=1e-2)
    sharded = ss.shard(model, optimizer, **options)
    for micro in sharded.micro_batches(dataset, global_batch=leaves * micro_batch, micro_batch=micro_batch, seed=5):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if micro.step == steps - 1:
                break
    return model, optimizer, sharded
