"""An update that cannot be made changes nothing: neither values nor states nor counts of steps, sharded or not."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.errors import ConfigError, RuleError
from shardstep.optim import Optimizer
from tests.rules import examples


class Muon(Optimizer):
    rule = examples.muon


def model_and_groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    return model, [{"params": list(layer.parameters())} for layer in model]


def run_backward(model):
    model(torch.arange(8.0).view(2, 4)).square().sum().backward()


def everything(model, optimizer, sharded):
    with ss.gathered(model) if sharded else contextlib.nullcontext():
        return copy.deepcopy([[p.detach() for p in model.parameters()], optimizer.state_dict()["state"]])


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("stage", [None, 0, 3])
@pytest.mark.parametrize("bad", [0, 1])
def test_hyperparameters_of_one_group_that_give_no_update_leave_all_groups_as_they_were(bad, stage, steps_before):
    model, groups = model_and_groups()
    optimizer = ss.optim.AdamW(groups, lr=0.1)
    if stage is not None:
        ss.shard(model, optimizer, stage=stage, units=["0", "1"])
    for _ in range(steps_before):
        run_backward(model)
        optimizer.step()
        optimizer.zero_grad()
    before = everything(model, optimizer, stage is not None)
    run_backward(model)
    optimizer.param_groups[bad]["betas"] = (1.0, 0.999)
    with pytest.raises(RuleError, match="to have a value, got a division by zero"):
        optimizer.step()
    optimizer.zero_grad()
    torch.testing.assert_close(everything(model, optimizer, stage is not None), before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [0, 1])
def test_the_same_holds_for_rules_over_whole_matrices(bad):
    model, groups = model_and_groups()
    optimizer = Muon(groups, lr=0.1)
    before = everything(model, optimizer, False)
    run_backward(model)
    optimizer.param_groups[bad].update(lr=1e200, weight_decay=1e200)
    with pytest.raises(RuleError, match="a number too large for float64"):
        optimizer.step()
    torch.testing.assert_close(everything(model, optimizer, False), before, rtol=0, atol=0)


def test_the_same_holds_for_gradients_that_cannot_be_used():
    model, groups = model_and_groups()
    optimizer = ss.optim.AdamW(groups, lr=0.1)
    before = everything(model, optimizer, False)
    run_backward(model)
    last = model[1].weight
    last.grad = last.grad.to_sparse()
    with pytest.raises(ConfigError, match="dense gradient at parameter group 1"):
        optimizer.step()
    torch.testing.assert_close(everything(model, optimizer, False), before, rtol=0, atol=0)
