"""AdamW in 8 bits alone: state dicts to and from float states, starts, and how well it trains."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardstep as ss
from shardstep.errors import ConfigError
from shardstep.optim import AdamW, AdamW8bit
from shardstep.rules.backends.dynamic8 import decode, encode

STATES = ("exp_avg", "exp_avg_sq")


def stepped(kind, dtype=torch.float32, steps=3):
    torch.manual_seed(2)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((30, 20), (257,), (), (0,))]
    optimizer = kind(params, lr=0.01)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape).to(dtype)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_state_is_a_byte_an_element_and_a_scale_for_256(dtype):
    params, optimizer = stepped(AdamW8bit, dtype)
    for param, blocks in zip(params, (3, 2, 1, 0), strict=True):
        state = optimizer.state[param]
        assert list(state) == ["step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
        for name in STATES:
            assert state[name].shape == param.shape
            assert (state[f"{name}_scale"].shape, state[f"{name}_scale"].dtype) == ((blocks,), torch.float32)


def test_it_moves_as_adamw_does_where_the_states_are_exact():
    """After one step from zero states, the new param has not met a rounded state."""
    ours, _ = stepped(AdamW8bit, steps=1)
    theirs, _ = stepped(AdamW, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resuming_loses_no_bit(dtype):
    params, optimizer = stepped(AdamW8bit, dtype)
    twins, other = stepped(AdamW8bit, dtype, steps=0)
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        for name, values in optimizer.state[param].items():
            loaded = other.state[twin][name]
            assert torch.equal(loaded, values)
            assert loaded.dtype == values.dtype
            assert not values.numel() or loaded.data_ptr() != values.data_ptr()
        twin.data.copy_(param.data)
    torch.manual_seed(9)
    for one, its in ((optimizer, params), (other, twins)):
        torch.manual_seed(9)
        for param in its:
            param.grad = torch.randn(param.shape).to(dtype)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    for key, state in saved["state"].items():
        assert torch.equal(state["exp_avg"], saved["state"][key]["exp_avg"])


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW], ids=["ours", "torch's"])
def test_float_states_are_encoded(kind):
    params, optimizer = stepped(kind)
    twins, other = stepped(AdamW8bit, steps=0)
    other.load_state_dict(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        for name, dtype in zip(STATES, (torch.int8, torch.uint8), strict=True):
            codes, scale = encode(optimizer.state[param][name], dtype)
            assert torch.equal(other.state[twin][name], codes)
            assert torch.equal(other.state[twin][f"{name}_scale"], scale)
        assert other.state[twin]["step"] == 3


def test_states_in_8_bits_become_numbers_and_other_bits():
    params, optimizer = stepped(AdamW8bit)
    twins, plain = stepped(AdamW, steps=0)
    plain.load_state_dict(optimizer.state_dict())
    mixed = AdamW.rule.stored(exp_avg="dynamic8_unsigned", exp_avg_sq="bfloat16")
    thirds, other = stepped(type("Mixed", (AdamW,), {"rule": mixed}), steps=0)
    other.load_state_dict(optimizer.state_dict())
    for param, twin, third in zip(params, twins, thirds, strict=True):
        first, second = (decode(optimizer.state[param][n], optimizer.state[param][f"{n}_scale"]) for n in STATES)
        assert torch.equal(plain.state[twin]["exp_avg"], first)
        assert torch.equal(plain.state[twin]["exp_avg_sq"], second)
        assert list(plain.state[twin]) == ["step", *STATES]
        assert torch.equal(other.state[third]["exp_avg"], encode(first, torch.uint8)[0])
        assert torch.equal(other.state[third]["exp_avg_sq"], second.bfloat16())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: s.pop("exp_avg_scale"), r"'exp_avg_scale', 'exp_avg_sq', 'exp_avg_sq_scale'\] for parameter 0, got"),
        (lambda s: s.update(exp_avg_scale=torch.ones(2)), r"exp_avg_scale of shape \(3,\) in float32 for parameter 0"),
        (lambda s: s.update(exp_avg_scale=torch.ones(3).double()), r"in float32 for parameter 0, got \(3,\) in .*64"),
        (lambda s: s.update(exp_avg=torch.ones(30, 20)), "got .*'exp_avg_scale'"),
    ],
)
def test_a_damaged_state_dict_changes_nothing(damage, said):
    params, optimizer = stepped(AdamW8bit)
    damaged = copy.deepcopy(optimizer.state_dict())
    damage(damaged["state"][0])
    before = copy.deepcopy(optimizer.state[params[0]])
    with pytest.raises(ConfigError, match=said):
        optimizer.load_state_dict(damaged)
    assert all(torch.equal(before[name], values) for name, values in optimizer.state[params[0]].items())


@ss.rule
def started(
    param,
    grad,
    half=ss.state(0.5, dtype="dynamic8"),
    anchor=ss.state("param", dtype="dynamic8"),
    *,
    lr=0.1,
):
    """States in 8 bits that start from other things than zero."""
    half, anchor = half + grad, anchor + 0 * grad
    return param - lr * (half + anchor), half, anchor


def test_states_start_from_numbers_and_from_the_parameter():
    param = nn.Parameter(torch.linspace(-1, 2, 300))
    before = decode(*encode(param, torch.int8))
    optimizer = started.optimizer()([param])
    param.grad = torch.zeros(300)
    optimizer.step()
    state = optimizer.state[param]
    assert (decode(state["half"], state["half_scale"]) == 0.5).all()
    assert torch.equal(decode(state["anchor"], state["anchor_scale"]), before)


def test_a_rule_over_matrices_may_have_states_in_8_bits():
    """Such rules run whole, on the reference back end."""

    @ss.rule
    def centred(param, grad, buffer=ss.state(dtype="dynamic8"), *, lr=0.1):
        buffer = 0.9 * buffer + (grad - row_mean(grad))  # noqa: F821
        return param - lr * buffer, buffer

    param = nn.Parameter(torch.zeros(20, 30))
    optimizer = centred.optimizer()([param])
    grads = [torch.randn(20, 30, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    expected = torch.zeros(20, 30)
    for grad in grads:
        expected = 0.9 * decode(*encode(expected, torch.int8)) + grad - grad.mean(1, keepdim=True)
        param.grad = grad
        optimizer.step()
    state = optimizer.state[param]
    torch.testing.assert_close(decode(state["buffer"], state["buffer_scale"]), expected, rtol=0, atol=0.05)


def final_loss(kind):
    """A small net learns handwritten digits."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10))
    optimizer = kind(model.parameters(), lr=3e-3)
    for step in range(300):
        batch = torch.randint(len(x), (128,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.cross_entropy(model(x), y).item()


def test_it_trains_about_as_well_as_32_bits():
    ours, theirs = final_loss(AdamW8bit), final_loss(AdamW)
    assert theirs < 0.05
    assert ours < 1.1 * theirs
