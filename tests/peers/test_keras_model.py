"""Keras models on torch train sharded in a plain loop: same bits on every layout, and what the unsharded loop gives."""

import itertools
import json
import os
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["KERAS_BACKEND"] = "torch"

import keras
from keras import layers

import shardstep as ss
from shardstep.sharding.modules import seeds
from tests.peers import keras_models
from tests.peers.keras_models import BATCH, Words, build, loss_of, results, train, trained_by

EMA = {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 2, "weight_decay": 0.01}
TRAININGS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "a norm of all": {"optimizer": "Nadam", "hyper": {"global_clipnorm": 0.1, **EMA}},
    "norms of each": {"optimizer": "Lamb", "kind": "functional", "hyper": {"clipnorm": 0.05}},
}
LAYOUTS: list[dict[str, Any]] = [
    *({"stage": stage} for stage in range(4)),
    {"stage": 3, "units": [layers.Dense, layers.Embedding]},
]


@cache
def reference(training: str) -> str:
    return results(1, [{"stage": 0, **TRAININGS[training]}])[0][0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_gives_the_bits_of_the_one_rank_run(ranks, world_size):
    team = ranks(1 if world_size == 1 else 4)  # each rank takes seconds to import Keras
    team.run(keras_models.ready)
    runs = [(training, layout) for training in TRAININGS for layout in LAYOUTS]
    everyone = team.run(results, world_size, [{**TRAININGS[training], **layout} for training, layout in runs])
    for rank in everyone:
        digests = [digest for digest, _ in rank]
        assert [run for run, digest in zip(runs, digests, strict=True) if digest != reference(run[0])] == []
        assert [kept for _, kept in rank] == [kept for _, kept in everyone[0]], "statistics follow rank 0"


def test_the_digest_sees_what_should_differ():
    assert len({reference(training) for training in TRAININGS}) == len(TRAININGS)


def whole(model: keras.Model) -> list[torch.Tensor]:
    return [variable.value.detach().clone() for variable in model.variables]


@pytest.mark.parametrize("kind", ["sequential", "functional"])
def test_it_is_what_the_unsharded_loop_gives_with_our_optimizer_and_with_keras_own(kind):
    model, _, sharded, _ = train(kind, rate=0.0, leaves=1, stage=3, optimizer="SGD", hyper={"momentum": 0.9})
    with ss.gathered(model):
        values = whole(model)
    alone, keras_own = build(kind, 0.0), build(kind, 0.0)
    ours, theirs = trained_by(alone, "SGD", momentum=0.9), keras.optimizers.SGD(0.02, momentum=0.9)
    batches = sharded.micro_batches(Words(), global_batch=BATCH, micro_batch=BATCH, seed=5)
    for micro in itertools.islice(batches, 3):
        loss_of(alone, micro.batch).backward()
        ours.step()
        ours.zero_grad()
        loss_of(keras_own, micro.batch).backward()
        theirs.apply([v.value.grad for v in keras_own.trainable_variables], keras_own.trainable_variables)
        keras_own.zero_grad()
    torch.testing.assert_close(whole(alone), values, rtol=0, atol=0)
    torch.testing.assert_close(whole(keras_own), values, rtol=0, atol=1e-6)


def test_seeds_of_keras_do_not_depend_on_how_often_this_rank_drew():
    model, _, sharded, _ = train(steps=1)
    (state,) = seeds(model)

    def drawn(times: int) -> list[list[int]]:
        states = []
        for micro in itertools.islice(sharded.micro_batches(Words(), global_batch=BATCH, micro_batch=8, seed=5), 4):
            states.append(state.tolist())
            for _ in range(times):
                model(micro.batch[0], training=True)
        return states

    few = drawn(1)
    assert len({tuple(pair) for pair in few}) == 4
    assert drawn(2) == few


def test_it_learns_and_normalizations_keep_their_statistics():
    model, _, sharded, losses = train(stage=3, steps=40, rate=0.0)
    assert losses[-1] < 0.3 * losses[0]
    moved = keras_models.statistics(model)["batch_normalization.moving_mean"]
    assert moved.abs().min() > 0
    assert sharded.stages == {"": 3}
    assert sharded.bytes.peak == sharded.bytes.formula


def test_units_are_named_as_in_keras():
    _, _, sharded, _ = train("functional", steps=1)
    assert list(sharded.stages) == ["", "sequential", "sequential_1"], "repeated blocks"
    _, _, sharded, _ = train(
        "functional", steps=1, units=["dense*", "sequential.dense_2"], stage={"dense_1": 3, "*": 2}
    )
    assert sharded.stages["dense_1"] == 3
    assert set(sharded.stages) >= {"", "dense", "dense_1", "sequential.dense_2"}


def test_a_layer_that_is_not_built_is_named():
    class Late(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early = torch.nn.Linear(3, 3)
            self.late = layers.Dense(3)

    model = Late()
    with pytest.raises(ss.ConfigError, match=r"built before shard\(\), got 'late' without its variables"):
        ss.shard(model, ss.optim.keras.Adam(model.early.parameters()))


def test_two_clippings_by_the_global_norm_are_refused():
    model = build("sequential")
    with pytest.raises(ss.ConfigError, match="expected one clipping by the global norm"):
        ss.shard(model, trained_by(model, "Adam", global_clipnorm=1.0), clip_norm=1.0)


def test_the_example_runs(capsys):
    keras.utils.clear_session(free_memory=False)
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "train_keras.py"))
    example["main"](stage=3, steps=3, width=8, blocks=2)
    *steps, summary = capsys.readouterr().out.splitlines()
    assert len(steps) == 3
    assert list(json.loads(summary)["stages"]) == ["", "sequential", "sequential_1"]
