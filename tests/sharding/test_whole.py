"""Whole parameters, whole state dicts, and what none of them may change: a bit."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from shardstep.collectives import Group
from shardstep.sharding.whole import whole_of
from tests.sharding.models import BF16, Tied, Tokens, two_groups

STAGES = (0, 1, 2, 3, {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0})
LAYOUTS = [(1, 0), (1, 3), (2, 0), (2, 2), (2, 3), (4, 3)]
"""(world size, stage)."""


def fresh(seed: int = 1) -> tuple[Tied, ss.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tied()
    return model, ss.optim.AdamW(two_groups(model), lr=1e-2)


def sharded_run(
    stage: Any = 3, steps: int = 2, precision: ss.Precision | None = None
) -> tuple[Tied, ss.optim.AdamW, ss.Sharded]:
    model, optimizer = fresh()
    sharded = ss.shard(model, optimizer, stage=stage, precision=precision, clip_norm=0.5)
    train(model, optimizer, sharded, range(steps))
    return model, optimizer, sharded


def train(model: nn.Module, optimizer: ss.optim.AdamW, sharded: ss.Sharded, steps: range) -> None:
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=5, start_step=steps.start):
        if micro.step not in steps:
            break
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()


def digest_after(steps: int, precision: ss.Precision | None = None) -> str:
    model, optimizer, _ = sharded_run(0, steps, precision)
    return ss.digest(model, optimizer)


def packed(value: Any) -> bytes:
    """As bytes, because tensors travel between processes as handles."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=True)


