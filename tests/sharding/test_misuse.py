"""Ill use gets one clear sentence: what was expected, what was got, where, and what to do."""

import os
import re
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardstep as ss
from shardstep import collectives
from tests.conftest import RankFailed
from tests.sharding.models import BF16, Tied, Tokens, train

SECONDS = 10.0
"""A mismatch is told at once; the collectives' timeout is longer than this."""


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))


def tied(**changes: Any) -> Tied:
    torch.manual_seed(1)
    return Tied(**changes)


def adamw(model: nn.Module) -> ss.optim.AdamW:
    return ss.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def tied_and_sharded(**options: Any) -> tuple[Tied, ss.optim.AdamW, ss.Sharded]:
    model = tied()
    optimizer = adamw(model)
    return model, optimizer, ss.shard(model, optimizer, **options)


def raised_by(function: Any, *args: Any) -> tuple[str, str]:
    """Type and text of what shardstep raised: for errors that leave the ranks able to go on."""
    try:
        function(*args)
    except ss.ShardstepError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def assert_untouched(model: nn.Module) -> None:
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


# - what shard() refuses, on one rank


@pytest.mark.parametrize("stage", [4, -1, True, 2.0, "3", None])
def test_a_stage_is_0_to_3(stage):
    model = tied()
    with pytest.raises(ss.ConfigError, match=f"a stage of 0, 1, 2 or 3 for unit '', got {re.escape(repr(stage))}"):
        ss.shard(model, adamw(model), stage=stage)
    assert_untouched(model)


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ({"blocks.0": 3, "": 1}, r"a stage for unit 'blocks.1', but none of the patterns \['blocks.0', ''\]"),
        ({"blocks.*": 3}, r"a stage for unit '', but none .*; add a pattern"),
        (
            {"block.*": 3, "*": 1},
            r"each pattern of stage to match a unit, but 'block.\*' matches none of \['', 'bl.*\]",
        ),
        ({"blocks.1": 5, "*": 0}, r"a stage of 0, 1, 2 or 3 for unit 'blocks.1', got 5"),
        (lambda name, module: 5 if name else 0, r"a stage of 0, 1, 2 or 3 for unit 'blocks.0', got 5"),
        (lambda name, module: None, r"a stage of 0, 1, 2 or 3 for unit '', got None"),
    ],
)
def test_a_stage_by_mapping_or_function_names_the_unit(stage, text):
    model = tied()
    with pytest.raises(ss.ConfigError, match=text):
        ss.shard(model, adamw(model), stage=stage)
    assert_untouched(model)


def test_a_parameter_that_the_optimizer_does_not_own():
    model = tied()
    optimizer = ss.optim.AdamW([p for n, p in model.named_parameters() if p.requires_grad and n != "blocks.1.gain"])
    with pytest.raises(ss.OwnershipError, match=r"own every parameter .*'blocks.1.gain' is in none .*; add it"):
        ss.shard(model, optimizer)
    assert_untouched(model)


def test_a_parameter_owned_twice_is_refused_by_the_optimizer():
    model = tied()
    groups = [{"params": [model.embed.weight]}, {"params": [model.embed.weight]}]
    with pytest.raises(ss.OwnershipError, match=r"every parameter once, got .* group 1, position 0 also at .* group 0"):
        ss.optim.AdamW(groups)


def test_a_parameter_owned_twice_behind_the_optimizers_back():
    model = tied()
    optimizer = adamw(model)
    optimizer.param_groups[0]["params"].append(model.blocks[2].up.weight)
    with pytest.raises(ss.OwnershipError, match=r"own 'blocks.2.up.weight' once, but it is there 2 times"):
        ss.shard(model, optimizer)


def test_a_parameter_of_another_model():
    model = tied()
    optimizer = adamw(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 4))]})
    with pytest.raises(ss.OwnershipError, match=r"parameter 0 of its group 1, of shape \(3, 4\), is not one of the"):
        ss.shard(model, optimizer)


