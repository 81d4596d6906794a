"""What is run: the model's size and the shape of a session, as plain data that travels as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the GPT; the defaults are the benchmark's model of 25.6 M parameters."""

    layers: int = 8
    dim: int = 512
    heads: int = 8
    seq: int = 256
    vocab: int = 256
    batch: int = 2


QUICK_MODEL = ModelConfig(layers=2, dim=64, heads=4, seq=32, vocab=64)

MODELS = {
    "25m": ModelConfig(),
    "100m": ModelConfig(dim=1024, heads=16),
    "tiny": ModelConfig(layers=24, dim=64, heads=4, seq=16),
}
"""By name; "tiny" has 293 tensors and next to no arithmetic, so it shows what a library costs the host."""


@dataclass(frozen=True)
class SessionConfig:
    """One session: every contestant takes ``steps`` steps a round; the first round is thrown away."""

    contestants: tuple[str, ...]
    model: ModelConfig = field(default_factory=ModelConfig)
    ranks: int = 2
    rounds: int = 8
    steps: int = 3
    seed: int = 0
    timeout_s: float = 600.0
