"""AdamW alone on one device: the same meaning as torch's, state of torch's form, and every ill use said."""

import copy

import pytest
import torch
from torch import nn

from shardstep.errors import ConfigError, OwnershipError
from shardstep.optim import AdamW, Optimizer
from shardstep.rules import rule

HYPER = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.05}


def params_of(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 15), (1,), (), (3, 4, 5), (0, 2)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(step, *sides):
    generator = torch.Generator().manual_seed(100 + step)
    for group in zip(*sides, strict=True):
        grad = torch.randn(group[0].shape, generator=generator, dtype=torch.float64)
        for param in group:
            param.grad = grad.to(param.dtype)


def run(steps, ours, theirs, optimizers):
    for step in range(steps):
        set_grads(step, ours, theirs)
        for optimizer in optimizers:
            optimizer.step()


def ulps(ours, theirs):
    """Distance in units in the last place, of 0.5 for smaller values: sums of terms that large may cancel."""
    unit = torch.finfo(ours.dtype).eps * theirs.abs().clamp(min=0.5)
    return ((ours - theirs).abs() / unit).max().item() if ours.numel() else 0.0


@pytest.mark.parametrize("hyper", [{}, HYPER])
def test_float32_agrees_with_torch_within_a_few_ulps(hyper):
    ours, theirs = params_of(), params_of()
    mine, reference = AdamW(ours, **hyper), torch.optim.AdamW(theirs, foreach=False, **hyper)
    run(20, ours, theirs, (mine, reference))
    for p, q in zip(ours, theirs, strict=True):
        assert ulps(p.detach(), q.detach()) <= 4
        for name in mine.state_names:
            assert ulps(mine.state[p][name], reference.state[q][name]) <= 4


