"""One training of the GPT as a single rank sees it: the loop that users write, and the figures it leaves.

Says nothing to the terminal and starts no process; whoever calls it decides what is shown and where it runs.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import shardstep as ss
from shardstep.demo.gpt import GPT, GPTConfig, generate
from shardstep.demo.text import Corpus, load_corpus
from shardstep.errors import ConfigError

PrecisionName = Literal["fp32", "bf16"]

WARM_UP_SHARE = 0.1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's numbers (all but ``stage``) and how it is sharded (``stage``)."""

    stage: int = 3
    steps: int = 120
    micro_batches: int = 4  # a step's leaves, over all ranks
    micro_batch: int = 4  # windows in each
    seed: int = 0
    precision: PrecisionName = "fp32"
    text: Path | None = None  # None is the standard library's source
    lr: float = 2e-3
    clip_norm: float = 1.0
    held_out_batches: int = 8
    sample_bytes: int = 0
    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batches", "micro_batch", "held_out_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} to be at least 1, got {getattr(self, name)}")

    @property
    def global_batch(self) -> int:
        return self.micro_batches * self.micro_batch


@dataclass(frozen=True)
class StepReport:
    """What one rank knows after a step; ``loss`` is the mean over its own micro-batches."""

    step: int
    loss: float
    lr: float
    step_s: float


@dataclass(frozen=True)
class Outcome:
    """What is left of a run on one rank. Plain values, so that it travels as JSON."""

    rank: int
    world_size: int
    stage: int
    params: int
    steps: int
    loss_first: float
    loss_last: float
    sha256: str
    bytes: dict[str, dict[str, int]]
    peak_rss_bytes: int
    step_s_median: float
    sample: str

    @property
    def held_bytes(self) -> int:
        """The most that parameters, gradients and optimizer state took."""
        return self.bytes["peak"]["total"]


class Training:
    """A sharded model on its way through a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.corpus = read_corpus(recipe)
        self.model, self.optimizer, self.scheduler = build(recipe)
        self.params = sum(parameter.numel() for parameter in self.model.parameters())
        self.sharded = ss.shard(
            self.model,
            self.optimizer,
            stage=recipe.stage,
            precision=precision_named(recipe.precision),
            clip_norm=recipe.clip_norm,
        )

    def steps(self) -> Iterator[StepReport]:
        """Train; yields after each step."""
        begin, losses, step = time.perf_counter(), list[float](), 0
        for micro in self._micro_batches():
            loss = self.model(micro.batch)
            loss.backward()
            losses.append(loss.item())
            if micro.last:
                lr = float(self.optimizer.param_groups[0]["lr"])
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
                step += 1
                yield StepReport(step, statistics.mean(losses), lr, time.perf_counter() - begin)
                if step == self.recipe.steps:
                    return
                begin, losses = time.perf_counter(), []

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss. Every rank walks all the windows, so each world size gives the same float."""
        self.model.eval()
        width = self.recipe.micro_batch
        losses = [
            float(self.model(torch.stack([self.corpus.held_out[index] for index in range(first, first + width)])))
            for first in range(0, self.recipe.held_out_batches * width, width)
        ]
        self.model.train()
        return statistics.mean(losses)

    def sample(self) -> str:
        """What the model writes after "def ": read from whole parameters, on every rank alike."""
        if not self.recipe.sample_bytes:
            return ""
        self.model.eval()
        with ss.gathered(self.model):
            text = generate(
                self.model,
                b"def ",
                self.recipe.sample_bytes,
                context=self.recipe.model.context,
                seed=self.recipe.seed,
            )
        return text.decode(errors="replace")

    def _micro_batches(self) -> Iterator[ss.MicroBatch]:
        steps_an_epoch = len(self.corpus.training) // self.recipe.global_batch
        return self.sharded.micro_batches(
            self.corpus.training,
            global_batch=self.recipe.global_batch,
            micro_batch=self.recipe.micro_batch,
            seed=self.recipe.seed,
            epochs=math.ceil(self.recipe.steps / steps_an_epoch),
        )


def train(recipe: Recipe, watch: Callable[[StepReport], None] | None = None) -> Outcome:
    """Train as the recipe says; ``watch`` hears of each step on rank 0."""
    training = Training(recipe)
    loss_first = training.held_out_loss()
    step_s = []
    for report in training.steps():
        step_s.append(report.step_s)
        if watch is not None and training.sharded.rank == 0:
            watch(report)
    held = _bytes(training.sharded)  # before digest and sample, which gather more than a step does
    return Outcome(
        rank=training.sharded.rank,
        world_size=training.sharded.world_size,
        stage=recipe.stage,
        params=training.params,
        steps=recipe.steps,
        loss_first=loss_first,
        loss_last=training.held_out_loss(),
        sha256=ss.digest(training.model, training.optimizer),
        bytes=held,
        peak_rss_bytes=peak_rss_bytes(),
        step_s_median=statistics.median(step_s),
        sample=training.sample(),
    )


def train_rank(recipe: Recipe) -> dict[str, Any]:
    """`train` for ``run_local``: says nothing and returns plain values."""
    return asdict(train(recipe))


def read_corpus(recipe: Recipe) -> Corpus:
    """The recipe's text, or a ConfigError that says why it will not do."""
    return load_corpus(
        recipe.text,
        context=recipe.model.context,
        training_windows=recipe.global_batch,
        held_out_windows=recipe.held_out_batches * recipe.micro_batch,
    )


def build(recipe: Recipe) -> tuple[GPT, ss.optim.AdamW, LRScheduler]:
    """The seeded model, its optimizer and torch's own schedule: a short warm-up, then a cosine."""
    torch.manual_seed(recipe.seed)
    model = GPT(recipe.model)
    optimizer = ss.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, int(recipe.steps * WARM_UP_SHARE))
    parts: list[LRScheduler] = [
        LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up),
        CosineAnnealingLR(optimizer, max(1, recipe.steps - warm_up), eta_min=recipe.lr / 20),
    ]
    return model, optimizer, SequentialLR(optimizer, parts, milestones=[warm_up])


def precision_named(name: PrecisionName) -> ss.Precision | None:
    """None keeps the parameters' own fp32."""
    return ss.Precision(params=torch.bfloat16, reduce=torch.bfloat16) if name == "bf16" else None


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, interpreter and torch included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _bytes(sharded: ss.Sharded) -> dict[str, dict[str, int]]:
    books = {
        "peak": sharded.bytes.peak,
        "formula": sharded.bytes.formula,
        "unsharded": sharded.bytes.unsharded,
    }
    return {name: {**asdict(book), "total": book.total} for name, book in books.items()}
