"""The seam to sharding: an optimizer with a source updates flat runs and holds nothing itself."""

import copy
import pickle

import pytest
import torch
from torch import nn

from shardstep.errors import ConfigError
from shardstep.optim import AdamW
from shardstep.types import Batch, Segment, Update


class Halves:
    """Holds each parameter as two flat runs, with the gradients halved and scaled back on the way in."""

    def __init__(self, optimizer):
        self.params = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
        self.names = optimizer.state_names
        self.flat = {p: p.detach().clone().view(-1) for _, p in self.params}
        self.low = {p: torch.empty(p.numel(), dtype=torch.bfloat16) for _, p in self.params}
        self.state = {}
        self.log = []

    def batches(self, *, per_tensor, whole):
        yield from (Batch([s], [Update(s.group, s.step, ())], lambda sums, _: sums) for s in self.segments())

    def segments(self):
        for group, param in self.params:
            if param.grad is None:
                continue
            fresh = {n: torch.zeros(param.shape) for n in self.names} | {"step": torch.zeros(())}
            state = self.state.setdefault(param, fresh)
            state["step"] += 1
            grad, middle = param.grad.view(-1) * 2, param.numel() // 2
            for part in (slice(0, middle), slice(middle, None)):
                pieces = {n: state[n].view(-1)[part] for n in self.names}
                yield Segment(
                    group,
                    int(state["step"]),
                    self.flat[param][part],
                    grad[part],
                    pieces,
                    self.low[param][part],
                    0.5,
                )
            self.log.append("published")

    def include(self, parameters):
        raise ConfigError("no other parameters")

    def discard(self):
        self.log.append("discarded")

    def whole_state(self):
        return self.state

    def check_adoptable(self):
        pass

    def adopt_state(self, state):
        self.state = {p: {n: t.clone() for n, t in s.items()} for p, s in state.items()}


def pair():
    """(parameters, optimizer, source, twin parameters, twin optimizer that works alone)."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    groups = [[{"params": [a], "lr": 0.1}, {"params": [b]}] for a, b in (params, twins)]
    optimizer, alone = (AdamW(g, lr=0.01) for g in groups)
    return params, optimizer, Halves(optimizer), twins, alone


def train(steps, *sides):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator) for p in sides[0][0]]
        for params, optimizer in sides:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
            optimizer.zero_grad()


def assert_same(params, source, twins, alone):
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(source.flat[param], twin.detach().view(-1))
        assert torch.equal(source.low[param], source.flat[param].bfloat16())
        for name, tensor in alone.state[twin].items():
            assert torch.equal(source.state[param][name], tensor)


def test_segments_give_the_bits_of_the_optimizer_alone():
    params, optimizer, source, twins, alone = pair()
    optimizer.attach(source)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, alone)]
    for _ in range(3):
        train(2, (params, optimizer), (twins, alone))
        for scheduler in schedulers:
            scheduler.step()
    assert_same(params, source, twins, alone)
    assert not optimizer.state
    assert source.log[:3] == ["published", "published", "discarded"]


def test_state_from_before_is_handed_over():
    params, optimizer, source, twins, alone = pair()
    train(2, (params, optimizer), (twins, alone))
    source.flat = {p: p.detach().clone().view(-1) for p in params}
    optimizer.attach(source)
    assert not optimizer.state
    train(2, (params, optimizer), (twins, alone))
    assert_same(params, source, twins, alone)


def test_state_dict_is_whole_and_loads_on_either_side():
    params, optimizer, source, twins, alone = pair()
    optimizer.attach(source)
    train(2, (params, optimizer), (twins, alone))
    ours, theirs = optimizer.state_dict(), alone.state_dict()
    assert not optimizer.state
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][key][name], tensor) for name, tensor in state.items())
    _, other, other_source, _, other_alone = pair()
    other.attach(other_source)
    other.load_state_dict(ours)
    other_alone.load_state_dict(ours)
    assert not other.state
    for mine, loaded in zip(source.state.values(), other_source.state.values(), strict=True):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in mine.items())
    assert other_source.state.keys() == {p for _, p in other_source.params}
    assert len(other_alone.state) == 2


def test_zero_grad_forgets_at_the_source_and_leaves_none():
    params, optimizer, source, _, _ = pair()
    optimizer.attach(source)
    params[0].grad = torch.ones(5, 3)
    optimizer.zero_grad(set_to_none=False)
    assert source.log == ["discarded"]
    assert params[0].grad is None


def test_hooks_and_closure_work_with_a_source():
    params, optimizer, source, _, _ = pair()
    optimizer.attach(source)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    params[0].grad = torch.ones(5, 3)
    assert optimizer.step(lambda: 4.0) == 4.0
    assert (seen, source.log) == (["after"], ["published"])


def test_ill_use_of_a_sharded_optimizer():
    _, optimizer, source, _, _ = pair()
    optimizer.attach(source)
    with pytest.raises(ConfigError, match="shard it only once"):
        optimizer.attach(source)
    with pytest.raises(ConfigError, match="no other parameters"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(1))})
    assert len(optimizer.param_groups) == 2
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match="use state_dict"):
            copied(optimizer)