def test_it_has_the_bits_of_torchs_fused_kernel():
    """In arrays of whole vectors; the last few elements of others are rounded otherwise in torch."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(64, 100, generator=generator)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    ours = AdamW(params[:1], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(params[1:], lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(10):
        grad = torch.randn(start.shape, generator=generator)
        for param, optimizer in zip(params, (ours, theirs), strict=True):
            param.grad = grad.clone()
            optimizer.step()
    assert torch.equal(*params)
    for name in ours.state_names:
        assert torch.equal(ours.state[params[0]][name], theirs.state[params[1]][name])


def test_float64_agrees_with_torch_to_1e_12():
    ours, theirs = params_of(torch.float64), params_of(torch.float64)
    mine, reference = AdamW(ours, **HYPER), torch.optim.AdamW(theirs, foreach=False, **HYPER)
    run(20, ours, theirs, (mine, reference))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
        assert mine.state[p]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_updated_in_float32_and_rounded(dtype):
    ours = params_of(dtype)
    full = [nn.Parameter(p.detach().float()) for p in ours]
    mine, reference = AdamW(ours, **HYPER), AdamW(full, **HYPER)
    for step in range(5):
        set_grads(step, ours)
        for p, q in zip(ours, full, strict=True):
            q.grad = p.grad.float()
        mine.step()
        reference.step()
        for p, q in zip(ours, full, strict=True):
            assert torch.equal(p.detach(), q.detach().to(dtype))
            assert mine.state[p]["exp_avg_sq"].dtype == torch.float32
            q.data.copy_(p.detach())  # alone there is no master: the rounded value is what is kept


def test_parameters_and_gradients_need_not_be_contiguous():
    storage = torch.randn(6, 5)
    param, plain = nn.Parameter(storage.t()), nn.Parameter(storage.t().contiguous())
    param.grad, plain.grad = torch.randn(6, 5).t(), None
    plain.grad = param.grad.contiguous()
    for p in (param, plain):
        optimizer = AdamW([p], **HYPER)
        optimizer.step()
    assert not param.is_contiguous()
    assert param.data_ptr() == storage.data_ptr()
    assert torch.equal(param, plain)


def test_a_parameter_without_gradient_is_left_alone_and_counts_its_own_steps():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([first, second])
    first.grad = torch.ones(3)
    optimizer.step()
    second.grad = torch.ones(3)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (first, second)] == [2.0, 1.0]
    assert optimizer.state[first]["step"].dtype == torch.float32
    lone = nn.Parameter(torch.ones(3))
    optimizer = AdamW([lone])
    optimizer.step()
    assert not optimizer.state
    assert torch.equal(lone, torch.ones(3))


def test_groups_names_and_tensor_lr():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    tensor_lr = AdamW([{"params": [("a", a)], "lr": torch.tensor(0.5)}, {"params": [("b", b)]}], lr=0.25)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    tensor_lr.step()
    assert tensor_lr.param_groups[0]["param_names"] == ["a"]
    assert (1 - a[0]).item() == pytest.approx(0.505, rel=1e-5)
    assert (1 - b[0]).item() == pytest.approx(0.2525, rel=1e-5)


def test_closure_is_called_first_with_gradients_enabled():
    param = nn.Parameter(torch.ones(2))
    optimizer = AdamW([param])

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 2.0
    assert (param < 1).all()


def test_step_hooks_run_and_the_profiler_sees_the_step():
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer, seen = AdamW([param]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", param[0].item())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", param[0].item())))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert [name for name, _ in seen] == ["before", "after"]
    assert seen[0][1] == 1.0 > seen[1][1]
    assert "Optimizer.step#AdamW.step" in [event.key for event in profile.key_averages()]


def test_a_copy_steps_alike():
    param = nn.Parameter(torch.randn(5))
    optimizer = AdamW([param], **HYPER)
    param.grad = torch.randn(5)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    other = twin.param_groups[0]["params"][0]
    other.grad = param.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(param, other)


def test_inplace_update_is_seen_by_autograd():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    loss = param.square().sum()
    AdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("hyper", "said"),
    [
        ({"lr": -1.0}, "lr ≥ 0 in parameter group 0, got -1.0"),
        ({"lr": float("nan")}, "lr ≥ 0"),
        ({"lr": "big"}, "lr to be a number"),
        ({"lr": torch.ones(2)}, "lr to be a number"),
        ({"eps": -1e-8}, "eps ≥ 0"),
        ({"weight_decay": -0.1}, "weight_decay ≥ 0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] < 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] < 1"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"betas": 0.9}, "two numbers"),
    ],
)
def test_ranges_are_checked_for_all_and_for_each_group(hyper, said):
    with pytest.raises(ConfigError, match=said):
        AdamW([nn.Parameter(torch.ones(1))], **hyper)
    groups = [{"params": nn.Parameter(torch.ones(1))}, {"params": nn.Parameter(torch.ones(1)), **hyper}]
    with pytest.raises(ValueError, match="in parameter group 1"):
        AdamW(groups)


def test_its_decay_is_always_decoupled():
    with pytest.raises(ConfigError, match="decoupled_weight_decay=True of AdamW in parameter group 0"):
        AdamW([{"params": [nn.Parameter(torch.ones(1))], "decoupled_weight_decay": False}])


def test_a_parameter_given_twice_is_named():
    param, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(OwnershipError, match="group 0, position 2 also at parameter group 0, position 0"):
        AdamW([param, other, param])
    with pytest.raises(OwnershipError, match=r"group 1, position 0 \('head'\).*group 0, position 1"):
        AdamW([{"params": [("a", other), ("b", param)]}, {"params": [("head", param)]}])


def test_other_ill_use():
    with pytest.raises(ConfigError, match="got none; does the model have any"):
        AdamW(nn.ReLU().parameters())
    with pytest.raises(ConfigError, match=r"position 0 \('c'\), got torch.int64"):
        AdamW([("c", torch.ones(1, dtype=torch.int64))])
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="dense gradient at parameter group 0, position 0"):
        AdamW(embedding.parameters()).step()


@rule
def descend(param, grad, *, lr):
    return param - lr * grad


class Descend(Optimizer):
    rule = descend


def test_any_rule_makes_an_optimizer():
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = Descend([param], lr=0.5)
    optimizer.step()
    assert param.tolist() == [0.5, 0.5]
    assert optimizer.state_names == ()
    with pytest.raises(ConfigError, match=r"values for \['lr'\]"):
        Descend([param])
    with pytest.raises(ConfigError, match=r"among \['lr'\] for the rule 'descend', got \['momentum'\]"):
        Descend([param], lr=0.1, momentum=0.9)