def test_an_optimizer_of_torch():
    model = tied()
    with pytest.raises(ss.ConfigError, match=r"an optimizer of shardstep.optim, .* got torch.optim.adamw.AdamW; use"):
        ss.shard(model, torch.optim.AdamW(model.parameters()))


def test_torchrun_without_a_process_group(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = tied()
    with pytest.raises(ss.ConfigError, match=r"init_process_group\(\) .* torchrun has started 2 times, got none"):
        ss.shard(model, adamw(model))
    assert_untouched(model)
    monkeypatch.setenv("WORLD_SIZE", "1")
    ss.shard(model, adamw(model))


def test_shard_twice_on_a_model():
    model, optimizer, _ = tied_and_sharded()
    with pytest.raises(ss.ConfigError, match=r"not sharded yet, but shard\(\) was already called on this one"):
        ss.shard(model, optimizer)


def test_shard_a_model_with_a_sharded_part():
    model, optimizer, _ = tied_and_sharded()
    with pytest.raises(ss.ConfigError, match=r"shard\(\) was already called on a part of it"):
        ss.shard(nn.Sequential(model), optimizer)


def test_shard_a_part_of_a_sharded_model():
    model, _, _ = tied_and_sharded(stage=0)
    part = model.blocks[0]
    with pytest.raises(ss.ConfigError, match=r"not sharded yet, but shard\(\) was already called on this one"):
        ss.shard(part, adamw(part))


def test_shard_twice_with_one_optimizer_leaves_the_second_model_as_it_was():
    model, optimizer, _ = tied_and_sharded(stage=0)
    twin = tied()
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            setattr(twin.get_submodule(name), own, parameter)
    with pytest.raises(ss.ConfigError, match=r"an optimizer that is not sharded yet, got one that is"):
        ss.shard(twin, optimizer)
    assert not any(module._forward_pre_hooks for module in twin.modules())


def test_a_model_without_parameters():
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    with pytest.raises(ss.ConfigError, match=r"a model with parameters, but Sequential has none; nothing to shard"):
        ss.shard(model, adamw(tied()))


def test_parameters_on_two_devices():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ss.ConfigError, match=r"on one device, got '0.weight' on cpu, '1.weight' on meta; move the mod"):
        ss.shard(model, adamw(model))
    assert_untouched(model)


@pytest.mark.parametrize("clip_norm", [0, -1.0, float("nan")])
def test_a_norm_to_clip_to_is_positive(clip_norm):
    model = tied()
    with pytest.raises(ss.ConfigError, match=f"clip_norm to be a positive number or None, got {clip_norm}"):
        ss.shard(model, adamw(model), clip_norm=clip_norm)


@pytest.mark.parametrize("clip_norm", ["1", [1.0], True])
def test_a_norm_to_clip_to_is_a_number(clip_norm):
    model = tied()
    text = f"clip_norm to be a positive number or None, got {re.escape(repr(clip_norm))}"
    with pytest.raises(ss.ConfigError, match=text):
        ss.shard(model, adamw(model), clip_norm=clip_norm)


@pytest.mark.parametrize("prefetch", [-1, 1.0, True, None])
def test_prefetch_counts_units(prefetch):
    model = tied()
    with pytest.raises(ss.ConfigError, match=f"prefetch to be 0 or a positive number of units, got {prefetch}"):
        ss.shard(model, adamw(model), prefetch=prefetch)


