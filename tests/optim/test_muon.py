"""Muon: torch's, within bfloat16; an independent float32 form of it; its arguments, state dicts and errors."""

import math

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.errors import ConfigError

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 16), (16, 1)]


def stepped(make, shapes=SHAPES, steps=5, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = make(params, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.8},
        {"lr": torch.tensor(0.02), "nesterov": False},
        {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"},
        {"lr": 0.02, "adjust_lr_fn": "original", "ns_steps": 6},
        {"lr": 0.02, "ns_coefficients": (3.0, -4.0, 2.0), "ns_steps": 3, "eps": 1e-5},
    ],
    ids=str,
)
def test_it_is_torchs_within_bfloat16(options):
    ours, optimizer = stepped(ss.optim.Muon, **options)
    theirs, reference = stepped(torch.optim.Muon, **options)
    start, _ = stepped(ss.optim.Muon, steps=0)
    for mine, other, first in zip(ours, theirs, start, strict=True):
        assert torch.dist(mine, other) <= 0.05 * torch.dist(other, first)
        momentum, wanted = optimizer.state[mine]["momentum_buffer"], reference.state[other]["momentum_buffer"]
        torch.testing.assert_close(momentum, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_other_dtypes(dtype):
    ours, _ = stepped(ss.optim.Muon, dtype=dtype, lr=0.02)
    theirs, _ = stepped(torch.optim.Muon, dtype=dtype, lr=0.02)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)], ids=str)
def test_the_update_is_nearly_orthogonal(shape):
    """Its singular values lie around 1, which is what the iteration is for; the length of a step follows from it."""
    (param,), _ = stepped(ss.optim.Muon, [shape], steps=1, lr=1.0, weight_decay=0.0)
    (start,), _ = stepped(ss.optim.Muon, [shape], steps=0)
    values = torch.linalg.svdvals((start - param).detach()) / math.sqrt(max(1, shape[0] / shape[1]))
    assert 0.5 < values.min() < values.max() < 1.5


def test_without_steps_of_the_iteration_it_is_normalised_momentum():
    (param,), _ = stepped(ss.optim.Muon, [(6, 8)], steps=1, lr=1.0, weight_decay=0.0, ns_steps=0)
    (start,), _ = stepped(ss.optim.Muon, [(6, 8)], steps=0)
    assert torch.dist(param, start).item() == pytest.approx(1.0, rel=1e-2)


def test_a_gradient_of_zeros_changes_nothing_but_by_decay():
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = ss.optim.Muon([param], lr=0.5, weight_decay=0.5)
    param.grad = torch.zeros(4, 6)
    optimizer.step()
    assert torch.equal(param, torch.full((4, 6), 0.75))


def test_groups_go_their_own_ways():
    params, optimizer = stepped(
        lambda given: ss.optim.Muon([{"params": given[:2], "ns_steps": 2}, {"params": given[2:], "nesterov": False}])
    )
    for pair, options in ((slice(0, 2), {"ns_steps": 2}), (slice(2, None), {"nesterov": False})):
        alone, _ = stepped(lambda given, options=options: ss.optim.Muon(given, **options))
        assert all(torch.equal(a, b) for a, b in zip(params[pair], alone[pair], strict=True))
    assert optimizer.param_groups[0]["adjust_lr_fn"] == "original"


def test_schedulers_and_state_dicts():
    params, optimizer = stepped(ss.optim.Muon, steps=3, lr=0.02)
    other = ss.optim.Muon([nn.Parameter(p.detach().clone()) for p in params], lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    for one in (optimizer, other):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(one, 0.5)
        for _ in range(2):
            for index, param in enumerate(one.param_groups[0]["params"]):
                param.grad = torch.full(param.shape, 0.1 * (index + 1))
            one.step()
            scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(params, other.param_groups[0]["params"], strict=True))
    torch.optim.Muon([p.detach().clone().requires_grad_() for p in params]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr ≥ 0"),
        ({"lr": float("nan")}, "lr ≥ 0"),
        ({"momentum": -0.1}, "momentum ≥ 0"),
        ({"weight_decay": -0.1}, "weight_decay ≥ 0"),
        ({"adjust_lr_fn": "arbitrary"}, "'original' or 'match_rms_adamw'"),
        ({"ns_steps": 11}, "0 to 10 ns_steps"),
        ({"ns_steps": 2.5}, "0 to 10 ns_steps"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients to be three"),
    ],
    ids=str,
)
def test_values_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        ss.optim.Muon([nn.Parameter(torch.zeros(2, 2))], **options)


@pytest.mark.parametrize("shape", [(3,), (), (2, 2, 2)], ids=str)
def test_what_is_no_matrix_is_refused(shape):
    matrix, other = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(shape))
    with pytest.raises(
        ValueError, match=r"two dimensions for Muon, .* position 1 of parameter group 0; give it to AdamW"
    ):
        ss.optim.Muon([matrix, other])
    optimizer = ss.optim.Muon([matrix])
    with pytest.raises(ConfigError, match="position 0 of parameter group 1"):
        optimizer.add_param_group({"params": [other]})
    assert len(optimizer.param_groups) == 1
