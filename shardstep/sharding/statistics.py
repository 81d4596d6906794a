"""BatchNorm's running statistics over many micro-batches: the same bits however the ranks share these.

The statistics of single micro-batches meet on every rank and are added in float64 in the order of the micro-batches'
index, where rank r has run micro-batches r, r + N, r + 2N, … of N ranks. Nothing here keeps a model in another state
than it was in, but for the running statistics themselves.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shardstep.errors import ConfigError
from shardstep.sharding.batches import MicroBatch

NAMES = ("running_mean", "running_var", "num_batches_tracked")
"""A BatchNorm's buffers."""


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """The modules that keep running statistics."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


class Ranks(Protocol):
    """Those who share the micro-batches."""

    def announce_micro_batch(self) -> None:
        """Make sure that every rank has another one."""

    def from_every_rank(self, values: Tensor) -> Iterable[Tensor]:
        """Every rank's ``values``, in the order of the ranks."""


def batch_statistics(
    model: nn.Module, norms: Mapping[str, _BatchNorm], batches: Iterable[Any], ranks: Ranks
) -> dict[str, Tensor]:
    """The mean of the micro-batches' statistics by buffer name, as torch's ``update_bn`` accumulates them.

    Overwrites the buffers of ``norms``.
    """
    sizes = [2 * norm.num_features + 1 for norm in norms.values()]
    total: Tensor | None = None
    with _accumulating(model, norms.values()), torch.no_grad():
        for batch in batches:
            ranks.announce_micro_batch()
            for norm in norms.values():
                norm.reset_running_stats()
            model(_input_of(batch))
            own = torch.cat([_sums(norm) for norm in norms.values()])
            for row in ranks.from_every_rank(own):
                total = row if total is None else total + row
    if total is None:
        raise ConfigError("expected at least one micro-batch for update_bn(), got none; is the loader used up?")
    means = zip(norms.items(), torch.split(total, sizes), strict=True)
    return {f"{name}.{key}": value for (name, norm), sums in means for key, value in _mean(norm, sums)}


def _sums(norm: _BatchNorm) -> Tensor:
    """How often the module has run in this micro-batch, and the sums of its statistics over these runs."""
    mean, var, runs = (getattr(norm, name).double() for name in NAMES)
    return torch.cat([runs.view(1), mean * runs, var * runs])


def _mean(norm: _BatchNorm, sums: Tensor) -> Iterator[tuple[str, Tensor]]:
    norm.reset_running_stats()  # for a module that has never run
    runs, *both = torch.split(sums, [1, norm.num_features, norm.num_features])
    for key, total in zip(NAMES, (*both, runs), strict=True):
        start = getattr(norm, key)
        value = total.view(start.shape) if key == NAMES[2] else total / runs
        yield key, value.to(start.dtype) if runs else start.clone()


def _input_of(batch: Any) -> Any:
    """A micro-batch as the training loop gives it to the model; of any other list or tuple the first, as torch does."""
    if isinstance(batch, MicroBatch):
        return batch.batch
    return batch[0] if isinstance(batch, list | tuple) else batch


@contextmanager
def _accumulating(model: nn.Module, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Every module trains, and ``norms`` accumulate plain means; all is as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.train()
    for norm in momenta:
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, was_training in training.items():
            module.training = was_training