@pytest.mark.parametrize(
    ("dtypes", "text"),
    [
        ((torch.int32, torch.float32), "a floating-point torch.dtype for Precision.params, got torch.int32"),
        ((torch.float32, "bfloat16"), "a floating-point torch.dtype for Precision.reduce, got 'bfloat16'"),
        ((torch.float16, torch.bfloat16, torch.bfloat16), "Precision.master to be torch.float32 or wider"),
        ((torch.bfloat16,) * 3, "Precision.rounding to be one of .*, got None; choose 'stochastic'"),
        ((torch.bfloat16, torch.bfloat16, torch.float32, None, "nearest"), "Precision.rounding for parameters without"),
        (((torch.bfloat16,) * 3 + (None, "up")), "Precision.rounding to be one of .*, got 'up'"),
        (((torch.bfloat16,) * 3 + (None, "nearest", 1.5)), "Precision.seed to be an integer, got 1.5"),
        ((torch.float32, torch.float32, torch.float32, torch.bfloat16), "accumulate to be reduce's dtype or a wider"),
        ((torch.bfloat16, torch.bfloat16, torch.float32, torch.float16), "accumulate to be reduce's dtype or a wider"),
        ((torch.bfloat16, torch.bfloat16, torch.float32, "float32"), "dtype for Precision.accumulate, got 'float32'"),
        ((torch.float64, torch.float32, torch.float32), "no narrower than params and reduce, got params=torch.float64"),
        ((torch.bfloat16, torch.float64, torch.float32), "reduce=torch.float64, master=torch.float32"),
    ],
)
def test_a_precision_names_floating_dtypes_and_a_wide_master(dtypes, text):
    with pytest.raises(ss.ConfigError, match=text):
        ss.Precision(*dtypes)


def test_a_precision_is_a_precision():
    model = tied()
    with pytest.raises(ss.ConfigError, match=r"Precision.*, got 'bf16'"):
        ss.shard(model, adamw(model), precision="bf16")


@pytest.mark.parametrize("units", ["block.*", ["layers.*", nn.Conv2d], lambda name, module: False])
def test_units_that_match_nothing(units):
    model = tied()
    with pytest.raises(ss.ConfigError, match=r"expected units=.* at least one module of Tied, but none matches; give"):
        ss.shard(model, adamw(model), units=units)


@pytest.mark.parametrize(("units", "got"), [(["blocks.*", 3], r"\['blocks.\*', 3\]"), (3, r"\[3\]")])
def test_units_of_no_known_kind(units, got):
    model = tied()
    with pytest.raises(ss.ConfigError, match=f"name patterns or module classes, got {got}"):
        ss.shard(model, adamw(model), units=units)


def test_one_pattern_of_units_that_matches_nothing_beside_others():
    model = tied()
    with pytest.raises(ss.ConfigError, match=r"each pattern of units=.* of Tied, but 'block.1' matches none"):
        ss.shard(model, adamw(model), units=["blocks.0", "block.1"])


def test_a_model_is_a_module():
    model = tied()
    with pytest.raises(ss.ConfigError, match=r"expected shard\(model, optimizer\), got AdamW for the model"):
        ss.shard(adamw(model), model)


@pytest.mark.parametrize("flag", ["update_in_backward", "trace_nonfinite", "overlap_param_gather"])
def test_flags_are_true_or_false(flag):
    model = tied()
    with pytest.raises(ss.ConfigError, match=f"{flag} to be True or False, got 'no'"):
        ss.shard(model, adamw(model), **{flag: "no"})
    assert_untouched(model)


@pytest.mark.parametrize("name", ["encode", "blocks"])
def test_an_entry_is_a_method(name):
    model = tied()
    handle = ss.shard(model, adamw(model))
    with pytest.raises(ss.ConfigError, match=f"a method of Tied to be an entry, got '{name}'"):
        handle.add_entry(name)


@pytest.mark.parametrize("stage", [2, 3, {"blocks.1": 2, "*": 1}])
def test_the_schedule_per_step_needs_whole_gradients(stage):
    model = tied()
    where = "'blocks.1' is at stage 2" if isinstance(stage, dict) else f"'' is at stage {stage}"
    with pytest.raises(ss.ConfigError, match=rf"stage 0 or 1 for schedule='per step' .*{where}; use schedule="):
        ss.shard(model, adamw(model), stage=stage, schedule="per step")


def test_a_schedule_of_no_known_name():
    model = tied()
    with pytest.raises(ss.ConfigError, match=r"one of \('per leaf', 'per step'\) or None, got 'per_step'"):
        ss.shard(model, adamw(model), schedule="per_step")


