"""The preset of Megatron's distributed optimizer: the same bits, its table of bytes, and the formulas to the byte."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from shardstep.demo.gpt import GPT
from tests.sharding.models import Convolutions, Images, Tied, Tokens, two_groups
from tests.sharding.test_bytes import BLOCK, CONFIG, Windows, counted_runs, sharded_gpt

F16 = ss.Precision(params=torch.float16, reduce=torch.float16)
BF16 = ss.Precision(params=torch.bfloat16, reduce=torch.float32)
PRECISIONS = {"fp32": None, "bf16": BF16, "fp16": F16}
FLAGS = [{"overlap_grad_reduce": g, "overlap_param_gather": p} for g in (True, False) for p in (True, False)]
MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}
LEAVES = 4


def test_the_preset_is_plain_arguments():
    assert ss.megatron() == {"stage": 1, "overlap_param_gather": True}
    assert ss.megatron(overlap_grad_reduce=False, overlap_param_gather=False) == {
        "stage": 1,
        "schedule": "per step",
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    }


@pytest.mark.parametrize("flag", ["overlap_grad_reduce", "overlap_param_gather"])
def test_flags_are_true_or_false(flag):
    model = Tied()
    with pytest.raises(ss.ConfigError, match=rf"expected {flag} to be True or False, got 1"):
        ss.shard(model, ss.optim.AdamW(two_groups(model)), stage=1, schedule="per step", **{flag: 1})


@pytest.mark.parametrize("schedule", [None, "per leaf"])
def test_gradients_that_stay_until_the_step_are_added_up_where_they_are(schedule):
    model = Tied()
    with pytest.raises(ss.ConfigError, match="expected schedule='per step' with overlap_grad_reduce=False, got"):
        ss.shard(model, ss.optim.AdamW(two_groups(model)), stage=1, schedule=schedule, overlap_grad_reduce=False)


def flags_that_differ() -> str:
    model = Tied()
    rank = torch.distributed.get_rank()
    with pytest.raises(ss.RankMismatchError) as raised:
        ss.shard(model, ss.optim.AdamW(two_groups(model)), stage=1, overlap_param_gather=rank == 1)
    return str(raised.value)


def test_all_ranks_choose_the_same(ranks):
    for text in ranks(2).run(flags_that_differ):
        assert "the overlap_param_gather of rank 1 (True) differs from rank 0's (False)" in text


# - the same bits


def digest_of_run(options: dict[str, Any]) -> str:
    """Three steps, a parameter read after the first and the model evaluated after the second."""
    torch.manual_seed(1)
    model = options.pop("make", Tied)()
    images = isinstance(model, Convolutions)
    optimizer = options.pop("optimizer", _adamw)(model)
    scaler = ss.LossScaler(2.0**8, window=2) if options.get("precision") == F16 else None
    sharded = ss.shard(model, optimizer, loss_scale=scaler, **options)
    dataset: Any = Images() if images else Tokens()
    for micro in sharded.micro_batches(dataset, global_batch=LEAVES * 2, micro_batch=2, seed=5):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if micro.step == 0 and sharded.stages[""] < 3:
                next(iter(model.parameters())).sum()
            elif micro.step == 1:
                with torch.no_grad():
                    model(micro.batch)
            elif micro.step == 2:
                break
    return ss.digest(model, optimizer)


def _adamw(model: nn.Module) -> ss.optim.AdamW:
    return ss.optim.AdamW(two_groups(model), lr=1e-2)


def digests_of_runs(all_options: list[dict[str, Any]]) -> list[str]:
    return [digest_of_run(dict(options)) for options in all_options]


@cache
def reference(kind: str) -> str:
    return digest_of_run({"stage": 0, "precision": PRECISIONS[kind]})


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_flags_give_the_bits_of_the_one_rank_run(ranks, world_size, kind):
    runs: list[dict[str, Any]] = [dict(ss.megatron(**flags)) for flags in FLAGS]
    runs += [{**ss.megatron(), "schedule": "per step"}]
    runs += [{"stage": stage, "overlap_param_gather": True, "prefetch": 2} for stage in (2, MIXED)]
    if kind != "fp16":  # which has a loss scale
        runs += [{**ss.megatron(overlap_grad_reduce=g), "update_in_backward": True} for g in (True, False)]
    runs = [{**run, "precision": PRECISIONS[kind]} for run in runs]
    for digests in ranks(world_size).run(digests_of_runs, runs):
        assert [run for run, digest in zip(runs, digests, strict=True) if digest != reference(kind)] == []


def _lamb(model: nn.Module) -> ss.optim.LAMB:
    return ss.optim.LAMB(two_groups(model), lr=1e-2)


def _combined(model: nn.Module) -> ss.optim.Combined:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2]
    return ss.optim.Combined(
        ss.optim.Muon(matrices, lr=1e-2), ss.optim.AdamW([p for p in trained if p.ndim != 2], lr=1e-2)
    )


@pytest.mark.parametrize("optimizer", [_lamb, _combined])
def test_other_kinds_of_rules(ranks, optimizer):
    wanted = digest_of_run({"stage": 0, "optimizer": optimizer})
    for flags in FLAGS[:1]:
        assert ranks(2).run(digest_of_run, {**ss.megatron(**flags), "optimizer": optimizer}) == [wanted] * 2


def test_buffers_follow_rank_0_as_ever(ranks):
    wanted = digest_of_run({"stage": 0, "make": Convolutions})
    assert ranks(2).run(digest_of_run, {**ss.megatron(), "make": Convolutions}) == [wanted] * 2


def sent_when(overlap_grad_reduce: bool, schedule: str) -> tuple[int, int]:
    """Bytes sent in backward passes of a step, and in the step."""
    torch.manual_seed(1)
    model = Tied()
    optimizer = _adamw(model)
    sharded = ss.shard(model, optimizer, stage=1, schedule=schedule, overlap_grad_reduce=overlap_grad_reduce)
    begin = sharded.traffic.sent_bytes
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=5):
        model(micro.batch).backward()
        if micro.last:
            break
    before = sharded.traffic.sent_bytes
    optimizer.step()
    return before - begin, sharded.traffic.sent_bytes - before


def test_gradients_travel_in_backward_or_not_before_the_step(ranks):
    ways = [(True, "per leaf"), (True, "per step"), (False, "per step")]
    every_leaf, last_leaf, later = (ranks(2).run(sent_when, *way)[0] for way in ways)
    assert every_leaf[0] == 2 * last_leaf[0] > 0
    assert every_leaf[1] == last_leaf[1] > 0
    assert later == (0, sum(last_leaf))


# - bytes


def formula_runs(leaves: tuple[int, ...], precision: ss.Precision | None) -> list[tuple[int, dict[str, Any]]]:
    runs: list[dict[str, Any]] = [{**ss.megatron(overlap_grad_reduce=g), "precision": precision} for g in (True, False)]
    runs += [{"stage": 2, "overlap_param_gather": True}, {"stage": 0, **NO_OVERLAP}]
    runs += [{**run, "update_in_backward": True} for run in runs[:2]]
    return [(own, run) for run in runs for own in leaves]


NO_OVERLAP = {"schedule": "per step", "overlap_grad_reduce": False}


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize(("world_size", "leaves"), [(1, (1, 2)), (2, (1, 4)), (4, (1, 2))])
def test_memory_and_bytes_on_the_wire_are_the_formulas(ranks, world_size, leaves, kind):
    runs = formula_runs(leaves, PRECISIONS[kind])
    for results in ranks(world_size).run(counted_runs, runs):
        rows = list(zip(runs, results, strict=True))
        assert not [(run, row.peak, row.formula) for run, row in rows if row.peak != row.formula]
        assert not [(run, row) for run, row in rows if row.sent != row.sent_formula]


TABLE = {"fp16": (4, 16), "bf16": (6, 12), "fp32": (8, 8)}
"""Megatron's bytes per parameter: what each rank holds of all of them, and what the ranks share; with fp16 parameters
and gradients, bf16 parameters and fp32 gradients, fp32 parameters and gradients.
"""


def bytes_before_the_update(kind: str, own_leaves: int) -> tuple[int, int, int]:
    """Bytes in the engine's buffers when the gradients are summed: as counted, of the tensors; and the peak so far."""
    model, optimizer, sharded = sharded_gpt(precision=PRECISIONS[kind], **ss.megatron())
    found: list[tuple[int, int, int]] = []
    check_update = optimizer.check_update

    def summed(updated: Any) -> None:
        check_update(updated)
        sharded._gradients.settle()
        if not found:
            found.append((sharded._ledger.live.total, sum(map(_nbytes, tensors_of(sharded))), 0))

    for micro in sharded.micro_batches(Windows(), global_batch=own_leaves * sharded.world_size, micro_batch=1, seed=0):
        model(micro.batch).backward()
        if micro.last:
            optimizer.check_update = summed
            optimizer.step()
            break
    live, real, _ = found[0]
    return live, real, sharded.bytes.peak.total


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def tensors_of(sharded: ss.Sharded) -> list[Tensor]:
    """One tensor of each storage."""
    tensors = []
    for space in (space for unit in sharded._units for space in unit.spaces):
        tensors += [space.flat, space.master, *space.state.values(), space.leaves._kept]
        tensors += [partial.values for partial in space.leaves.tree._partials]
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())


