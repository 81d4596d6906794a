"""What Keras's optimizers share, without Keras: groups, rates, counts, averages, clipping, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.optim import keras


def parameter(values=(3.0, -4.0)):
    param = nn.Parameter(torch.tensor(values))
    param.grad = torch.tensor(values)
    return param


def test_the_rate_is_lr_in_the_groups_and_torchs_schedulers_drive_it():
    param = parameter()
    optimizer = keras.SGD([{"params": [param], "learning_rate": 0.5}, {"params": [parameter()]}], learning_rate=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert optimizer.learning_rate == 0.25
    optimizer.learning_rate = 2.0
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 2.0]


def test_a_function_of_the_count_of_steps_is_a_rate_and_survives_a_copy():
    optimizer = keras.SGD([parameter([1.0])], learning_rate=lambda step: 1.0 / (step + 1), global_clipnorm=8.0)
    optimizer.step()
    optimizer = copy.deepcopy(optimizer)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(1)
    optimizer.step()
    assert (optimizer.iterations, optimizer.learning_rate, param.item()) == (2, 0.5, -0.5)
    optimizer.learning_rate = 0.25
    assert optimizer.learning_rate == 0.25


def test_the_count_of_steps_is_the_optimizers_and_is_saved():
    early, late = parameter(), parameter()
    optimizer = keras.Nadam([early, late])
    late.grad = None
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["iterations"] == 1
    assert saved["param_groups"][0]["u_product"] == pytest.approx(0.9 * (1 - 0.5 * 0.96))
    again = keras.Nadam([parameter(), parameter()])
    again.load_state_dict(saved)
    again.add_param_group({"params": [parameter()]})
    again.step()
    assert [group["iterations"] for group in again.param_groups] == [2, 2]


def test_only_the_norm_of_all_gradients_is_clipped():
    params = [parameter([3.0]), parameter([4.0])]
    optimizer = keras.SGD(params, learning_rate=1.0, global_clipnorm=1.0)
    optimizer.step()
    assert [param.item() for param in params] == pytest.approx([3.0 - 0.6, 4.0 - 0.8])
    params[0].grad = torch.tensor([math.inf])
    with pytest.raises(ss.NonFiniteGradientError, match="norm of inf in step 1; nothing was updated"):
        optimizer.step()
    assert [param.item() for param in params] == pytest.approx([3.0 - 0.6, 4.0 - 0.8])
    assert optimizer.iterations == 1


def test_averages_start_from_the_parameter_and_replace_it():
    param = parameter([1.0])
    optimizer = keras.SGD([param], learning_rate=1.0, use_ema=True, ema_momentum=0.75)
    for _ in range(2):
        param.grad = torch.ones(1)
        optimizer.step()
    assert param.item() == -1.0
    optimizer.finalize_variable_values()
    assert param.item() == 0.75 * 0.0 + 0.25 * -1.0
    without = keras.SGD([param])
    without.finalize_variable_values()
    assert param.item() == -0.25


def test_a_closure_is_called_once_with_gradients_enabled():
    param, calls = parameter([1.0]), []
    optimizer = keras.SGD([param], learning_rate=1.0)

    def closure():
        calls.append(torch.is_grad_enabled())
        return 5.0

    assert (optimizer.step(closure), calls) == (5.0, [True])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: keras.Adam(p, clipnorm=1.0, clipvalue=1.0), r"only one of clipnorm, clipvalue, global_clipnorm"),
        (lambda p: keras.Adam([{"params": p, "clipnorm": 1.0}], global_clipnorm=1.0), r"only one of clipnorm"),
        (lambda p: keras.Adam([{"params": p, "global_clipnorm": 1.0}]), "for the whole optimizer, got it in parameter"),
        (lambda p: keras.Adam(p, gradient_accumulation_steps=2), "got .'gradient_accumulation_steps'"),
        (lambda p: keras.Adam(p, learning_rate=-1.0), "lr ≥ 0 in parameter group 0, got -1.0"),
        (lambda p: keras.Adam(p, beta_1=1.5), "0 ≤ beta_1 ≤ 1"),
        (lambda p: keras.AdamW(p, weight_decay=None), "weight_decay to be a number for AdamW"),
        (lambda p: keras.Ftrl(p, learning_rate_power=0.5), "learning_rate_power ≤ 0"),
        (lambda p: keras.Lion(p, ema_overwrite_frequency=0), "ema_overwrite_frequency to be a positive integer"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ss.ConfigError, match=message):
        make([parameter()])


def test_none_means_off():
    optimizer = keras.Adam([{"params": [parameter()], "weight_decay": None}], clipnorm=None, clipvalue=0.5)
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.clip) == (0.0, None)
    assert keras.Adam([parameter()], global_clipnorm=2.0).clip(8.0) == 0.25


def sharded_averages(stage, precision):
    torch.manual_seed(0)
    model = nn.Linear(40, 60)
    optimizer = keras.Adam(model.parameters(), learning_rate=0.1, use_ema=True)
    ss.shard(model, optimizer, stage=stage, precision=precision)
    for step in range(2):
        torch.manual_seed(step)
        model(torch.randn(2, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finalize_variable_values()
    averages = [state["average"] for state in optimizer.state_dict()["state"].values()]
    with ss.gathered(model):
        values = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(ss.SequenceError, match="replacement of parameters outside"):
            optimizer.finalize_variable_values()
    for value, average in zip(values, averages, strict=True):
        assert torch.equal(value, average.to(value.dtype))
    return ss.digest(model, optimizer)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_averages_replace_sharded_parameters(ranks, bf16):
    precision = ss.Precision(torch.bfloat16, torch.bfloat16) if bf16 else None
    expected = sharded_averages(0, precision)
    for stage in range(4):
        assert ranks(2).run(sharded_averages, stage, precision) == [expected, expected]
