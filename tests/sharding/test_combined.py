"""Several optimizers of one model: Muon for the matrices and AdamW for the rest, alone and sharded."""

import copy
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from shardstep.demo.gpt import GPT
from shardstep.errors import ConfigError, MissingKeyError, OwnershipError
from tests.sharding.models import BF16, Tied, Tokens
from tests.sharding.test_bytes import CONFIG, train_steps

MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}


def members(model: nn.Module) -> tuple[ss.optim.Muon, ss.optim.AdamW]:
    given = [p for p in model.parameters() if p.requires_grad]
    return (
        ss.optim.Muon([p for p in given if p.ndim == 2], lr=0.02),
        ss.optim.AdamW([{"params": [p for p in given if p.ndim != 2], "weight_decay": 0.0}], lr=0.01),
    )


def trained(options: dict[str, Any], reload: bool = False) -> tuple[nn.Module, ss.optim.Combined, ss.Sharded]:
    torch.manual_seed(1)
    model = Tied()
    optimizer = ss.optim.Combined(*members(model))
    sharded = ss.shard(model, optimizer, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=5):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if reload:
                optimizer.load_state_dict(optimizer.state_dict())
            if micro.step == 2:
                break
    return model, optimizer, sharded


def digests(all_options: list[dict[str, Any]], reload: bool) -> list[str]:
    runs = [trained(options, reload) for options in all_options]
    return [ss.digest(model, optimizer) for model, optimizer, _ in runs]


@pytest.mark.parametrize("reload", [False, True], ids=["straight on", "states reloaded"])
def test_every_layout_gives_the_bits_of_the_one_rank_run(ranks, reload):
    common = {"clip_norm": 0.5}
    (expected,) = digests([{"stage": 0, **common}], False)
    layouts = [{"stage": stage, **common} for stage in (0, 1, 2, 3, MIXED)]
    layouts.append({"stage": 2, "trace_nonfinite": True, **common})
    for world_size in (1, 2, 4):
        for found in ranks(world_size).run(digests, layouts, reload):
            assert found == [expected] * len(layouts), world_size