def test_gathered_and_digest_of_what_is_not_sharded():
    with pytest.raises(ss.ConfigError, match=r"a model that shard\(\) was called on.*; got Tied"), ss.gathered(tied()):
        pass


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"global_batch": 0}, "global_batch to be a positive integer, got 0"),
        ({"micro_batch": -2}, "micro_batch to be a positive integer, got -2"),
        ({"micro_batch": True}, "micro_batch to be a positive integer, got True"),
        ({"global_batch": 8.0}, "global_batch to be a positive integer, got 8.0"),
        ({"micro_batch": 3}, "global_batch to be a multiple of micro_batch, got 8 and 3"),
        ({"global_batch": 42}, "a dataset of at least global_batch=42 samples, got 40"),
        ({"start_step": -1}, "start_step.*, got -1"),
    ],
)
def test_batches_that_cannot_be_dealt(choice, text):
    _, _, sharded = tied_and_sharded()
    with pytest.raises(ss.ConfigError, match=text):
        sharded.micro_batches(Tokens(), **{"global_batch": 8, "micro_batch": 2, "seed": 0} | choice)


@pytest.mark.parametrize("dataset", [torch.utils.data.DataLoader(Tokens(), batch_size=2), iter([1, 2])])
def test_a_loader_is_no_dataset(dataset):
    _, _, sharded = tied_and_sharded()
    with pytest.raises(ss.ConfigError, match=f"a map-style dataset, .*, got {type(dataset).__name__}; give a loader's"):
        sharded.micro_batches(dataset, global_batch=8, micro_batch=2, seed=0)


# - parameters that are freed


def test_a_module_used_outside_its_unit_names_itself_and_the_parameter():
    model, _, _ = tied_and_sharded(stage=3)
    with pytest.raises(ss.FreedParameterError) as failed:
        model.blocks[0].up(torch.ones(7))
    text = str(failed.value)
    assert "'blocks.0.up.weight'" in text
    assert "forward and backward of unit 'blocks.0', and 'blocks.0.up' was used outside it" in text
    assert "with shardstep.gathered(model):" in text


def test_a_parameter_of_the_root_unit_used_alone():
    model, _, _ = tied_and_sharded(stage=3)
    with pytest.raises(ss.FreedParameterError, match=r"'embed.weight', which are freed: .* root unit, and 'embed'"):
        model.embed.weight[1].sum()


READINGS = {
    "sum": lambda p: p.sum(),
    "item": lambda p: p[0, 0].item(),
    "arithmetic": lambda p: 1 + p,
    "in a list": lambda p: torch.stack([p, p]),
    "numpy": lambda p: p.detach().numpy(),
    "data": lambda p: p.data.sum(),
    "data_ptr": lambda p: p.data_ptr(),
    "tolist": lambda p: p.tolist(),
    "write": lambda p: p.fill_(0),
    "clone": lambda p: p.clone(),
    "out": lambda p: torch.zeros(15, 7).copy_(p),
    "to": lambda p: p.to(torch.float64),
}


@pytest.mark.parametrize("how", READINGS)
def test_values_of_a_freed_parameter_cannot_be_read_or_written(how):
    model, _, _ = tied_and_sharded(stage=3)
    with pytest.raises(ss.FreedParameterError, match=r"needs the values of 'blocks.0.up.weight', which are freed"):
        READINGS[how](model.blocks[0].up.weight)


def test_a_freed_parameter_still_says_what_it_is():
    model, _, _ = tied_and_sharded(stage=3)
    weight = model.blocks[0].up.weight
    assert (weight.shape, weight.numel(), weight.dtype, weight.ndim) == ((15, 7), 105, torch.float32, 2)
    assert weight.requires_grad
    assert weight.grad is None
    assert isinstance(weight, nn.Parameter)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(p.numel() for p in tied().parameters())


def test_a_freed_parameter_and_its_model_can_be_printed():
    model, _, _ = tied_and_sharded(stage=3)
    text = "Parameter 'blocks.0.up.weight' of shape (15, 7), torch.float32, freed (its unit 'blocks.0' is not gathered)"
    assert repr(model.blocks[0].up.weight) == text
    assert str(model.blocks[0].up.weight) == f"{model.blocks[0].up.weight}" == text
    assert "Linear(in_features=7, out_features=15" in repr(model)


