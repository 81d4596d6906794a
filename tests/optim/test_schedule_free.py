"""Schedule-free AdamW between training and evaluation: the average is the paper's, and the way back keeps all bits."""

import copy

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.optim import AdamWScheduleFree
from tests.optim.papers import schedule_free

HYPER = {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 3}


def trained(dtype=torch.float32, steps=6):
    torch.manual_seed(2)
    params = [nn.Parameter(torch.randn(6, 5).t().to(dtype)), nn.Parameter(torch.randn(7).to(dtype))]
    optimizer = AdamWScheduleFree(params, **HYPER)
    states, expected = [{}, {}], [param.detach().double() for param in params]
    for step in range(steps):
        for index, param in enumerate(params):
            param.grad = torch.randn_like(param)
            expected[index] = schedule_free(states[index], expected[index], param.grad.double(), step + 1, **HYPER)
        optimizer.step()
    return params, optimizer, [state["x"] for state in states]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_eval_gives_the_average_and_train_the_bits_of_before(dtype, rtol):
    params, optimizer, averages = trained(dtype)
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        optimizer.eval()
        optimizer.eval()
        for param, average, y in zip(params, averages, before, strict=True):
            torch.testing.assert_close(param.detach().double(), average, rtol=rtol, atol=rtol)
            assert not torch.equal(param, y)
        optimizer.train()
        optimizer.train()
        assert all(torch.equal(param, y) for param, y in zip(params, before, strict=True))


def test_bfloat16_parameters_come_back_exactly_too():
    params, optimizer, _ = trained(torch.bfloat16)
    before = [param.detach().clone() for param in params]
    optimizer.eval()
    assert params[0].dtype == torch.bfloat16
    optimizer.train()
    assert all(torch.equal(param, y) for param, y in zip(params, before, strict=True))


def test_a_step_while_evaluating_is_refused_and_changes_nothing():
    params, optimizer, _ = trained()
    optimizer.eval()
    before, groups = params[0].detach().clone(), copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ss.SequenceError, match=r"call optimizer.train\(\) before the forward"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert [group["k"] for group in optimizer.param_groups] == [group["k"] for group in groups]


def test_a_step_that_cannot_be_made_leaves_the_groups_as_they_were():
    params, optimizer, _ = trained()
    before = {name: optimizer.param_groups[0][name] for name in ("k", "lr_max", "weight_sum")}
    params[0].grad = torch.ones(5, 6).to_sparse()
    with pytest.raises(ss.ConfigError, match="dense gradient"):
        optimizer.step()
    assert {name: optimizer.param_groups[0][name] for name in before} == before


def test_what_is_saved_while_evaluating_goes_on_in_another_process():
    params, optimizer, _ = trained(torch.float64)
    y = [param.detach().clone() for param in params]
    optimizer.eval()
    state, x = optimizer.state_dict(), [param.detach().clone() for param in params]
    others = [nn.Parameter(values) for values in x]
    other = AdamWScheduleFree(others, lr=1.0)
    other.load_state_dict(copy.deepcopy(state))
    assert other.param_groups[0]["k"] == 6
    other.train()
    for param, values in zip(others, y, strict=True):
        torch.testing.assert_close(param.detach(), values, rtol=1e-13, atol=1e-13)


def test_a_parameter_written_while_evaluating_is_not_overwritten_by_what_was_before():
    params, optimizer, _ = trained(torch.float64)
    optimizer.eval()
    with torch.no_grad():
        params[0].zero_()
    optimizer.train()
    z = optimizer.state[params[0]]["z"]
    torch.testing.assert_close(params[0].detach(), 0.1 * z, rtol=1e-12, atol=1e-12)


def test_before_the_first_step_and_without_updates_nothing_moves():
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamWScheduleFree([param])
    optimizer.eval()
    optimizer.train()
    assert param.tolist() == [1.0] * 3
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.param_groups[1]["train_mode"]


def test_the_closure_is_called_once():
    param, calls = nn.Parameter(torch.ones(3)), []

    def closure():
        calls.append(1)
        param.grad = torch.ones(3)
        return 5.0

    assert AdamWScheduleFree([param]).step(closure) == 5.0
    assert calls == [1]


def test_complex_parameters_swap_as_pairs_of_real_ones():
    torch.manual_seed(3)
    complex_ = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
    real = nn.Parameter(torch.view_as_real(complex_.detach()).clone())
    optimizers = [AdamWScheduleFree([param], lr=0.1) for param in (complex_, real)]
    complex_.grad = torch.randn(4, 3, dtype=torch.complex64)
    real.grad = torch.view_as_real(complex_.grad)
    for optimizer in optimizers:
        for _ in range(3):
            optimizer.step()
    y = complex_.detach().clone()
    for optimizer in optimizers:
        optimizer.eval()
    assert not torch.equal(complex_, y)
    assert torch.equal(torch.view_as_real(complex_.detach()), real)
    optimizers[0].train()
    assert torch.equal(complex_, y)


def test_elements_that_are_not_finite_come_back_too():
    params, optimizer, _ = trained()
    with torch.no_grad():
        params[0][0, 0], params[1][2] = float("inf"), float("nan")
        optimizer.state[params[1]]["z"][3] = float("nan")
    before = [param.detach().clone() for param in params]
    optimizer.eval()
    optimizer.train()
    assert all(torch.equal(p.view(torch.int32), y.view(torch.int32)) for p, y in zip(params, before, strict=True))


def test_autograd_sees_that_parameters_have_changed():
    params, optimizer, _ = trained()
    for move in (optimizer.eval, optimizer.train):
        loss = params[1].square().sum()
        move()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