def test_sharded_is_what_the_two_do_one_after_the_other():
    def steps(model: nn.Module, optimizers: list[Any]) -> str:
        for step in range(3):
            torch.manual_seed(step)
            model(torch.stack([Tokens()[i] for i in range(4)])).backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        return ss.digest(model, optimizers[0])

    results = []
    for how in ("sharded", "combined", "apart"):
        torch.manual_seed(1)
        model = Tied()
        both = members(model)
        optimizers = list(both) if how == "apart" else [ss.optim.Combined(*both)]
        if how == "sharded":
            ss.shard(model, optimizers[0], stage=3)
        steps(model, optimizers)
        with ss.gathered(model) if how == "sharded" else torch.no_grad():
            results.append([p.detach().clone() for p in model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def counted(runs: list[dict[str, Any]]) -> list[tuple[Any, Any, int]]:
    """Peaks, formula, and the bytes sent in the second step over those of the formula."""
    found = []
    for options in runs:
        torch.manual_seed(1)
        model = GPT(CONFIG)
        optimizer = ss.optim.Combined(*members(model))
        sharded = ss.shard(model, optimizer, **options)
        sent = train_steps(model, optimizer, sharded, 2, 2)
        found.append((astuple(sharded.bytes.peak), astuple(sharded.bytes.formula), sent[1] - sharded.step_bytes(2)))
    return found


def test_the_formula_knows_the_states_of_each_rule_and_what_travels(ranks):
    """Muon's norms travel besides: a float64 for each block of a matrix."""
    runs = [{"stage": stage, "precision": precision} for stage in (0, 2, 3, MIXED) for precision in (None, BF16)]
    for results in ranks(2).run(counted, runs):
        for run, (peak, formula, more) in zip(runs, results, strict=True):
            assert peak == formula, run
            assert (more == 0) == (run["stage"] == 0), run
            assert more < 1000


def test_states_are_kept_for_the_parameters_of_their_rule_only():
    _, optimizer, _ = trained({"stage": 1})
    state = optimizer.state_dict()["state"]
    for group, names in zip(optimizer.param_groups, ({"momentum_buffer"}, {"exp_avg", "exp_avg_sq"}), strict=True):
        for param in group["params"]:
            assert set(state.get(_position(optimizer, param), names)) - {"step"} == names


def _position(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> int:
    every = [p for group in optimizer.param_groups for p in group["params"]]
    return next(index for index, own in enumerate(every) if own is param)


def test_state_dicts_go_to_the_same_combination_unsharded():
    _, optimizer, _ = trained({"stage": 3})
    state = optimizer.state_dict()
    torch.manual_seed(9)
    other_model = Tied()
    other = ss.optim.Combined(*members(other_model))
    other.load_state_dict(copy.deepcopy(state))
    again = other.state_dict()
    assert again["param_groups"] == state["param_groups"]
    for key, values in state["state"].items():
        assert all(torch.equal(again["state"][key][name], tensor) for name, tensor in values.items())
    assert other.optimizers[0].param_groups[0] is other.param_groups[0]


def test_ill_use():
    model = Tied()
    muon, adamw = members(model)
    with pytest.raises(ConfigError, match="got none; give at least one"):
        ss.optim.Combined()
    with pytest.raises(ConfigError, match=r"got torch\.optim.*SGD at position 1"):
        ss.optim.Combined(muon, torch.optim.SGD(adamw.param_groups[0]["params"]))  # type: ignore[arg-type]
    with pytest.raises(OwnershipError, match="positions 0 and 1"):
        ss.optim.Combined(muon, ss.optim.AdamW(muon.param_groups[0]["params"][:1]))
    optimizer = ss.optim.Combined(muon, adamw)
    with pytest.raises(ConfigError, match="add it to one of them before"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ConfigError, match="one rule to copy or pickle"):
        copy.deepcopy(optimizer)
    state = optimizer.state_dict()
    state["param_groups"][1]["lr"] = -1.0
    state["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ConfigError, match="lr ≥ 0"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.02
    with pytest.raises(MissingKeyError, match="got one without 'state'"):
        optimizer.load_state_dict({"param_groups": state["param_groups"]})
    with pytest.raises(ConfigError, match="2 parameter groups, got 1"):
        optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"][:1]})
    ss.shard(model, optimizer)
    for call in (muon.step, adamw.zero_grad, muon.state_dict):
        with pytest.raises(ConfigError, match="of the combined optimizer that was sharded"):
            call()
    with pytest.raises(ConfigError, match="not sharded, got one at position 0"):
        ss.optim.Combined(muon)
    with pytest.raises(ConfigError, match="shard it only once"):
        optimizer.attach(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("sharded", [False, True])
def test_hooks_see_what_is_loaded_and_what_came_of_it(sharded):
    saved = trained({"stage": 0})[1].state_dict()
    model = Tied()
    optimizer = ss.optim.Combined(*members(model))
    if sharded:
        ss.shard(model, optimizer, stage=0)
    seen = []

    def change(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(given["state"]))
        first, *others = given["param_groups"]
        return {**given, "param_groups": [{**first, "lr": 0.25}, *others]}

    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append(own.param_groups[0]["lr"]))
    optimizer.load_state_dict(saved)
    assert seen == [len(saved["state"]), 0.25]
    assert optimizer.param_groups[0] is optimizer.optimizers[0].param_groups[0]
    found = optimizer.state_dict()["state"]
    assert found.keys() == saved["state"].keys()
    for key, states in saved["state"].items():
        assert all(torch.equal(found[key][name], values) for name, values in states.items())


def test_a_parameter_in_none_of_them_is_named():
    model = Tied()
    muon, _ = members(model)
    with pytest.raises(OwnershipError, match="is in none of its param_groups"):
        ss.shard(model, ss.optim.Combined(muon))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(40), nn.Linear(40, 90), nn.Linear(90, 40)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Feeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Feed() for _ in range(3))
        self.head = nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).sum()


RULES: dict[str, Any] = {
    "one after the other": lambda name: 0 if "up" in name else 1 if "down" in name else 2,
    "mixed": lambda name: 0 if "weight" in name else 1 if "norm" in name or "up" in name else 2,
}


def bytes_with_three_rules(how: str, stages: tuple[Any, ...], leaves: int) -> list[tuple[Any, Any]]:
    found = []
    for stage in stages:
        model = Feeds()
        members: list[list[nn.Parameter]] = [[], [], []]
        for name, parameter in model.named_parameters():
            members[RULES[how](name)].append(parameter)
        kinds = (ss.optim.AdamW, ss.optim.SGD, ss.optim.RMSprop)
        optimizer = ss.optim.Combined(*(kind(params) for kind, params in zip(kinds, members, strict=True)))
        sharded = ss.shard(model, optimizer, stage=stage)
        for _ in range(2):
            for _ in range(leaves):
                model(torch.ones(2, 40)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((sharded.bytes.peak, sharded.bytes.formula))
    return found


@pytest.mark.parametrize("leaves", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("how", RULES)
def test_units_of_three_spaces_take_the_bytes_of_the_formula(ranks, how, world_size, leaves):
    for found in ranks(world_size).run(bytes_with_three_rules, how, (0, 1, 2, 3, MIXED), leaves):
        for peak, formula in found:
            assert peak == formula