def spaces_by_hand(world_size: int) -> tuple[int, int, int]:
    """Elements of all flat buffers, of a rank's shards of them, and of the largest shard; padding included."""
    plain = GPT(CONFIG)
    root = [parameter for name, parameter in plain.named_parameters() if not name.startswith("blocks.")]
    shards = []
    for own in [root, *(list(block.parameters()) for block in plain.blocks)]:
        blocks = -(-sum(-(-parameter.numel() // 256) * 256 for parameter in own) // BLOCK)
        shards.append(-(-blocks // world_size) * BLOCK)
    return world_size * sum(shards), sum(shards), max(shards)


@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bytes_per_parameter_are_those_of_megatrons_table(ranks, world_size, kind):
    whole, shared = TABLE[kind]
    numel, shard_numel, largest = spaces_by_hand(world_size)
    reduce_bytes = 2 if kind == "fp16" else 4
    for own_leaves in (1, 2):
        for live, real, peak in ranks(world_size).run(bytes_before_the_update, kind, own_leaves):
            table = whole * numel + shared * shard_numel
            if kind == "fp16" and world_size * own_leaves == 1:
                table -= 4 * shard_numel  # one gradient is its own sum, in fp16
            assert live == real == table
            if own_leaves == 1:  # what other ranks have sent of one unit is there besides, until it is added up
                assert table <= peak <= table + (world_size - 1) * reduce_bytes * largest
                assert kind == "fp16" or peak == table + (world_size - 1) * reduce_bytes * largest
