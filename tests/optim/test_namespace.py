"""``import shardstep.optim as optim`` stands for ``import torch.optim as optim``."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import shardstep as ss

NOT_YET = set("Adafactor Adadelta Adagrad Adam Adamax ASGD Muon NAdam RAdam RMSprop Rprop SGD".split())
TORCHS_OWN = set("LBFGS SparseAdam lr_scheduler swa_utils swap_in_optimizer_params_and_state".split())


def test_every_name_of_torch_is_here():
    assert {name for name in torch.optim.__all__ if not hasattr(ss.optim, name)} <= NOT_YET
    for name in set(torch.optim.__all__) & set(dir(ss.optim)):
        own, torchs = getattr(ss.optim, name), getattr(torch.optim, name)
        assert (own is torchs) is (name in TORCHS_OWN)
        assert own is torchs or issubclass(own, torch.optim.Optimizer)
    assert ss.optim.register_optimizer_step_pre_hook is register_optimizer_step_pre_hook
    assert ss.optim.register_optimizer_step_post_hook is register_optimizer_step_post_hook


@pytest.mark.parametrize(
    ("groups", "error", "said"),
    [
        (nn.Parameter(torch.ones(1)), TypeError, "groups of them, got a single tensor"),
        ([3.0], TypeError, "a tensor at parameter group 0, position 0, got float"),
        ([{"params": {nn.Parameter(torch.ones(1))}}], TypeError, "fixed order, got a set"),
        ([{"lr": 0.1}], KeyError, r"'params' in parameter group 0, got only \['lr'\]"),
        ([{"params": [nn.Parameter(torch.ones(1))]}, nn.Parameter(torch.ones(1))], TypeError, "group 1 to be a dict"),
        ([nn.Parameter(torch.ones(1)) * 2], ValueError, "a leaf at parameter group 0, position 0, got the result"),
        ([torch.ones(1, dtype=torch.int32)], ValueError, "got torch.int32"),
        ([("a", nn.Parameter(torch.ones(1))), nn.Parameter(torch.ones(1))], ValueError, "their names or all without"),
        ([], ValueError, "parameters to optimize, got none"),
    ],
)
def test_parameters_of_the_wrong_kind_have_torchs_errors(groups, error, said):
    with pytest.raises(error, match=said) as raised:
        ss.optim.AdamW(groups)
    assert isinstance(raised.value, ss.ConfigError)


@ss.rule
def either_way(param, grad, *, lr=0.5, maximize=False):
    return param + lr * grad if maximize else param - lr * grad


@ss.rule
def down(param, grad, *, lr=0.5):
    return param - lr * grad


@pytest.mark.parametrize("rule", [either_way, down], ids=["its own flag", "torch's option"])
def test_maximize_turns_a_step_around_once(rule):
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = rule.optimizer()([{"params": params[:1], "maximize": True}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    assert [param.tolist() for param in params] == [[1.5, 1.5], [0.5, 0.5]]


def test_parameters_may_get_their_shapes_later():
    assert ss.optim.AdamW(nn.LazyLinear(3).parameters()).param_groups
