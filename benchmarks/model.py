"""The GPT that every contestant trains, and its batches: random tokens, a function of the seed alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.config import ModelConfig


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_1 = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        self.norm_2 = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def attend(self, x: Tensor) -> Tensor:
        """Causal self-attention."""
        batch, seq, dim = x.shape
        shape = (batch, seq, self.heads, dim // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).split(dim, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, seq, dim))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the feed-forward part, each added to the residual stream."""
        x = x + self.attend(self.norm_1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return out


class GPT(nn.Module):
    """Tokens of shape ``(batch, seq + 1)`` in, the mean next-token loss out (in fp32 whatever the dtype)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.seq, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.apply(_init)

    def forward(self, batch: Tensor) -> Tensor:
        """The loss of one micro-batch."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def make_model(config: ModelConfig, seed: int) -> GPT:
    """The same initial bits in every process of every contestant."""
    torch.manual_seed(seed)
    return GPT(config)


@dataclass
class Batches:
    """A small pool of batches, repeated; made before the clock runs."""

    pool: list[Tensor]
    taken: int = 0

    @classmethod
    def make(cls, config: ModelConfig, seed: int, rank: int, size: int = 8) -> Batches:
        """Each rank its own tokens; the low ids are more frequent, so that there is something to learn."""
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + rank)
        shape = (config.batch, config.seq + 1)
        draws = (torch.rand(shape, generator=generator) ** 2 * config.vocab for _ in range(size))
        return cls([draw.long().clamp_(max=config.vocab - 1) for draw in draws])

    def next(self) -> Tensor:
        """The next batch."""
        batch = self.pool[self.taken % len(self.pool)]
        self.taken += 1
        return batch
