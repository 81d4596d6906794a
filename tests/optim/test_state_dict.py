"""State dicts go to torch's AdamW and come from it; state keeps its dtype; a bad one changes nothing."""

import copy

import pytest
import torch
from torch import nn

from shardstep.errors import ConfigError
from shardstep.optim import AdamW, Optimizer
from shardstep.rules import rule, zeros


def model_and(optimizer_class, dtype=torch.float32, **hyper):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    groups = [{"params": list(model[0].parameters()), "lr": 0.01}, {"params": list(model[1].parameters())}]
    return model, optimizer_class(groups, **hyper)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize(("source", "target"), [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_a_run_continues_under_the_other_optimizer(source, target):
    model, optimizer = model_and(source, weight_decay=0.1)
    train(model, optimizer, 3)
    other_model, other = model_and(target)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for index, name in ((0, "lr"), (1, "weight_decay")):
        assert other.param_groups[index][name] == optimizer.param_groups[index][name]
    train(model, optimizer, 3, start=3)
    train(other_model, other, 3, start=3)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert other.state[q]["step"].item() == 6
        assert other.state[q].keys() == optimizer.state[p].keys()


def test_form_is_torchs():
    mine, theirs = (o.state_dict() for m, o in [trained(AdamW), trained(torch.optim.AdamW)])
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        for name, tensor in state.items():
            assert mine["state"][key][name].shape == tensor.shape
            assert mine["state"][key][name].dtype == tensor.dtype
    assert [g["params"] for g in mine["param_groups"]] == [g["params"] for g in theirs["param_groups"]]


def trained(optimizer_class, dtype=torch.float32):
    model, optimizer = model_and(optimizer_class, dtype)
    train(model, optimizer, 2)
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_resuming_loses_no_bit_of_the_state(dtype):
    model, optimizer = trained(AdamW, dtype)
    other_model, other = model_and(AdamW, dtype)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        for name in ("step", *optimizer.state_names):
            mine, loaded = optimizer.state[p][name], other.state[q][name]
            assert loaded.dtype == mine.dtype
            assert torch.equal(loaded, mine)
            assert loaded.data_ptr() != mine.data_ptr()
    train(model, optimizer, 2)
    train(other_model, other, 2)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_parameter_without_state_stays_without():
    model, optimizer = model_and(AdamW)
    model[0].weight.grad = torch.ones(3, 4)
    optimizer.step()
    _, other = model_and(AdamW)
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == 1


def test_load_hooks_see_the_whole_state_and_may_replace_it():
    _, optimizer = trained(AdamW)
    _, other = model_and(AdamW)
    seen = []

    def doubled(_, state_dict):
        seen.append(len(state_dict["state"]))
        state = {k: {n: t * 2 for n, t in s.items()} for k, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other.register_load_state_dict_pre_hook(doubled)
    other.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [4, 4]
    assert {state["step"].item() for state in other.state.values()} == {4.0}


@rule
def descend(param, grad, momentum_buffer=zeros, *, step, lr=0.1, momentum=0.9):
    momentum_buffer = grad if step == 1 else momentum * momentum_buffer + grad
    return param - lr * momentum_buffer, momentum_buffer


class Descend(Optimizer):
    rule = descend


def test_a_dict_without_step_counts_loads_where_only_the_first_step_differs():
    model, theirs = model_and(torch.optim.SGD, momentum=0.9, lr=0.1)
    train(model, theirs, 2)
    other_model, ours = model_and(Descend)
    other_model.load_state_dict(model.state_dict())
    saved = copy.deepcopy(theirs.state_dict())
    saved["state"][1]["momentum_buffer"] = None  # as older versions save a parameter that had no gradient
    theirs.load_state_dict(copy.deepcopy(saved))
    ours.load_state_dict(saved)
    assert ours.state[other_model[0].weight]["step"].item() == 1
    train(model, theirs, 2, start=2)
    train(other_model, ours, 2, start=2)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    theirs.load_state_dict(ours.state_dict())
    train(model, theirs, 1, start=4)


def test_a_dict_without_step_counts_is_refused_where_they_matter():
    _, optimizer = trained(AdamW)
    saved = optimizer.state_dict()
    saved = {**saved, "state": {0: {k: v for k, v in saved["state"][0].items() if k != "step"}}}
    with pytest.raises(KeyError, match=r"the states .*'step'.* for parameter 0, got"):
        optimizer.load_state_dict(saved)


def drop(state_dict, *path):
    for key in path[:-1]:
        state_dict = state_dict[key]
    del state_dict[path[-1]]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: d["param_groups"].pop(), r"groups of \[2, 2\] parameters, got \[2\]"),
        (lambda d: d["param_groups"][0]["params"].pop(), r"groups of \[2, 2\] parameters, got \[1, 2\]"),
        (lambda d: drop(d, "param_groups", 1, "eps"), r"loaded parameter group 1, got none for \['eps'\]"),
        (lambda d: d["param_groups"][1].update(lr=-1.0), "lr ≥ 0 in loaded parameter group 1"),
        (lambda d: d["param_groups"][1].update(capturable=True), "capturable=False in loaded parameter group 1"),
        (lambda d: d.pop("state"), "got one without 'state'"),
        (lambda d: d["param_groups"][1].update(amsgrad=True), "max_exp_avg_sq"),
        (lambda d: drop(d, "state", 1, "exp_avg"), "for parameter 1, got"),
        (lambda d: d["state"][1].update(max_exp_avg_sq=torch.ones(3)), "max_exp_avg_sq"),
        (lambda d: d["state"][1].update(exp_avg=torch.ones(4)), r"exp_avg of shape \(3,\) for parameter 1"),
        (lambda d: d["state"].update({9: d["state"][1]}), r"got state for \['9'\]"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(damage, said):
    _, optimizer = trained(AdamW)
    before = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(before)
    damaged["param_groups"][0]["lr"] = 7.0
    damage(damaged)
    with pytest.raises(ConfigError, match=said):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][k]["exp_avg"], s["exp_avg"]) for k, s in before["state"].items())
    assert not optimizer._optimizer_load_state_dict_pre_hooks
