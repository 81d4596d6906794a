"""Many tensors in one step: the bits of one optimizer each, whatever they are, and whatever was replaced since the last
step.
"""

import weakref

import pytest
import torch
from torch import nn

from shardstep.errors import ConfigError
from shardstep.optim import SGD, AdamW, AdamW8bit
from shardstep.rules.backends.llvm import kernel
from shardstep.types import Segment, Stack

SHAPES = [(7, 15), (1,), (), (3, 4, 5), (0, 2), (300,), (2, 1100)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


def grad_of(param: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(param.dtype)


def mixed_params() -> list[nn.Parameter]:
    """Of every dtype, in no order; one is not contiguous."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES for dtype in DTYPES[: 1 + len(shape)]]
    return [*params, nn.Parameter(torch.randn(6, 5).t()), nn.Parameter(torch.randn(8, dtype=torch.complex64))]


def step(params, optimizers, number: int) -> None:
    for index, param in enumerate(params):  # every third one has no gradient in every second step
        param.grad = None if index % 3 == number % 2 == 0 else grad_of(param, 100 * number + index)
    for optimizer in optimizers:
        optimizer.step()


def same(ours, theirs) -> bool:
    return all(
        torch.equal(torch.view_as_real(a) if a.is_complex() else a, torch.view_as_real(b) if b.is_complex() else b)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("kind", [AdamW, SGD, AdamW8bit])
@pytest.mark.parametrize("alike", [False, True], ids=["mixed", "alike"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_of_all_is_a_step_of_each(kind, alike, threads, monkeypatch):
    """With step counts that differ, since some have no gradient now and then."""
    monkeypatch.setattr(kernel, "WORTH_THREADS", 1_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    options = {"momentum": 0.9} if kind is SGD else {}
    ours, theirs = mixed_params(), mixed_params()
    if alike:
        ours, theirs = ([param for param in side if param.dtype == torch.float32] for side in (ours, theirs))
    if kind is AdamW8bit:
        ours, theirs = ([param for param in side if not param.is_complex()] for side in (ours, theirs))
    together, each = kind(ours, lr=0.1, **options), [kind([param], lr=0.1, **options) for param in theirs]
    for number in range(4):
        step(ours, [together], number)
        step(theirs, each, number)
    assert same([p.detach() for p in ours], [p.detach() for p in theirs])
    for mine, own, one in zip(ours, theirs, each, strict=True):
        assert list(together.state[mine]) == list(one.state[own])
        assert same(together.state[mine].values(), one.state[own].values())


def replace_data(optimizer, param):
    param.data = param.data.clone()


def transpose(optimizer, param):
    param.data = param.data.t()
    param.grad = param.grad.t()


def widen(optimizer, param):
    param.data, param.grad = param.data.double(), None
    param.grad = torch.ones_like(param)
    state = optimizer.state[param]
    state.update({name: values.double() for name, values in state.items() if name != "step"})


def replace_grad(optimizer, param):
    param.grad = param.grad * 2


def replace_state(optimizer, param):
    optimizer.state[param]["exp_avg"] = torch.ones(param.shape)


def write_state(optimizer, param):
    optimizer.state[param]["exp_avg"].data = torch.ones(param.shape)


def forget(optimizer, param):
    optimizer.state.clear()


def count_anew(optimizer, param):
    optimizer.state[param]["step"] = torch.tensor(7.0)


def load(optimizer, param):
    state = optimizer.state_dict()
    for values in state["state"].values():
        values["exp_avg"] = values["exp_avg"] + 1
    optimizer.load_state_dict(state)


def change(optimizer, param):
    optimizer.param_groups[0]["lr"] = 0.5


def leave_out(optimizer, param):
    param.grad = None


def add_states(optimizer, param):
    """As after amsgrad was switched off: it is left alone."""
    optimizer.state[param]["max_exp_avg_sq"] = torch.zeros(param.shape)


CHANGES = [replace_data, transpose, widen, replace_grad, replace_state, write_state, forget, count_anew, load, change]


@pytest.mark.parametrize("changed", [*CHANGES, leave_out, add_states], ids=lambda changed: changed.__name__)
def test_whatever_was_replaced_is_noticed(changed):
    """A fresh optimizer, which can remember nothing, goes on from the same state."""
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(6, 5)) for _ in range(4)]
    optimizer = AdamW(params, lr=0.1)
    for number in range(2):
        for index, param in enumerate(params):
            param.grad = grad_of(param, 10 * number + index)
        optimizer.step()
    changed(optimizer, params[1])
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    fresh = AdamW(twins, **{name: optimizer.param_groups[0][name] for name in ("lr", "betas", "eps", "weight_decay")})
    for twin, param in zip(twins, params, strict=True):
        twin.grad = None if param.grad is None else param.grad.clone()
        if param in optimizer.state:
            fresh.state[twin] = {name: values.clone() for name, values in optimizer.state[param].items()}
    before = [param.detach().clone() for param in params]
    optimizer.step()
    fresh.step()
    assert same([p.detach() for p in params], [p.detach() for p in twins])
    assert [not torch.equal(a, b) for a, b in zip(before, params, strict=True)] == [p.grad is not None for p in params]
    for param, twin in zip(params, twins, strict=True):
        assert same(optimizer.state[param].values(), fresh.state[twin].values())


def test_a_gradient_that_is_negated_when_it_is_read():
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.tensor([1 + 2j]).conj().imag
    assert param.grad.is_neg()
    assert param.grad.is_contiguous()
    SGD([param], lr=1.0).step()
    assert param.item() == 2.0


def test_nothing_is_kept_alive():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = AdamW([param, nn.Parameter(torch.ones(2))])
    optimizer.step()
    gone = weakref.ref(param.grad), weakref.ref(optimizer.state[param]["exp_avg"])
    optimizer.zero_grad()
    optimizer.state.clear()
    assert [found() for found in gone] == [None, None]


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("exp_avg", torch.zeros(3), "expected contiguous arrays of 6 elements on cpu, got one of shape"),
        ("exp_avg", torch.zeros(3, 2).t(), "expected contiguous arrays"),
        ("exp_avg_sq", torch.zeros(6, device="meta"), "expected contiguous arrays of 6 elements on cpu"),
        ("exp_avg_sq", torch.zeros(6, dtype=torch.int32), "expected state 'exp_avg_sq' as torch.float32, bfloat16"),
    ],
)
def test_one_misfit_among_many_stops_the_step_before_anything_changes(name, wrong, said):
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    optimizer = AdamW(params)
    for param in params:
        param.grad = torch.ones(2, 3)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    optimizer.state[params[1]][name] = wrong
    with pytest.raises(ConfigError, match=said):
        optimizer.step()
    assert same([p.detach() for p in params], before)
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1, 1]


def test_a_stack_gives_back_its_segments():
    lows = [torch.zeros(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)]
    segments = [
        Segment(1, 4 + k, torch.ones(2 + k), torch.ones(2 + k), {"m": torch.ones(2 + k)}, lows[k], 0.5, 8 * k, seed=3)
        for k in range(2)
    ]
    arrays = [array for one in segments for array in (one.param, one.grad, one.state["m"], one.low)]
    stack = Stack(segments[0], ("param", "grad", "m"), 4, [4, 5], [0, 8], arrays)
    for got, want in zip(stack.segments(), segments, strict=True):
        for name in ("group", "step", "param", "grad", "low", "grad_scale", "offset", "seed"):
            assert getattr(got, name) is getattr(want, name) or getattr(got, name) == getattr(want, name)
        assert got.state["m"] is want.state["m"]
