"""Which samples make up micro-batch k of a step, and which rank gets it.

The shuffle depends on the seed and the epoch, the random generators on (seed, step, k): neither on the world
size. Nothing here talks to another rank.
"""

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.utils.data import default_collate

from shardstep.config import Schedule
from shardstep.errors import ConfigError

Collate = Callable[[list[Any]], Any]


class MapDataset(Sized, Protocol):
    """A map-style dataset: a length, and samples by index."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class MicroBatch:
    """``batch`` as the collate function made it; ``index`` counts the micro-batches of all ranks in a step."""

    batch: Any
    step: int
    index: int
    last: bool


@dataclass(frozen=True)
class BatchPlan:
    """How many samples and micro-batches a step has, and which of them are this rank's."""

    samples: int
    global_batch: int
    micro_batch: int
    seed: int
    rank: int
    world_size: int
    schedule: Schedule

    def __post_init__(self) -> None:
        for field in ("global_batch", "micro_batch"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"expected {field} to be a positive integer, got {value!r}")
        if self.global_batch % self.micro_batch:
            raise ConfigError(
                f"expected global_batch to be a multiple of micro_batch, got {self.global_batch} and {self.micro_batch}"
            )
        if self.leaves % self.world_size:
            raise ConfigError(
                f"expected a number of micro-batches that the world size {self.world_size} divides, got {self.leaves} "
                f"(global_batch {self.global_batch} / micro_batch {self.micro_batch}); choose another micro_batch"
            )
        if self.schedule == "per step" and self.own_leaves & (self.own_leaves - 1) and self.world_size > 1:
            raise ConfigError(
                f"expected a power of two micro-batches on each rank for schedule='per step', got {self.own_leaves}; "
                f"use schedule='per leaf'"
            )
        if self.samples < self.global_batch:
            raise ConfigError(
                f"expected a dataset of at least global_batch={self.global_batch} samples, got {self.samples}"
            )

    @property
    def leaves(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.global_batch // self.micro_batch

    @property
    def own_leaves(self) -> int:
        return self.leaves // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    def steps(self, epochs: int, start_step: int) -> range:
        """The steps of ``epochs`` epochs, from ``start_step`` on."""
        if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
            raise ConfigError(f"expected start_step to be 0 or a positive integer, got {start_step!r}")
        return range(start_step, epochs * self.steps_per_epoch)

    def own_indices(self) -> Sequence[int]:
        """This rank's micro-batches of a step: every world_size-th per leaf, a contiguous run per step."""
        if self.schedule == "per leaf":
            return range(self.rank, self.leaves, self.world_size)
        return range(self.rank * self.own_leaves, (self.rank + 1) * self.own_leaves)

    def sample_indices(self, step: int, index: int) -> list[int]:
        """The samples of micro-batch ``index`` of ``step``; the last partial global batch of an epoch is dropped."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.samples, self.seed, epoch)
        start = within * self.global_batch + index * self.micro_batch
        picked: list[int] = order[start : start + self.micro_batch].tolist()
        return picked


@lru_cache(maxsize=2)
def _epoch_order(samples: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(_seed("epoch", seed, epoch)))


def micro_batches(
    dataset: MapDataset,
    plan: BatchPlan,
    steps: range,
    collate: Collate | None,
    leaf_hint: Callable[[int | None], None],
    seeds: Sequence[torch.Tensor] = (),
) -> Iterator[MicroBatch]:
    """This rank's micro-batches, with the random generators seeded for each.

    ``leaf_hint`` is told, with each, how many of them this rank has in a step (others may be dealt between two of them,
    for an evaluation), and None at the end. ``seeds``: states of other generators, of integers, that follow torch's.
    """
    collate = collate or default_collate
    own = plan.own_indices()
    try:
        for step, index in ((step, index) for step in steps for index in own):
            batch = collate([dataset[i] for i in plan.sample_indices(step, index)])
            seed_everything(plan.seed, step, index)
            for state in seeds:
                with torch.no_grad():
                    state.copy_(torch.randint(2**31, state.shape))
            leaf_hint(len(own))
            yield MicroBatch(batch, step, index, last=index == own[-1])
    finally:
        leaf_hint(None)


def seed_everything(seed: int, step: int, index: int) -> None:
    """Seed torch's (all devices), Python's and, where it is in use, NumPy's generators for one micro-batch."""
    value = _seed("micro-batch", seed, step, index)
    torch.manual_seed(value)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value % 2**32)


def _seed(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
