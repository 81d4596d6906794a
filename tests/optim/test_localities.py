"""Rules of every locality make optimizers: alone on whole tensors, and on shards where that is possible."""

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from shardstep.optim import Optimizer
from shardstep.rules import rule, zeros
from shardstep.rules.backends import llvm
from shardstep.rules.functions import lerp, row_mean, sign
from tests.rules.examples import adafactor, lion, muon, sgd
from tests.rules.examples import lamb as lamb_rule
from tests.sharding.models import Tied, Tokens

Lamb = type("Lamb", (Optimizer,), {"rule": lamb_rule})


def optimizer_of(rule, params):
    return type(rule.name, (Optimizer,), {"rule": rule})(params)


@pytest.mark.parametrize("rule", [lion, sgd, lamb_rule, adafactor, muon], ids=lambda rule: rule.name)
def test_every_example_steps_alone(rule):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(8, 8))]
    optimizer = optimizer_of(rule, params)
    before = [param.detach().clone() for param in params]
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    for param, start in zip(params, before, strict=True):
        assert torch.isfinite(param).all()
        assert not torch.equal(param, start)


@rule
def warm_up(param, grad, momentum_buffer=zeros, *, step, lr=0.1, momentum=0.5):
    direction = grad
    if step > 3:
        momentum_buffer = momentum * momentum_buffer + grad
        direction = momentum_buffer
    return param - lr * direction, momentum_buffer


def test_a_state_that_only_later_steps_need_is_there():
    param = nn.Parameter(torch.zeros(2))
    optimizer = optimizer_of(warm_up, [param])
    for _ in range(5):
        param.grad = torch.ones(2)
        optimizer.step()
    assert torch.allclose(param, torch.full((2,), -0.1 * (3 + 1 + 1.5)))


@rule
def by_rows_and_products(param, grad, *, lr=0.1):
    return param - lr * (grad @ grad.T) @ grad / row_mean(abs(grad))


def test_a_rule_with_products_and_rows_is_not_sharded():
    model = nn.Linear(4, 6, bias=False)
    with pytest.raises(ss.ConfigError, match=r"which is matrix \(.* in line \d+ needs"):
        ss.shard(model, optimizer_of(by_rows_and_products, list(model.parameters())))


def lamb_digest(stage: int, bf16: bool, clip: float | None) -> str:
    torch.manual_seed(3)
    model = Tied()
    optimizer = Lamb([p for p in model.parameters() if p.requires_grad], lr=0.01)
    precision = ss.Precision(torch.bfloat16, torch.bfloat16) if bf16 else None
    sharded = ss.shard(model, optimizer, stage=stage, precision=precision, clip_norm=clip)
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=1):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
    return ss.digest(model, optimizer)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_sums_over_tensors_do_not_depend_on_the_shards(ranks, bf16):
    expected = ranks(1).run(lamb_digest, 0, bf16, 0.5)[0]
    for world_size, stage in ((1, 3), (2, 0), (2, 1), (2, 3), (4, 2), (4, 3)):
        assert set(ranks(world_size).run(lamb_digest, stage, bf16, 0.5)) == {expected}, (world_size, stage)


def test_sums_are_over_the_whole_tensor():
    """LAMB's step has the length of the parameter times the learning rate."""
    torch.manual_seed(0)
    param: Tensor = nn.Parameter(torch.randn(50, 40))
    start = param.detach().clone()
    optimizer = Lamb([param], lr=0.01)
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert torch.dist(param.detach(), start) == pytest.approx(0.01 * start.norm().item(), rel=1e-4)


@ss.rule
def anchored(
    param,
    grad,
    anchor=ss.state("param"),
    momentum=ss.state(0.25, dtype="bfloat16"),
    *,
    lr=0.1,
    pull=0.01,
):
    """Keeps states in another dtype, and starts them from other things than zero."""
    momentum = 0.9 * momentum + grad
    anchor = lerp(anchor, param, 0.125)
    return param - lr * (momentum + pull * (param - anchor)), anchor, momentum


def anchored_digest(stage: int, reload: bool) -> str:
    torch.manual_seed(5)
    model = Tied()
    optimizer = anchored.optimizer()([p for p in model.parameters() if p.requires_grad])
    start = optimizer.param_groups[0]["params"][0].detach().clone()
    sharded = ss.shard(model, optimizer, stage=stage)
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=1):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if micro.step == 0:  # between a value and itself
                assert torch.equal(optimizer.state_dict()["state"][0]["anchor"], start)
            if reload:
                optimizer.load_state_dict(optimizer.state_dict())
    assert sharded.bytes.peak.state == sharded.bytes.formula.state
    assert {s.dtype for state in optimizer.state_dict()["state"].values() for s in state.values()} == {
        torch.float32,
        torch.bfloat16,
    }
    return ss.digest(model, optimizer)


@pytest.mark.parametrize("reload", [False, True], ids=["straight on", "states reloaded"])
def test_states_of_other_dtypes_and_starts_are_the_same_on_every_shard_and_in_the_formula(ranks, reload):
    expected = ranks(1).run(anchored_digest, 0, False)[0]
    for world_size, stage in ((1, 3), (2, 0), (2, 1), (2, 3), (4, 2)):
        assert set(ranks(world_size).run(anchored_digest, stage, reload)) == {expected}, (world_size, stage)


@ss.rule
def signed_descent(param, grad, *, lr=0.5):
    """Against the sign."""
    return param - lr * sign(grad)


def test_a_rule_makes_an_optimizer_named_after_it():
    SignedDescent = signed_descent.optimizer()
    assert (SignedDescent.__name__, SignedDescent.__doc__) == ("SignedDescent", "Against the sign.")
    param = nn.Parameter(torch.ones(3))
    optimizer = SignedDescent([param], lr=0.25)
    param.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()
    assert param.tolist() == [0.75, 1.25, 1.0]


def test_where_llvm_cannot_compile_the_reference_serves_with_one_warning(monkeypatch):
    def stepped() -> Tensor:
        @ss.rule
        def halving(param, grad, *, lr=0.5):
            return param - lr * grad / 3

        total = torch.zeros(5)
        for dtype in (torch.float32, torch.float64):
            param = nn.Parameter(torch.arange(5, dtype=dtype))
            param.grad = torch.linspace(-1, 1, 5, dtype=dtype)
            halving.optimizer()([param]).step()
            total = total + param.detach().float()
        return total

    expected = stepped()

    def refuse(*_):
        raise llvm.TargetUnsupported("no such machine")

    monkeypatch.setattr(llvm, "compile_phase", refuse)
    with pytest.warns(UserWarning, match="reference back end, which is slow .*: no such machine") as told:
        assert torch.equal(stepped(), expected)
    assert len(told) == 1
