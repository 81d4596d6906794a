"""Schedule-free AdamW between training and evaluation on shards: the same bits for every cut, and back again."""

from typing import Any

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.optim import AdamWScheduleFree
from tests.conftest import RankFailed
from tests.sharding.models import BF16, Tied, Tokens, two_groups

MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}
STAGES = (0, 1, 2, 3, MIXED)


def sharded_tied(**options: Any) -> tuple[nn.Module, AdamWScheduleFree, ss.Sharded]:
    torch.manual_seed(1)
    model = Tied()
    optimizer = AdamWScheduleFree(two_groups(model), lr=1e-2, maximize=True)
    return model, optimizer, ss.shard(model, optimizer, **options)


def steps(model: nn.Module, optimizer: Any, sharded: ss.Sharded, count: int, first: int = 0) -> None:
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=5, epochs=2, start_step=first):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if micro.step == first + count - 1:
                return


def loss(model: nn.Module) -> float:
    """With gradients enabled, so that what backward would begin with stays whole."""
    return model.eval()(torch.stack([Tokens()[i] for i in range(4)])).item()


def swapped(options: dict[str, Any]) -> dict[str, Any]:
    """What every layout must agree on: while training, as the average, back again, written to, and one step later."""
    model, optimizer, sharded = sharded_tied(**options)
    optimizer.eval()  # before the first step nothing moves
    optimizer.train()
    steps(model, optimizer, sharded, 2)
    found: dict[str, Any] = {"y": ss.digest(model, optimizer), "loss at y": loss(model)}
    optimizer.eval()
    optimizer.eval()
    found |= {"x": ss.digest(model, optimizer), "loss at x": loss(model), "refused": refused_step(optimizer)}
    optimizer.train()
    optimizer.train()
    found["y again"] = ss.digest(model, optimizer)
    optimizer.eval()
    with ss.gathered(model) as whole, torch.no_grad():
        whole.blocks[1].up.weight[:3] += 1.0
    found["written"] = ss.digest(model, optimizer)
    optimizer.train()
    found["y of the written"] = ss.digest(model, optimizer)
    model.train()
    steps(model, optimizer, sharded, 1, first=2)
    return {**found, "a step later": ss.digest(model, optimizer)}


def refused_step(optimizer: AdamWScheduleFree) -> str:
    try:
        optimizer.step()
    except ss.SequenceError as error:
        return str(error)
    return ""


