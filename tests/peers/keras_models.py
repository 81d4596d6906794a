"""Keras models on torch, and one plain loop that trains any of them. Ranks import this when they first run it."""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
import torch.distributed as dist
from keras import layers
from torch import Tensor

import shardstep as ss
from shardstep.sharding.modules import statistics

VOCABULARY, LENGTH, CLASSES, BATCH = 30, 6, 5, 16


class Words:
    """A map-style dataset of (words, class)."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        words = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return words, words.sum() % CLASSES


def sequential(rate: float) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(VOCABULARY, 7),
            layers.Flatten(),
            layers.Dense(13, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(rate, seed=7),  # without a seed, Keras leaves it to torch
            layers.Dense(CLASSES),
        ]
    )


def functional(rate: float) -> keras.Model:
    """Residual, of repeated blocks, with a layer that is used twice and a frozen one."""
    words = keras.Input((LENGTH,), dtype="int32")
    x = layers.Dense(9)(layers.Flatten()(layers.Embedding(VOCABULARY, 3)(words)))
    twice = layers.Dense(9, activation="tanh")
    for _ in range(2):
        inner = [layers.Dense(11, activation="relu"), layers.Dropout(rate), layers.Dense(9)]
        x = layers.add([x, keras.Sequential([keras.Input((9,)), *inner])(twice(x))])
    frozen = layers.Dense(9, trainable=False)
    return keras.Model(words, layers.Dense(CLASSES)(layers.BatchNormalization()(frozen(x))))


def build(kind: str, rate: float = 0.2) -> keras.Model:
    """A model with the same values and names every time."""
    keras.utils.clear_session(free_memory=False)  # Keras numbers its layers, and their names are the parameters'
    keras.utils.set_random_seed(3)
    return {"sequential": sequential, "functional": functional}[kind](rate)


def trained_by(model: keras.Model, name: str, **hyper: Any) -> ss.optim.Optimizer:
    optimizer = getattr(ss.optim.keras, name)
    return optimizer([variable.value for variable in model.trainable_variables], learning_rate=0.02, **hyper)


def loss_of(model: keras.Model, batch: tuple[Tensor, Tensor]) -> Tensor:
    words, labels = batch
    return torch.nn.functional.cross_entropy(model(words, training=True), labels)


def train(
    kind: str = "sequential",
    *,
    optimizer: str = "Adam",
    hyper: dict[str, Any] | None = None,
    rate: float = 0.2,
    leaves: int = 4,
    steps: int = 3,
    **options: Any,
) -> tuple[keras.Model, Any, ss.Sharded, list[float]]:
    """A few steps under ``shard(**options)``; the last item are the losses of the first micro-batches."""
    model = build(kind, rate)
    trainer = trained_by(model, optimizer, **(hyper or {}))
    sharded, losses = ss.shard(model, trainer, **options), list[float]()
    batches = sharded.micro_batches(Words(), global_batch=BATCH, micro_batch=BATCH // leaves, seed=5, epochs=99)
    for micro in batches:
        loss = loss_of(model, micro.batch)
        loss.backward()
        if micro.index == 0:
            losses.append(loss.item())
        if micro.last:
            trainer.step()
            trainer.zero_grad()
            if micro.step == steps - 1:
                break
    return model, trainer, sharded, losses


def results(world_size: int, runs: list[dict[str, Any]]) -> list[tuple[str, dict[str, list[float]]]]:
    """Of each run: the digest, after finalize_variable_values(), and the statistics of its normalizations.

    Where there are more ranks than ``world_size``, groups of so many do the same side by side.
    """
    group, found = None, []
    if 1 < world_size < dist.get_world_size():
        firsts = range(0, dist.get_world_size(), world_size)
        groups = [dist.new_group(list(range(first, first + world_size))) for first in firsts]
        group = groups[dist.get_rank() // world_size]
    for run in runs:
        model, optimizer, _, _ = train(**run, group=group)
        optimizer.finalize_variable_values()
        kept = {name: values.tolist() for name, values in statistics(model).items()}
        found.append((ss.digest(model, optimizer), kept))
    return found


def ready() -> None:
    """Nothing: a rank that has run it has imported Keras."""
