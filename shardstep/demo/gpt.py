"""A small GPT over bytes: pre-norm blocks, causal attention, a GELU MLP, learned positions.

An ordinary module that never hears of shards. Its loss and its logits both come out of ``forward``, because
whole parameters exist only while a forward of the model runs.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The default has about 6.4 M parameters."""

    layers: int = 8
    width: int = 256
    heads: int = 4
    context: int = 128
    vocabulary: int = BYTES
    dropout: float = 0.0


class Attention(nn.Module):
    """Causal self-attention with all heads in one projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.inputs = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        query, key, value = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output


class Block(nn.Module):
    """Attention, then an MLP, each added to what came in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class GPT(nn.Module):
    """A decoder whose forward gives the loss of predicting each next byte, or the logits."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self._initialise()

    def forward(self, batch: Tensor, *, return_logits: bool = False) -> Tensor:
        """The mean loss of a (batch, time + 1) batch, or all its (batch, time, vocabulary) logits."""
        if return_logits:
            return self._logits(batch)
        logits = self._logits(batch[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def _logits(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _initialise(self) -> None:
        """GPT-2's, but with larger embeddings: it learns faster when bytes differ from the start."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=self._std(name))

    def _std(self, name: str) -> float:
        if name.startswith(("tokens", "positions")):
            return 0.5 if name.startswith("tokens") else 0.25
        writes_to_stream = name.endswith(("attention.output.weight", "mlp.2.weight"))
        return 0.02 / math.sqrt(2 * self.config.layers) if writes_to_stream else 0.02


@torch.no_grad()
def generate(model: nn.Module, prompt: bytes, numel: int, *, context: int, seed: int) -> bytes:
    """``prompt`` continued by ``numel`` bytes drawn from the model at temperature 0.8."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(numel):
        logits = model(torch.tensor([tokens[-context:]]), return_logits=True)[0, -1].float()
        chances = torch.softmax(logits / 0.8, dim=-1)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(tokens)