def all_swapped(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [swapped(options) for options in runs]


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
def test_every_layout_swaps_with_the_bits_of_one_rank_and_swaps_back(ranks, precision):
    expected = swapped({"stage": 0, "precision": precision})
    assert expected["y again"] == expected["y"] != expected["x"]
    assert expected["loss at x"] != expected["loss at y"]
    assert "call optimizer.train()" in expected["refused"]
    assert expected["y of the written"] not in (expected["y"], expected["written"])
    runs = [{"stage": stage, "precision": precision} for stage in STAGES]
    for world_size in (1, 2, 4):
        for found in ranks(world_size).run(all_swapped, runs):
            for options, one in zip(runs, found, strict=True):
                assert one == expected, (world_size, options)


def test_elements_that_were_not_written_keep_their_bits_and_others_move():
    model, optimizer, sharded = sharded_tied(stage=3)
    steps(model, optimizer, sharded, 2)
    y, z = whole_of(model, optimizer)
    optimizer.eval()
    x, _ = whole_of(model, optimizer)
    with ss.gathered(model), torch.no_grad():
        model.blocks[1].up.weight[:3] += 1.0
    optimizer.train()
    again, _ = whole_of(model, optimizer)
    torch.testing.assert_close(again[:3], x[:3] + 1.0 + 0.1 * (z[:3] - x[:3] - 1.0))
    assert torch.equal(again[3:], y[3:])


def whole_of(model: nn.Module, optimizer: AdamWScheduleFree) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the parameters and its z."""
    with ss.gathered(model):
        values = model.blocks[1].up.weight.detach().clone()
    state = optimizer.state_dict()
    every = [p for group in optimizer.param_groups for p in group["params"]]
    index = next(i for i, p in enumerate(every) if p is model.blocks[1].up.weight)
    return values, state["state"][index]["z"]


def averages_alone_and_sharded() -> list[list[torch.Tensor]]:
    """x of one micro-batch a step, by an optimizer alone and on shards."""
    found = []
    for stage in (None, 3):
        torch.manual_seed(1)
        model = Tied().double()
        optimizer = AdamWScheduleFree(two_groups(model), lr=1e-2)
        if stage is not None:
            ss.shard(model, optimizer, stage=stage)
        for step in range(3):
            torch.manual_seed(step)
            model(torch.stack([Tokens()[i] for i in range(4)])).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
        state = model.state_dict()
        found.append([state[name].clone() for name in sorted(state)])
    return found


def test_the_average_is_that_of_an_optimizer_alone():
    alone, sharded = averages_alone_and_sharded()
    assert all(torch.equal(a, b) for a, b in zip(alone, sharded, strict=True))


def saved_while_evaluating(stage: int) -> tuple[dict[str, Any], dict[str, Any], list[Any], str]:
    model, optimizer, sharded = sharded_tied(stage=stage)
    average = ss.Average(model, decay=0.5)
    steps(model, optimizer, sharded, 2)
    optimizer.eval()
    average.update()
    before = ss.digest(model, optimizer)
    with average.applied():
        assert ss.digest(model, optimizer) == before, "the first average is a copy of x"
    kept, weights = optimizer.state_dict(), {name: values.clone() for name, values in model.state_dict().items()}
    averaged = [values.tolist() for values in average.state_dict()["averages"].values()]
    optimizer.train()
    return kept, weights, averaged, ss.digest(model, optimizer)


def resumed(stage: int, weights: dict[str, Any], state: dict[str, Any]) -> tuple[str, list[bool]]:
    model, optimizer, _ = sharded_tied(stage=stage)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    modes = [group["train_mode"] for group in optimizer.param_groups]
    optimizer.train()
    return ss.digest(model, optimizer), modes


def test_what_is_saved_while_evaluating_goes_on_anywhere(ranks):
    """Averages, made while evaluating, are of x. Loading has no y to bring back: all of it is made from x and z."""
    kept, weights, averaged, y = ranks(2).run(saved_while_evaluating, 2)[0]
    alone = saved_while_evaluating(0)
    assert averaged == alone[2]
    assert y == alone[3]
    found = {resumed(0, weights, kept)[0]}
    for world_size, stage in ((2, 1), (4, 3)):
        results = ranks(world_size).run(resumed, stage, weights, kept)
        assert all(modes == [False, False] for _, modes in results)
        found |= {digest for digest, _ in results}
    assert len(found) == 1


def one_evaluates_and_one_trains() -> None:
    model, optimizer, sharded = sharded_tied(stage=1)
    steps(model, optimizer, sharded, 1)
    if sharded.rank:
        optimizer.train()
    else:
        optimizer.eval()


def test_ranks_that_do_not_call_the_same_are_named(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2).run(one_evaluates_and_one_trains)
    for failure in caught.value.failures:
        assert failure is not None
        assert failure[0] == "RankMismatchError"
        assert "rank 0 calls optimizer.eval()" in failure[1]
        assert "rank 1 calls optimizer.train()" in failure[1]


@pytest.mark.parametrize("move", ["eval", "train"])
def test_parameters_that_are_whole_for_writing_or_averages_are_not_swapped(move):
    model, optimizer, sharded = sharded_tied(stage=2)
    average = ss.Average(model)
    steps(model, optimizer, sharded, 1)
    average.update()
    before = ss.digest(model, optimizer)
    with ss.gathered(model), pytest.raises(ss.SequenceError, match=rf"optimizer.{move}\(\) outside .*gathered"):
        getattr(optimizer, move)()
    with average.applied(), pytest.raises(ss.SequenceError, match=rf"optimizer.{move}\(\) outside .*average.applied"):
        getattr(optimizer, move)()
    assert all(group["train_mode"] for group in optimizer.param_groups)
    assert ss.digest(model, optimizer) == before


def sharded_while_evaluating() -> None:
    torch.manual_seed(1)
    model = nn.Linear(48, 48)  # which two ranks share
    optimizer = AdamWScheduleFree(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(torch.ones(2, 48)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    y = model.weight.detach().clone()
    optimizer.eval()
    assert not torch.equal(model.weight, y)
    ss.shard(model, optimizer, stage=3)
    optimizer.train()
    with ss.gathered(model):
        torch.testing.assert_close(model.weight.detach(), y)


def test_one_that_evaluates_may_be_sharded(ranks):
    ranks(2).run(sharded_while_evaluating)
