"""The zoo: at every stage and on any number of ranks, each model trains as torch trains it, to the same bits.

Computed in float64, so that what differs from torch differs by more than rounding.
"""

import io
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import shardstep as ss
from shardstep.sharding.whole import whole_of
from tests.sharding.test_joined_units import joining
from tests.sharding.zoo import ZOO, Entry

STEPS, LEAVES = 3, 4
ON_FOUR_RANKS = (
    "tied across units",
    "parameters of other units, used by units",
    "no parameters, no elements, fewer than ranks",
    "skipped",
    "unused now and then, and always",
    "called several times",
)


def mixed(name: str, _: nn.Module) -> int:
    return {"blocks.1": 1, "blocks.2": 2, "blocks.3": 0}.get(name, 3)


def made(entry: Entry) -> nn.Module:
    torch.manual_seed(3)
    return entry.make().double()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def packed(values: Any) -> bytes:
    """As bytes, because tensors travel between processes as handles."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def sharded_run(name: str, stage: Any, join: bool = False) -> dict[str, Any]:
    entry = ZOO[name]
    model = made(entry)
    optimizer = ss.optim.AdamW(trained(model), lr=0.05)
    with joining(1 << 20 if join else 0):
        units = None if join else entry.units
        sharded = ss.shard(model, optimizer, stage=stage, units=units, prefetch=entry.prefetch)
    for method in entry.entries:
        sharded.add_entry(method)
    sent, whole = [], []
    for step in range(STEPS):
        before = sharded.traffic.sent_bytes
        for leaf in range(sharded.rank, LEAVES, sharded.world_size):
            entry.backward(model, LEAVES * step + leaf)
            whole += whole_units(model)
        optimizer.step()
        optimizer.zero_grad()
        sent.append(sharded.traffic.sent_bytes - before)
    return {
        "values": packed(model.state_dict()),
        "digest": ss.digest(model, optimizer),
        "world_size": sharded.world_size,
        "whole": sorted(set(whole)),
        "units": len(sharded.stages),
        "sent": sent[-1],
        "formula": sharded.step_bytes(entry.passes * LEAVES // sharded.world_size),
    }


def whole_units(model: nn.Module) -> list[str]:
    """The units that should be freed and are not."""
    units = [unit for unit in whole_of(model).units if unit.stage.shard_params]
    return [unit.name for unit in units for space in unit.spaces if space.is_whole]


def sharded_runs(runs: list[Any]) -> list[dict[str, Any]]:
    return [sharded_run(*run) for run in runs]


def ddp_runs(names: list[str]) -> list[bytes]:
    return [packed(ddp_run(ZOO[name])) for name in names]


def ddp_run(entry: Entry) -> dict[str, Tensor]:
    """torch's own data parallelism; it reduces in every backward, so that unused parameters do not confuse it."""
    model = made(entry)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05, foreach=False)
    own = range(dist.get_rank(), LEAVES, dist.get_world_size())
    for step in range(STEPS):
        for leaf in own:
            entry.backward(parallel, LEAVES * step + leaf)
        finish_step(optimizer, len(own))
    return model.state_dict()


@cache
def torchs(name: str) -> dict[str, Tensor]:
    """One process, torch's optimizer, the mean over all micro-batches."""
    entry = ZOO[name]
    model = made(entry)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05, foreach=False)
    for step in range(STEPS):
        for leaf in range(LEAVES):
            entry.backward(model, LEAVES * step + leaf)
        finish_step(optimizer, entry.passes * LEAVES)
    return model.state_dict()


def finish_step(optimizer: torch.optim.Optimizer, passes: int) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        if parameter.grad is not None:
            parameter.grad /= passes
    optimizer.step()
    optimizer.zero_grad()


@cache
def digest_of_one_rank(name: str) -> str:
    return sharded_run(name, 0)["digest"]


def check(runs: list[tuple[str, Any]], answers: list[dict[str, Any]]) -> None:
    for (name, stage), answer in zip(runs, answers, strict=True):
        where = f"{name}, stage {stage}"
        assert_close(answer["values"], name, where)
        if ZOO[name].passes == 1 or answer["world_size"] == 1:
            assert answer["digest"] == digest_of_one_rank(name), where
        assert answer["whole"] == [], where
        if ZOO[name].exact:
            assert answer["sent"] == answer["formula"], where


def assert_close(values: bytes, name: str, where: str) -> None:
    theirs = torch.load(io.BytesIO(values), weights_only=True)
    torch.testing.assert_close(theirs, torchs(name), rtol=1e-9, atol=1e-11, msg=lambda text: f"{where}: {text}")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of checkpoints in checkpoints
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_model_trains_as_torch_trains_it_to_the_same_bits(ranks, world_size, part):
    names = [name for name in list(ZOO)[part::4] if world_size < 4 or name in ON_FOUR_RANKS]
    runs: list[tuple[str, Any]] = [(name, 3) for name in names]
    if world_size == 2:
        runs += [(name, stage) for number, name in enumerate(names) for stage in (mixed, number % 3)]
    if runs:
        for answers in ranks(world_size).run(sharded_runs, runs):
            check(runs, answers)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of checkpoints in checkpoints
def test_joined_blocks_train_to_the_same_bits(ranks):
    runs = [(name, 3, True) for name, entry in ZOO.items() if entry.units == "blocks.*"]
    for answers in ranks(2).run(sharded_runs, runs):
        check([run[:2] for run in runs], answers)
        assert sum(answer["units"] == 2 for answer in answers) > 0.9 * len(runs)


def test_torchs_own_data_parallelism_trains_them_alike(ranks):
    names = [name for name, entry in ZOO.items() if entry.ddp]
    for values in ranks(2).run(ddp_runs, names):
        for name, theirs in zip(names, values, strict=True):
            assert_close(theirs, name, name)
