"""Models of Hugging Face's transformers: the example, a plain loop beside it, and what else users do with them."""

import json
import runpy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.sharding.batches import BatchPlan, MicroBatch, micro_batches
from tests.examples.running import arguments, example, path_of

SIZE = {"steps": 3, "width": 32, "layers": 3, "seed": 0}
MODELS = ("llama", "gpt2", "bert", "mixtral")
LEAVES = 4


def trained(model: str, checkpointing: str, stage: int) -> dict[str, Any]:
    return example("train_transformers").train(model, checkpointing, stage, **SIZE)


def trained_both_ways(model: str, stage: int) -> list[dict[str, Any]]:
    return [trained(model, checkpointing, stage) for checkpointing in ("non-reentrant", "reentrant")]


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_give_the_bits_of_one(ranks, model):
    alone = trained_both_ways(model, 0)
    for rank, both_ways in enumerate(ranks(2).run(trained_both_ways, model, 3)):
        for one, two in zip(alone, both_ways, strict=True):
            assert rank or one["losses"] == two["losses"]
            assert (one["world_size"], two["world_size"]) == (1, 2)
            assert one["sha256"] == two["sha256"]
            assert one["written"] == two["written"]
            assert len(two["units"]) == 1 + SIZE["layers"]


def test_it_runs_as_a_script(capsys, monkeypatch):
    options = {"model": "llama", "checkpointing": "reentrant", "stage": 3, **SIZE}
    monkeypatch.setattr("sys.argv", ["", *arguments(**options)])
    runpy.run_path(str(path_of("train_transformers")), run_name="__main__")
    *steps, summary = capsys.readouterr().out.splitlines()
    assert len(steps) == SIZE["steps"]
    assert json.loads(summary)["sha256"] == trained("llama", "reentrant", 0)["sha256"]


@pytest.mark.parametrize("model", MODELS)
def test_losses_are_those_of_a_plain_loop(model):
    losses = plain_losses(model)
    assert trained(model, "none", 3)["losses"] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


def plain_losses(model: str) -> list[float]:
    """Those of each step's first micro-batch, in a loop of plain torch."""
    made, net, optimizer = example("train_transformers"), *unsharded(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SIZE["steps"])
    losses = []
    for micro in dealt(made):
        loss = made.loss_of(net, micro.batch)
        (loss / LEAVES).backward()
        if micro.index == 0:
            losses.append(loss.item())
        if micro.last:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return losses


def unsharded(model: str) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(SIZE["seed"])
    net = example("train_transformers").make_model(model, SIZE["width"], SIZE["layers"]).train()
    return net, torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1, foreach=False)


def dealt(made: Any) -> Iterator[MicroBatch]:
    """The micro-batches of the example, on one rank."""
    text = made.load_corpus(None, context=made.CONTEXT, training_windows=16, held_out_windows=1).training
    plan = BatchPlan(len(text), 16, 4, SIZE["seed"], 0, 1, "per leaf")
    return micro_batches(text, plan, range(SIZE["steps"]), None, lambda _: None)


def used_otherwise(model: str) -> dict[str, Any]:
    """A step with caches and hidden states among the outputs, and tokens that are generated with freed parameters."""
    made = example("train_transformers")
    torch.manual_seed(SIZE["seed"])
    net = made.make_model(model, SIZE["width"], SIZE["layers"]).train()
    optimizer = ss.optim.AdamW(net.parameters(), lr=3e-3)
    sharded = ss.shard(net, optimizer, stage=3)
    tokens = torch.arange(48).reshape(2, 24) + sharded.rank
    before = sharded.traffic.sent_bytes
    output = net(input_ids=tokens, labels=tokens, use_cache=True, output_hidden_states=True)
    inside = output.hidden_states[1], output.past_key_values.layers[0].keys
    (output.loss + sum(tensor.square().mean() for tensor in inside)).backward()
    optimizer.step()
    optimizer.zero_grad()
    sent, as_foretold = sharded.traffic.sent_bytes - before, sharded.bytes.peak == sharded.bytes.formula
    state = net.state_dict()
    tied = [state[key].data_ptr() for key in ("lm_head.weight", "transformer.wte.weight") if key in state]
    net.eval()
    freed = net.generate(tokens[:1] * 0, max_new_tokens=8, do_sample=False, use_cache=True)
    with ss.gathered(net):
        whole = net.generate(tokens[:1] * 0, max_new_tokens=8, do_sample=False, use_cache=True)
    copy = made.make_model(model, SIZE["width"], SIZE["layers"]).eval()
    copy.load_state_dict(state)
    alone = copy.generate(tokens[:1] * 0, max_new_tokens=8, do_sample=False, use_cache=True)
    return {
        "sent": sent,
        "formula": sharded.step_bytes(1),
        "as foretold": as_foretold,
        "tied": len(set(tied)),
        "tokens": [found.tolist() for found in (freed, whole, alone)],
    }


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_caches_hidden_states_and_generation(ranks, model):
    for answer in ranks(2).run(used_otherwise, model):
        assert answer["sent"] == answer["formula"]
        assert answer["as foretold"]
        freed, whole, alone = answer["tokens"]
        assert freed == whole == alone
        assert answer["tied"] == 1


def built(folder: Path, cut: bool) -> list[list[str]]:
    """Digests of models as they are built, and as the files in ``folder`` have them."""
    return [[digest_of(model, None, cut), digest_of(model, folder / model, cut)] for model in MODELS]


def digest_of(model: str, weights: Path | None, cut: bool) -> str:
    torch.manual_seed(SIZE["seed"] + (weights is not None))
    with ss.partitioned() if cut else nullcontext():
        net = example("train_transformers").make_model(model, SIZE["width"], SIZE["layers"])
    optimizer = ss.optim.AdamW(net.parameters())
    ss.shard(net, optimizer, weights=weights)
    return ss.digest(net, optimizer)


def test_models_are_cut_while_they_are_built_and_read_into_shards(ranks, tmp_path):
    for model in MODELS:
        unsharded(model)[0].save_pretrained(tmp_path / model, save_original_format=False)
    wanted = built(tmp_path, False)
    assert all(made == loaded for made, loaded in wanted)
    assert ranks(2).run(built, tmp_path, True) == [wanted, wanted]
