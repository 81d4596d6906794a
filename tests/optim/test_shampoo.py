"""Shampoo: the paper's equations with a solver of eigenvalues, its inverse roots, arguments, state dicts and errors."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import shardstep as ss
from shardstep.errors import ConfigError
from shardstep.optim.shampoo import RIDGE, SCALES, inverse_fourth_root, shampoo
from shardstep.rules.compiled import compile_rule
from shardstep.rules.language import rule, state
from shardstep.rules.passes import compile_truths, stages
from shardstep.types import Batch, Segment, Update
from tests.optim import papers
from tests.rules.test_steps import arrays_of, reference_of, states_of

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 16), (16, 1), (1, 1)]
OPTIONS = {
    "plain": {},
    "all": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.2, "eps": 1e-2, "update_freq": 3},
    "later roots": {"update_freq": 4, "momentum": 0.5, "eps": 1.0},
}


def gradients(shape: tuple[int, ...], dtype: torch.dtype, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps + 1)]


def stepped(shape, options, dtype=torch.float32, steps=6):
    start, *grads = gradients(shape, dtype, steps)
    param = nn.Parameter(start.clone())
    optimizer = ss.optim.Shampoo([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.float64, 1e-6)], ids=["float32", "float64"])
def test_it_is_the_papers_within_the_roots_error(dtype, near, shape, options):
    param, optimizer = stepped(shape, options, dtype)
    start, *grads = (grad.double() for grad in gradients(shape, dtype, 6))
    wanted, state = start, {}
    for step, grad in enumerate(grads, 1):
        wanted = papers.shampoo(state, wanted, grad, step, **{"lr": 0.1, **options})
    assert torch.dist(param.double(), wanted) <= near * torch.dist(wanted, start)
    for name in ("left", "right"):
        torch.testing.assert_close(optimizer.state[param][name].double(), state[name], rtol=1e-5, atol=1e-5)
    assert ("momentum_buffer" in optimizer.state[param]) is ("momentum" in options)


def test_bfloat16_parameters_have_float32_states():
    param, optimizer = stepped((8, 6), {}, torch.bfloat16)
    found = {name: values.dtype for name, values in optimizer.state[param].items()}
    assert found == dict.fromkeys(("step", "left", "right", "left_root", "right_root"), torch.float32)


@rule
def root_alone(param, grad, root=state(shape="row_pair"), *, eps=1e-4):
    """The state becomes the inverse root of what the gradient is the half of."""
    return param - grad, inverse_fourth_root(grad @ grad.T, eps)


def updated(defined, arrays: dict[str, Tensor], hypers: dict, step: int = 1, grad_scale: float = 1.0) -> None:
    shape = tuple(arrays["param"].shape)
    state, squares = states_of(defined, arrays)
    segment = Segment(0, step, arrays["param"].view(-1), arrays["grad"].view(-1), state, None, grad_scale, 384, shape)
    segment.tensor_state = squares
    compile_rule(defined).update(Batch([segment], [Update(0, step, shape)], lambda sums, _: sums), [hypers])


def root_of(half: Tensor, eps: float) -> Tensor:
    half = half.contiguous()
    arrays = {"param": torch.zeros_like(half), "grad": half, "root": torch.zeros_like(half)}
    updated(root_alone, arrays, {"eps": eps})
    return arrays["root"]


@pytest.mark.parametrize("digits", [0, 2, 4, 6, 8])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 5e-4), (torch.float64, 1e-7)], ids=["float32", "float64"])
def test_the_root_for_all_condition_numbers(dtype, near, digits):
    n = 48
    vectors = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    values = torch.logspace(0, -digits, n, dtype=torch.float64)
    for size in (1e-12, 1.0, 1e12):
        half = (vectors * (size * values).sqrt()).to(dtype)
        total = half.double() @ half.double().T
        w, v = torch.linalg.eigh(total)
        wanted = (v * (w.clamp(min=0) + 1e-5 * total.norm()) ** -0.25) @ v.T
        found = root_of(half, 1e-30).double()
        assert torch.dist(found, wanted) <= near * wanted.norm(), size
        made, preconditioned = found @ half.double(), wanted @ half.double()
        assert torch.dist(made, preconditioned) <= 2e-4 * preconditioned.norm(), size


@pytest.mark.parametrize(
    "half", [torch.zeros(5, 5), torch.ones(5, 5), 1e-20 * torch.eye(5)], ids=["0", "rank 1", "tiny"]
)
def test_roots_of_what_is_hardly_a_matrix(half):
    total = half.double() @ half.double().T
    w, v = torch.linalg.eigh(total)
    ridge = max(1e-4, 1e-5 * total.norm().item())
    torch.testing.assert_close(root_of(half, 1e-4).double(), (v * (w + ridge) ** -0.25) @ v.T, rtol=1e-3, atol=1e-3)


@rule
def root_of_given(param, grad, root=state(shape="row_pair"), *, eps=1e-4):
    return param - grad, inverse_fourth_root(root, eps)


def test_what_rounding_has_made_slightly_indefinite_still_has_a_root():
    n = 16
    vectors = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    values = torch.logspace(0, -12, n, dtype=torch.float64)
    values[-2:] = -2e-6
    total = (vectors * values) @ vectors.T
    arrays = {"param": torch.zeros(n, n), "grad": torch.zeros(n, n), "root": total.float()}
    updated(root_of_given, arrays, {"eps": 1e-30})
    wanted = (vectors * (values + RIDGE * total.norm()) ** -0.25) @ vectors.T
    assert torch.dist(arrays["root"].double(), wanted) <= 2e-3 * wanted.norm()


def test_the_scales_bring_every_eigenvalue_home():
    values = np.logspace(np.log10(RIDGE / (1 + RIDGE)), 0, 100_001)
    for scale in SCALES:
        values = scale * values * (1.25 - scale * values / 4) ** 4
        assert 0 < values.min() <= values.max() <= 1 + 1e-12
    assert values.min() > 1 - 1e-7


def test_the_reference_back_end_agrees():
    """Products are float64 there, so not to the bit; all else of a step is."""
    arrays = arrays_of(shampoo, (9, 6), torch.float64)
    arrays |= {name: arrays[name] @ arrays[name].T for name in ("left", "right")}
    hypers = {**shampoo.hyperparameters, "momentum": 0.5}
    want = reference_of(shampoo, arrays, hypers, torch.float64)
    updated(shampoo, arrays, hypers, step=2, grad_scale=0.5)
    assert want.keys() == arrays.keys() - {"grad"}
    for name, expected in want.items():
        torch.testing.assert_close(arrays[name], expected, rtol=1e-9, atol=1e-9)


def test_between_roots_no_root_is_computed():
    program = compile_rule(shampoo).program
    lengths = []
    for step in (1, 2, 3, 4):
        hypers = {**shampoo.hyperparameters, "update_freq": 3, "step": step}
        kept = stages(program, compile_truths(program)(hypers), torch.float32)[-1][1]
        lengths.append(sum(line.operation == "matmul" for line in kept.instructions))
    assert lengths == [4 + 2 * 32, 4, 4, 4 + 2 * 32]


def test_a_gradient_of_zeros_changes_nothing_but_by_decay():
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = ss.optim.Shampoo([param], lr=0.5, weight_decay=0.5)
    param.grad = torch.zeros(4, 6)
    optimizer.step()
    assert torch.equal(param, torch.full((4, 6), 0.75))


def test_state_dicts_and_groups():
    first, optimizer = stepped((6, 4), {"update_freq": 4, "momentum": 0.5}, steps=3)
    second = nn.Parameter(first.detach().clone())
    other = ss.optim.Shampoo([{"params": [second], "update_freq": 4, "momentum": 0.5}], lr=0.7)
    other.load_state_dict(optimizer.state_dict())
    for one, param in ((optimizer, first), (other, second)):
        for value in (0.5, 0.25):
            param.grad = torch.linspace(-value, 1, 24).view(6, 4)
            one.step()
    assert torch.equal(first, second)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][0]["left"] = torch.zeros(4, 4)
    with pytest.raises(ConfigError, match=r"left of shape \(6, 6\) for parameter 0, got \(4, 4\)"):
        other.load_state_dict(wrong)
    assert torch.equal(other.state[second]["left"], optimizer.state[first]["left"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr ≥ 0"),
        ({"lr": float("nan")}, "lr ≥ 0"),
        ({"momentum": 1.0}, "0 ≤ momentum < 1"),
        ({"weight_decay": -0.1}, "weight_decay ≥ 0"),
        ({"eps": 0.0}, "0 < eps"),
        ({"update_freq": 0}, "whole update_freq ≥ 1"),
        ({"update_freq": 2.0}, r"update_freq ≥ 1 in parameter group 0, got 2\.0"),
        ({"update_freq": True}, "update_freq ≥ 1"),
    ],
    ids=str,
)
def test_values_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        ss.optim.Shampoo([nn.Parameter(torch.zeros(2, 2))], **options)


def test_what_is_no_matrix_is_refused():
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    with pytest.raises(
        ConfigError, match=r"two dimensions for Shampoo, got one of shape \(3,\) at position 1 of paramet"
    ):
        ss.optim.Shampoo([("matrix", matrix), ("vector", vector)])


def minimized(function, start, lr: float, steps: int, **options) -> tuple[float, float]:
    """The values at the start and at the end, of a parameter of one row; the rate falls to zero."""
    param = nn.Parameter(torch.tensor([start]))
    optimizer = ss.optim.Shampoo([param], lr=lr, **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    first = function(param[0]).item()
    for _ in range(steps):
        optimizer.zero_grad()
        function(param[0]).backward()
        optimizer.step()
        scheduler.step()
    return first, function(param[0]).item()


def quadratic(x: Tensor) -> Tensor:
    return (torch.tensor([1.0, 3.0, 10.0]) * (x - torch.tensor([1.0, -2.0, 0.5])).square()).sum() / 2


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]).square() + 100 * (x[1] - x[0].square()).square()


def test_it_finds_minima():
    first, last = minimized(quadratic, [3.0, 1.0, -2.0], 1.0, 200)
    assert last < 1e-3 * first
    first, last = minimized(rosenbrock, [-1.2, 1.0], 0.3, 600, update_freq=2, momentum=0.9)
    assert last < 0.06 * first


def test_it_learns_digits_with_adamw_for_the_rest():
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) is two] for two in (True, False))
    optimizer = ss.optim.Combined(
        ss.optim.Shampoo(matrices, lr=0.1, momentum=0.5, update_freq=5), ss.optim.AdamW(vectors, lr=0.01)
    )
    for _ in range(10):
        for batch in torch.arange(len(labels)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.9