def assert_equal(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(ours) == list(wanted)
    for name, values in wanted.items():
        assert ours[name].dtype == values.dtype, name
        assert torch.equal(ours[name], values), name


# - reading


def read(stage: Any) -> dict[str, Any]:
    model, optimizer, _ = sharded_run(stage)
    before = ss.digest(model, optimizer)
    with ss.gathered(model) as whole:
        assert whole is model
        values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kept = ss.digest(model, optimizer) == before
    return {"values": packed(values), "kept": kept}


@pytest.mark.parametrize(("world_size", "stage"), LAYOUTS)
def test_reading_gives_the_one_rank_values_and_changes_no_bit(ranks, world_size, stage):
    wanted = dict(sharded_run(0)[0].named_parameters())
    for answer in ranks(world_size).run(read, stage):
        assert_equal(unpacked(answer["values"]), wanted)
        assert answer["kept"]


def read_a_part() -> dict[str, Any]:
    model, optimizer, _ = sharded_run(3)
    before = ss.digest(model, optimizer)
    with ss.gathered(model.blocks[1]):
        inside = [type(block.up.weight).__name__ for block in model.blocks]
        total = model.blocks[1].up.weight.sum().item()
    after = type(model.blocks[1].up.weight).__name__
    return {"inside": inside, "after": after, "total": total, "kept": ss.digest(model, optimizer) == before}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_part_is_gathered_alone(ranks, world_size):
    wanted = sharded_run(0)[0].blocks[1].up.weight.sum().item()
    for answer in ranks(world_size).run(read_a_part):
        assert answer == {
            "inside": ["FreedParameter", "Parameter", "FreedParameter"],
            "after": "FreedParameter",
            "total": wanted,
            "kept": True,
        }


def nested() -> list[str]:
    model, _, _ = sharded_run(3)
    weight, seen = model.blocks[1].up.weight, []
    with ss.gathered(model):
        with ss.gathered(model.blocks[1]):
            seen.append(type(weight).__name__)
        seen.append(type(weight).__name__)
        model.state_dict()
        seen.append(type(weight).__name__)
        model(Tokens()[0][None])
        seen.append(type(weight).__name__)
    return [*seen, type(weight).__name__]


@pytest.mark.parametrize("world_size", [1, 2])
def test_whole_until_the_outermost_block_ends(ranks, world_size):
    for seen in ranks(world_size).run(nested):
        assert seen == ["Parameter"] * 4 + ["FreedParameter"]


def left_by_an_exception() -> tuple[str, bool]:
    model, optimizer, _ = sharded_run(3)
    before = ss.digest(model, optimizer)
    with pytest.raises(KeyError), ss.gathered(model):
        raise KeyError
    return type(model.embed.weight).__name__, ss.digest(model, optimizer) == before


def test_an_exception_inside_frees_too(ranks):
    assert ranks(2).run(left_by_an_exception) == [("FreedParameter", True)] * 2


def generated_alone() -> tuple[list[float], str]:
    """Rank 0 runs the model alone, as often as it likes, while everyone is inside ``gathered``."""
    model, optimizer, sharded = sharded_run(3)
    losses = []
    with ss.gathered(model):
        if sharded.rank == 0:
            model.eval()
            with torch.no_grad():
                losses = [model(Tokens()[index][None]).item() for index in range(5)]
            model.train()
    train(model, optimizer, sharded, range(2, 4))
    return losses, ss.digest(model, optimizer)


def test_rank_0_alone_may_run_the_gathered_model(ranks):
    (wanted, digest), *_ = ranks(1).run(generated_alone)
    assert digest == digest_after(4)
    assert ranks(2).run(generated_alone) == [(wanted, digest), ([], digest)]


# - writing


def write(stage: Any, precision: ss.Precision | None, further_steps: int) -> dict[str, Any]:
    """Writes into one unit, the root and a frozen parameter, some of it in a block inside a block."""
    model, optimizer, sharded = sharded_run(stage, precision=precision)
    before = {(name, what): t.clone() for name, what, t in whole_of(model).tensors()}
    with ss.gathered(model), torch.no_grad():
        model.blocks[1].up.weight[2:4].fill_(0.3)
        model.blocks[0].frozen.mul_(2)
        with ss.gathered(model.blocks[2]):
            model.blocks[2].gain.fill_(7.1)
        model.embed.weight[5] += 1
    after = {(name, what): t.clone() for name, what, t in whole_of(model).tensors()}
    train(model, optimizer, sharded, range(2, 2 + further_steps))
    return {"before": packed(before), "after": packed(after), "digest": ss.digest(model, optimizer)}


WRITTEN = {"blocks.1.up.weight", "blocks.0.frozen", "blocks.2.gain", "embed.weight"}


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("world_size", "stage"), LAYOUTS)
def test_writes_are_kept_and_training_goes_on_from_them(ranks, world_size, stage, precision):
    (wanted,) = ranks(1).run(write, 0, precision, 2)
    for answer in ranks(world_size).run(write, stage, precision, 2):
        before, after = unpacked(answer["before"]), unpacked(answer["after"])
        changed = {name for name, what in before if not torch.equal(before[name, what], after[name, what])}
        assert changed == WRITTEN
        assert (after["blocks.1.up.weight", "param"][2:4] == torch.tensor(0.3).to(after["embed.weight", "param"])).all()
        assert torch.equal(after["blocks.0.frozen", "param"], 2 * before["blocks.0.frozen", "param"])
        assert answer["digest"] == wanted["digest"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_written_value_replaces_its_master_and_the_rest_keeps_its_bits(ranks, stage):
    for answer in ranks(2).run(write, stage, BF16, 0):
        before, after = unpacked(answer["before"]), unpacked(answer["after"])
        name = "blocks.1.up.weight"
        low, master, old = after[name, "param"], after[name, "master"], before[name, "master"]
        assert torch.equal(master[2:4], low[2:4].float())
        assert torch.equal(master[:2], old[:2])
        assert torch.equal(master[4:], old[4:])
        assert not torch.equal(old[:2], before[name, "param"][:2].float()), "the master knows more than the parameter"


# - state dicts


def state_dicts(stage: Any, steps: int = 2) -> dict[str, Any]:
    model, optimizer, _ = sharded_run(stage, steps)
    before = ss.digest(model, optimizer)
    saved = packed({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    return {"saved": saved, "kept": ss.digest(model, optimizer) == before, "digest": before}


@pytest.mark.parametrize(("world_size", "stage"), LAYOUTS)
def test_state_dicts_are_whole_and_those_of_one_rank(ranks, world_size, stage):
    wanted = unpacked(state_dicts(0)["saved"])
    for answer in ranks(world_size).run(state_dicts, stage):
        saved = unpacked(answer["saved"])
        assert answer["kept"]
        assert_equal(saved["model"], wanted["model"])
        assert saved["optimizer"]["param_groups"] == wanted["optimizer"]["param_groups"]
        assert saved["optimizer"]["state"].keys() == wanted["optimizer"]["state"].keys()
        for index, state in wanted["optimizer"]["state"].items():
            assert_equal(saved["optimizer"]["state"][index], state)


def test_a_state_dict_is_a_copy_where_the_parameters_are_freed():
    model, optimizer, sharded = sharded_run(3)
    state = model.state_dict()
    before = {name: values.clone() for name, values in state.items()}
    train(model, optimizer, sharded, range(2, 3))
    assert_equal(state, before)


def test_tied_weights_are_one_tensor_in_a_state_dict():
    state = sharded_run(3)[0].state_dict()
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert len({values.data_ptr() for values in state.values()}) == len(state) - 1


def loaded_back(stage: Any) -> tuple[str, str, str]:
    model, optimizer, sharded = sharded_run(stage)
    saved, wanted = {name: values.clone() for name, values in model.state_dict().items()}, ss.digest(model, optimizer)
    train(model, optimizer, sharded, range(2, 3))
    between = ss.digest(model, optimizer)
    assert str(model.load_state_dict(saved)) == "<All keys matched successfully>"
    assert all(torch.equal(values, saved[name]) for name, values in model.state_dict().items())
    optimizer_state = state_of_two_steps(stage)
    optimizer.load_state_dict(optimizer_state)
    return wanted, between, ss.digest(model, optimizer)


def state_of_two_steps(stage: Any) -> Any:
    return sharded_run(stage)[1].state_dict()


@pytest.mark.parametrize(("world_size", "stage"), [(1, 3), (2, 0), (2, 2), (2, 3)])
def test_a_loaded_state_takes_the_place_of_what_was_there(ranks, world_size, stage):
    for wanted, between, after in ranks(world_size).run(loaded_back, stage):
        assert between != wanted
        assert after == wanted == digest_after(2)


def refused_load() -> tuple[str, str, bool]:
    model, optimizer, _ = sharded_run(3)
    before = ss.digest(model, optimizer)
    with pytest.raises(RuntimeError, match=r"Missing key.*embed.weight") as failed:
        model.load_state_dict({})
    return type(failed.value).__name__, type(model.embed.weight).__name__, ss.digest(model, optimizer) == before


def test_a_load_that_torch_refuses_leaves_the_model_freed_and_as_it_was(ranks):
    assert ranks(2).run(refused_load) == [("RuntimeError", "FreedParameter", True)] * 2


def resumed(saved: bytes, stage: Any, load_first: bool) -> str:
    """Two further steps of a fresh model and optimizer that were given a run's state."""
    model, optimizer = fresh(seed=9)
    state = unpacked(saved)

    def load() -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    if load_first:
        load()
    sharded = ss.shard(model, optimizer, stage=stage, clip_norm=0.5)
    if not load_first:
        load()
    train(model, optimizer, sharded, range(2, 4))
    return ss.digest(model, optimizer)


@pytest.mark.parametrize("load_first", [True, False], ids=["loaded, then sharded", "sharded, then loaded"])
@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (1, 3), (2, 1), (2, 3), (4, 2)])
def test_a_run_goes_on_at_another_stage_and_world_size_with_the_same_bits(ranks, world_size, stage, load_first):
    saved = ranks(2).run(state_dicts, 3)[0]["saved"]
    for digest in ranks(world_size).run(resumed, saved, stage, load_first):
        assert digest == digest_after(4)


def test_a_sharded_runs_state_is_that_of_an_unsharded_optimizer(ranks):
    answer = ranks(2).run(state_dicts, 3)[0]
    model, optimizer = fresh(seed=9)
    state = unpacked(answer["saved"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert ss.digest(model, optimizer) == answer["digest"] == digest_after(2)


def test_a_sharded_runs_state_goes_to_torchs_optimizer_and_comes_back(ranks):
    saved = ranks(2).run(state_dicts, 3)[0]["saved"]
    state = unpacked(saved)
    model, _ = fresh(seed=9)
    model.load_state_dict(state["model"])
    torchs = torch.optim.AdamW(two_groups(model), lr=1e-2, foreach=False)
    torchs.load_state_dict(state["optimizer"])
    back = torchs.state_dict()
    for index, one in state["optimizer"]["state"].items():
        assert_equal(back["state"][index], one)
    theirs = packed({"model": model.state_dict(), "optimizer": back})
    assert set(ranks(2).run(resumed, theirs, 3, False)) == {digest_after(4)}


def one_leaf_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model(torch.stack([Tokens()[index] for index in range(4)])).backward()
    optimizer.step()
    return {name: values.clone() for name, values in model.state_dict().items()}


def test_torchs_optimizer_takes_the_step_that_ours_takes(ranks):
    saved = unpacked(ranks(2).run(state_dicts, 3)[0]["saved"])
    stepped = []
    for optimizer_class in (ss.optim.AdamW, torch.optim.AdamW):
        model, _ = fresh(seed=9)
        optimizer = optimizer_class(two_groups(model), lr=1e-2)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if optimizer_class is ss.optim.AdamW:
            ss.shard(model, optimizer, stage=3)
        stepped.append(one_leaf_step(model, optimizer))
    for name, values in stepped[1].items():
        torch.testing.assert_close(stepped[0][name], values, rtol=1e-6, atol=1e-7)


# - before and between steps


def evaluated_between(stage: Any) -> tuple[str, list[float]]:
    """Evaluates before the first step, between micro-batches and between steps."""
    model, optimizer = fresh()
    sharded = ss.shard(model, optimizer, stage=stage, clip_norm=0.5)
    losses = list(evaluations(model))
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=5):
        if micro.step == 2:
            break
        model(micro.batch).backward()
        losses += evaluations(model)
        if micro.last:
            optimizer.step()
            losses += evaluations(model)
            optimizer.zero_grad()
    return ss.digest(model, optimizer), losses


def evaluations(model: nn.Module) -> Iterator[float]:
    model.eval()
    for grad_mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with grad_mode:
            yield model(Tokens()[0][None]).item()
    model.train()


@pytest.mark.parametrize(("world_size", "stage"), LAYOUTS)
def test_evaluation_changes_no_bit(ranks, world_size, stage):
    _, wanted = evaluated_between(0)
    for digest, losses in ranks(world_size).run(evaluated_between, stage):
        assert digest == digest_after(2)
        assert set(losses) == set(wanted), "the loss before, and after each step"
        assert len(set(losses)) == 3


def stepped_before_shard(stage: Any) -> tuple[str, str]:
    """Two steps of the optimizer alone, then two of the sharded one; and its digest before and after shard()."""
    model, optimizer = fresh()
    for step in range(2):
        torch.manual_seed(step)
        model(torch.stack([Tokens()[index] for index in range(4)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    alone = ss.digest(model, optimizer)
    sharded = ss.shard(model, optimizer, stage=stage)
    assert ss.digest(model, optimizer) == alone
    train(model, optimizer, sharded, range(2, 4))
    return alone, ss.digest(model, optimizer)


def test_an_optimizer_that_has_stepped_keeps_its_state(ranks):
    wanted = stepped_before_shard(0)
    assert wanted[0] != wanted[1]
    for world_size, stage in LAYOUTS:
        assert set(ranks(world_size).run(stepped_before_shard, stage)) == {wanted}


def seeded_apart(stage: Any) -> str:
    """Ranks that built different values go on from rank 0's."""
    model, optimizer = fresh(seed=1 + Group().rank)
    sharded = ss.shard(model, optimizer, stage=stage, clip_norm=0.5)
    train(model, optimizer, sharded, range(2))
    return ss.digest(model, optimizer)


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_go_on_from_rank_0s_values(ranks, world_size):
    for stage in STAGES:
        assert set(ranks(world_size).run(seeded_apart, stage)) == {digest_after(2)}


def loaded_on_rank_0() -> str:
    """Ranks that loaded different optimizer states go on from rank 0's, as with values."""
    model, optimizer = fresh(seed=1 + Group().rank)
    for _ in range(2 - Group().rank):
        torch.manual_seed(0)
        model(torch.stack([Tokens()[index] for index in range(4)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    ss.shard(model, optimizer, stage=3)
    return ss.digest(model, optimizer)


def test_all_ranks_go_on_from_rank_0s_optimizer_state(ranks):
    assert set(ranks(2).run(loaded_on_rank_0)) == {loaded_on_rank_0()}


# - what would leave the whole and the shards apart


def step_inside_gathered() -> str:
    model, optimizer, _ = sharded_run(3)
    model(torch.stack([Tokens()[i] for i in range(2)])).backward()
    with ss.gathered(model), pytest.raises(ss.SequenceError, match=r"step\(\) outside 'with shardstep.gathered"):
        optimizer.step()
    return ss.digest(model, optimizer)


def test_a_step_inside_gathered_is_refused_and_changes_nothing(ranks):
    assert set(ranks(2).run(step_inside_gathered)) == {digest_after(2)}


def forward_without_backward(stage: int) -> str:
    """A forward with gradients that nobody uses leaves units whole; the step must not leave them stale."""
    model, optimizer, _ = sharded_run(stage, 1)
    batch = torch.stack([Tokens()[i] for i in range(2)])
    model.eval()
    for _ in range(2):
        model(batch).backward()
        model(batch)
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer)


def test_a_forward_without_a_backward_leaves_nothing_stale(ranks):
    assert len({*ranks(2).run(forward_without_backward, 3), *ranks(2).run(forward_without_backward, 0)}) == 1
