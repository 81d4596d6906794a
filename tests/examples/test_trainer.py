"""transformers.Trainer: the example alone, under torchrun, and beside an unchanged Trainer with torch's optimizer."""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.examples.running import example, under_torchrun

SIZE = {"steps": 4, "width": 32, "layers": 2, "seed": 0}


def trained(made: ModuleType, folder: Path, **options: Any) -> dict[str, Any]:
    result: dict[str, Any] = made.train(**{"stage": 3, "folder": folder, **SIZE, **options})
    return result


def test_two_ranks_give_the_bits_of_one_also_when_it_resumes(tmp_path):
    one = trained(example("train_trainer"), tmp_path / "one", stage=0)
    two = under_torchrun("train_trainer", stage=3, folder=tmp_path / "two", **SIZE)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert set(two["stages"].values()) == {3}
    assert one["sha256"] == two["sha256"]
    for name in ("checkpoint-2/model.safetensors", "checkpoint-4/model.safetensors", "model.safetensors"):
        whole, theirs = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert whole.keys() == theirs.keys()
        assert all(torch.equal(whole[key], theirs[key]) for key in whole)
    resumed = trained(example("train_trainer"), tmp_path / "resumed", resume=tmp_path / "two" / "checkpoint-2")
    assert resumed["sha256"] == one["sha256"]
    assert [logs["step"] for logs in resumed["log"]] == [logs["step"] for logs in one["log"]]


def test_it_trains_and_tells_as_an_unchanged_trainer(tmp_path):
    made = example("train_trainer")
    ours = trained(made, tmp_path / "ours")["log"]

    class Unchanged(made.Trainer):
        sharded = SimpleNamespace(world_size=1, stages={})

        def __init__(self, model, arguments, *, shard, optimizer_cls_and_kwargs, **kwargs) -> None:
            arguments.max_grad_norm = shard["clip_norm"]
            own = (torch.optim.AdamW, {**optimizer_cls_and_kwargs[1], "foreach": False})
            super().__init__(model, arguments, optimizer_cls_and_kwargs=own, **kwargs)

    made.ShardedTrainer = Unchanged
    theirs = trained(made, tmp_path / "theirs")["log"]
    assert len(ours) == len(theirs) == SIZE["steps"] + 2
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & {"loss", "grad_norm", "learning_rate", "eval_loss", "train_loss", "epoch", "step"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    assert ours[0]["grad_norm"] > 1.0, "or else clipping is not tested"


def test_clipping_by_trainer_itself_is_refused(tmp_path):
    made = example("train_trainer")

    class Clipping(made.ShardedTrainer):
        def __init__(self, model, arguments, **kwargs) -> None:
            arguments.max_grad_norm = 0.5
            super().__init__(model, arguments, **kwargs)

    made.ShardedTrainer = Clipping
    with pytest.raises(ValueError, match=r"expected max_grad_norm=0, got 0.5; clip with shard={'clip_norm': 0.5}"):
        trained(made, tmp_path)