def test_it_is_an_ordinary_parameter_below_stage_3_and_while_gathered():
    for stage in (0, 3):
        model, _, _ = tied_and_sharded(stage=stage)
        with ss.gathered(model):
            assert type(model.blocks[0].up.weight) is nn.Parameter
            assert model.blocks[0].up.weight.sum().isfinite()


# - calls in an order that has no meaning


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_after_a_step_without_zero_grad(stage):
    model, optimizer, _ = tied_and_sharded(stage=stage)
    model(tokens()).backward()
    optimizer.step()
    model(tokens()).backward()
    with pytest.raises(ss.SequenceError, match=r"zero_grad\(\) between optimizer.step\(\) and the next backward\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    model(tokens()).backward()
    optimizer.step()


def stepped_and_again(stage: Any, idle_steps: int) -> tuple[str, int]:
    model, optimizer, sharded = tied_and_sharded(stage=stage, clip_norm=1.0)
    for _ in range(idle_steps):
        optimizer.step()
    for seed in range(2):
        model(tokens(seed)).backward()
        optimizer.step()
        for _ in range(idle_steps):
            optimizer.step()
        optimizer.zero_grad()
        for _ in range(idle_steps):
            optimizer.step()
    return ss.digest(model, optimizer), sharded.step_count


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_without_backward_does_nothing(ranks, stage):
    for world_size in (1, 2):
        assert ranks(world_size).run(stepped_and_again, stage, 2) == ranks(world_size).run(stepped_and_again, stage, 0)


# - gradients that are not finite


class Poison:
    """Turns the gradient of one parameter into ``value`` in chosen backward passes."""

    def __init__(self, parameter: nn.Parameter, value: float) -> None:
        self.armed, self._value = False, value
        parameter.register_hook(self._poisoned)

    def _poisoned(self, grad: Tensor) -> Tensor:
        return grad.flatten().index_fill(0, torch.tensor([3]), self._value).view(grad.shape) if self.armed else grad


def poisoned_run(stage: Any, value: float, poisoned_rank: int, bad_steps: list[int]) -> dict[str, Any]:
    """Three steps of two micro-batches on each rank; zero_grad() throws the bad ones away, and they come again."""
    model = tied()
    poison = Poison(model.blocks[1].up.weight, value)
    optimizer = adamw(model)
    sharded = ss.shard(model, optimizer, stage=stage, clip_norm=0.05)
    report: dict[str, Any] = {"errors": [], "kept": []}

    def leaves_of(step: int) -> None:
        for leaf in range(2):
            torch.manual_seed(10 * step + leaf)
            model(tokens(10 * step + leaf)).backward()

    for step in range(3):
        if step in bad_steps:
            before = ss.digest(model, optimizer)
            poison.armed = sharded.rank == poisoned_rank
            leaves_of(step)
            report["errors"].append(raised_by(optimizer.step))
            report["kept"].append(ss.digest(model, optimizer) == before)
            poison.armed = False
            optimizer.zero_grad()
        leaves_of(step)
        optimizer.step()
        optimizer.zero_grad()
    return report | {"digest": ss.digest(model, optimizer), "steps": sharded.step_count}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("world_size", "poisoned_rank"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_norm_that_is_not_finite(ranks, stage, world_size, poisoned_rank, value):
    (wanted, *_) = ranks(world_size).run(poisoned_run, stage, value, poisoned_rank, [])
    for report in ranks(world_size).run(poisoned_run, stage, value, poisoned_rank, [0, 2]):
        for name, text in report.pop("errors"):
            assert name == "NonFiniteGradientError"
            assert f"got a norm of {value} in step" in text
            origin = f", computed by rank {poisoned_rank}" if world_size > 1 else ""
            assert f"in parameter 'blocks.1.up.weight' (element 3){origin}; nothing was updated, and zero_" in text
        assert report.pop("kept") == [True, True]
        assert report["digest"] == wanted["digest"]
        assert report["steps"] == 3


def origins_named(schedule: str, where: str) -> tuple[str, str]:
    """Gradients that are not finite come from every rank, or from none: they were set by name."""
    model = tied()
    optimizer = adamw(model)
    sharded = ss.shard(model, optimizer, stage=1, schedule=schedule, clip_norm=0.05)
    Poison(model.blocks[1].up.weight, float("nan")).armed = where == "everywhere"
    for leaf in range(2):
        model(tokens(leaf)).backward()
    if where == "set":
        sharded.set_full_grad("blocks.0.gain", torch.full_like(sharded.full_grad("blocks.0.gain"), float("inf")))
    return raised_by(optimizer.step)


@pytest.mark.parametrize("schedule", ["per leaf", "per step"])
@pytest.mark.parametrize(
    ("world_size", "where", "named"),
    [
        (2, "everywhere", "'blocks.1.up.weight' (element 3), computed by the ranks 0, 1; nothing was updated"),
        (4, "everywhere", "'blocks.1.up.weight' (element 3), computed by the ranks 0, 1, 2, 3; nothing was updated"),
        (2, "set", "'blocks.0.gain' (element 0), but not in any rank's own; nothing was updated"),
    ],
    ids=["2 ranks", "4 ranks", "set by name"],
)
def test_who_computed_what_is_not_finite(ranks, schedule, world_size, where, named):
    for name, text in ranks(world_size).run(origins_named, schedule, where):
        assert name == "NonFiniteGradientError"
        assert named in text


def test_finite_gradients_whose_norm_overflows():
    model = nn.Linear(2, 2).double()
    optimizer = ss.optim.AdamW(model.parameters())
    ss.shard(model, optimizer, clip_norm=1.0)
    (model(torch.ones(2).double()).sum() * 1e200).backward()
    with pytest.raises(ss.NonFiniteGradientError, match=r"the sum of squares overflows float64"):
        optimizer.step()


# - ranks that differ


def leaves_refused(leaves: int, stage: int, schedule: str | None) -> tuple[str, str]:
    _, _, sharded = tied_and_sharded(stage=stage, schedule=schedule)
    return raised_by(lambda: sharded.micro_batches(Tokens(), global_batch=2 * leaves, micro_batch=2, seed=0))


def test_a_world_size_that_does_not_divide_the_micro_batches(ranks):
    for name, text in ranks(2).run(leaves_refused, 3, 3, None):
        assert name == "ConfigError"
        assert "micro-batches that the world size 2 divides, got 3 (global_batch 6 / micro_batch 2)" in text


def test_three_micro_batches_on_each_rank_per_step(ranks):
    for name, text in ranks(2).run(leaves_refused, 6, 1, "per step"):
        assert name == "ConfigError"
        assert "a power of two micro-batches on each rank for schedule='per step', got 3; use schedule=" in text
    assert leaves_refused(3, 1, "per step") == ("nothing", "")


def three_leaves_per_step() -> tuple[str, str]:
    model, optimizer, _ = tied_and_sharded(stage=1, schedule="per step")
    for leaf in range(3):
        model(tokens(leaf)).backward()
    return raised_by(optimizer.step)


def test_three_micro_batches_of_ones_own_loader_per_step(ranks):
    for name, text in ranks(2).run(three_leaves_per_step):
        assert name == "ConfigError"
        assert "a power of two micro-batches on each rank for schedule='per step', got 3" in text


def uneven(stage: int, schedule: str | None, seconds: float) -> None:
    """Rank 0 runs three micro-batches, rank 1 two, and then both step."""
    model, optimizer, sharded = tied_and_sharded(stage=stage, schedule=schedule)
    begin = time.monotonic()
    try:
        for leaf in range(3 - sharded.rank):
            model(tokens(leaf)).backward()
        optimizer.step()
    finally:
        assert time.monotonic() - begin < seconds


@pytest.mark.parametrize(("stage", "schedule"), [(0, None), (1, "per step"), (3, None)])
def test_micro_batches_of_different_count(ranks, stage, schedule):
    with pytest.raises(RankFailed) as failed:
        ranks(2).run(uneven, stage, schedule, SECONDS)
    for name, text in failed.value.failures:
        assert name == "RankMismatchError", failed.value
        assert re.search(r"rank 0 begins a (forward|backward) pass \(step 0, after 2 micro-batches\)", text)
        assert "but rank 1 calls optimizer.step() (step 0, after 2 micro-batches)" in text
        assert "give every rank the same number of micro-batches a step" in text


def other_width() -> tuple[str, str]:
    model = tied(width=7 + collectives.Group().rank)
    return raised_by(ss.shard, model, adamw(model))


def other_depth() -> tuple[str, str]:
    model = tied(blocks=3 - collectives.Group().rank)
    return raised_by(ss.shard, model, adamw(model))


def other_frozen() -> tuple[str, str]:
    model = tied()
    model.blocks[0].gain.requires_grad_(collectives.Group().rank == 0)
    return raised_by(ss.shard, model, adamw(model))


@pytest.mark.parametrize("build", [other_width, other_depth, other_frozen])
def test_models_of_different_structure(ranks, build):
    answers = ranks(2).run(build)
    for name, text in answers:
        assert name == "RankMismatchError"
        assert "models of equal structure and equal options on all ranks, but the layout of rank 1" in text
        assert "differs from rank 0's" in text
    assert answers[0] == answers[1]


def other_stage() -> tuple[str, str]:
    model = tied()
    return raised_by(lambda: ss.shard(model, adamw(model), stage=3 - collectives.Group().rank))


def test_stages_that_differ_between_ranks(ranks):
    for name, text in ranks(2).run(other_stage):
        assert name == "RankMismatchError"
        assert "the stages of rank 1" in text
        assert "'blocks.0': 2" in text
        assert "rank 0's ('': 3, 'blocks.0': 3" in text


OPTIONS = {
    "schedule": ("per leaf", "per step"),
    "clip_norm": (1.0, None),
    "precision": (None, ss.Precision(torch.float32, torch.bfloat16)),
}


def other_option(option: str) -> tuple[str, str]:
    model = tied()
    chosen = OPTIONS[option][collectives.Group().rank]
    return raised_by(lambda: ss.shard(model, adamw(model), stage=1, **{option: chosen}))


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_differ_between_ranks(ranks, option):
    for name, text in ranks(2).run(other_option, option):
        assert name == "RankMismatchError"
        assert option in text


# - a rank that dies


class Mortal(nn.Module):
    """Ends its process in its n-th forward; never, if n is 0."""

    def __init__(self, lives: int) -> None:
        super().__init__()
        self.up, self.down, self.lives = nn.Linear(7, 15), nn.Linear(15, 7), lives

    def forward(self, x: Tensor) -> Tensor:
        self.lives -= 1
        if self.lives == 0:
            os._exit(7)
        return x + self.down(self.up(x))


def mortal_run(where: str, seconds: float) -> None:
    """Rank 1 dies in step 1: in the first block's forward, or before optimizer.step()."""
    dying = collectives.Group().rank == 1
    model = nn.Sequential(*(Mortal(2 if dying and where == "forward" and number == 0 else 0) for number in range(4)))
    optimizer = ss.optim.AdamW(model.parameters())
    ss.shard(model, optimizer, stage=3, prefetch=0)
    for step in range(2):
        begin = time.monotonic()
        try:
            model(torch.ones(2, 7)).sum().backward()
            if step and dying:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            assert time.monotonic() - begin < seconds


DEATHS = {
    "forward": r"gather of unit '[0123]' for forward of step 1|agreement to backward at step 1",
    "step": r"(gather|exchange) .*unit '[0123]' .*step 1|agreement to step at step 1",
}


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("where", DEATHS)
def test_a_rank_that_dies(ranks, where, machines):
    with pytest.raises(RankFailed) as failed:
        ranks(2, machines).run(mortal_run, where, SECONDS)
    survivor, dead = failed.value.failures
    assert dead[0] == "died"
    assert survivor[0] == "CollectiveError"
    assert re.match(
        rf"rank 1 died: it was killed, or it crashed.*; rank 0 of 2 was in the ({DEATHS[where]})", survivor[1]
    )


class Branches(nn.Module):
    """Of its two units, a forward uses the first as often as it is told, and the second in between."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(7, 7)) for _ in range(2))

    def forward(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = self.branches[1](self.branches[0](x))
        return x.sum()


def once_more_than_the_other(seconds: float) -> tuple[str, str, float]:
    model = Branches()
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    sharded = ss.shard(model, adamw(model), stage=3, prefetch=0, group=group)
    begin = time.monotonic()
    return *raised_by(model, torch.ones(7), 2 - sharded.rank), time.monotonic() - begin


@pytest.mark.usefixtures("neighbourly")
def test_ranks_of_one_machine_may_use_a_unit_more_often_than_the_others(ranks):
    assert [name for name, _, _ in ranks(2).run(once_more_than_the_other, 2.0)] == ["nothing"] * 2


def test_ranks_of_several_machines_that_use_a_unit_more_often_stop_at_the_timeout(ranks):
    name, text, waited_s = ranks(2, machines=2).run(once_more_than_the_other, 2.0)[0]
    assert name == "CollectiveError"
    assert "rank 1 has not arrived in the gather of unit 'branches.0' for forward of step 0" in text
    assert 1.5 < waited_s < 2 + SECONDS
    ranks(2, machines=2).stop()  # the messages that were never taken stay in its process group


# - messages that are too long


def oversized(own_limit: int, sizes: list[int]) -> tuple[str, str]:
    group = collectives.Group()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("shardstep.collectives.group.JSON_LIMIT_BYTES", own_limit)
        return raised_by(lambda: group.exchange_json("x" * sizes[group.rank], label="greeting"))


def test_json_that_is_too_long_to_send(ranks):
    for rank, (name, text) in enumerate(ranks(2).run(oversized, 40, [39, 40])):
        assert name == "ConfigError"
        assert f"at most 40 bytes of JSON for greeting, got {41 + rank} on rank {rank}" in text


def liar() -> tuple[str, str]:
    """Rank 1 announces more bytes than anybody may send."""
    group = collectives.Group()
    if group.rank == 0:
        return raised_by(lambda: group.exchange_json("hello", label="greeting"))
    group.announce([1 << 40], label="greeting").rows()
    return "nothing", ""


def test_a_peer_that_announces_too_much(ranks):
    (name, text), _ = ranks(2).run(liar)
    assert name == "CollectiveError"
    assert "greeting: a peer announced 1099511627776 bytes, more than 1048576" in text


def digests_apart() -> tuple[str, str]:
    model, optimizer, _ = train(Tied, Tokens(), stage=0, precision=BF16, leaves=2, steps=1)
    if collectives.Group().rank == 1:
        with torch.no_grad():
            model.blocks[1].gain.add_(1)
    return raised_by(ss.digest, model, optimizer)


def test_ranks_whose_values_have_come_apart(ranks):
    for name, text in ranks(2).run(digests_apart):
        assert name == "RankMismatchError"
        assert "the digests differ" in text


# - parameters that are no longer those that were sharded


@pytest.mark.parametrize("stage", [0, 3])
def test_a_replaced_parameter_is_named(stage):
    model, _, _ = tied_and_sharded(stage=stage)
    model.blocks[1].norm.bias = nn.Parameter(torch.zeros(7))
    with pytest.raises(ss.SequenceError, match=r"'blocks\.1\.norm\.bias'.*another object.*gathered\(model\)"):
        model(tokens())


def test_assigned_state_is_refused_at_the_next_forward():
    model, _, _ = tied_and_sharded(stage=3)
    model.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(ss.SequenceError, match="another object is there now"):
        model(tokens())


def test_converting_a_sharded_model_is_refused_at_the_next_forward():
    model, _, _ = tied_and_sharded(stage=1)
    model.double()
    with pytest.raises(ss.SequenceError, match=r"its data, now torch\.float64, lies in other memory"):
        model(tokens())


def test_moving_a_model_to_where_it_is_changes_nothing():
    model, _, _ = tied_and_sharded(stage=1)
    model.to("cpu").float()
    model(tokens())
