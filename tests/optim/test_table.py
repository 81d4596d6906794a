"""Every optimizer of the table: the same meaning as torch's or its paper's, the same signature and states, the same
bits on both back ends.
"""

import inspect
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

from shardstep.errors import ConfigError
from shardstep.rules import compiled
from shardstep.rules.backends import llvm, reference
from tests.optim.table import CASE_NAMES, CASES, ROWS, Row
from tests.rules.programs import same_bits

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = ((7, 15), (1,), (), (3, 4, 5), (0, 2))
STEPS = 25
SCHEDULE = 0.97


def start(dtype: torch.dtype, shapes: tuple = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes]


def grads(step: int, dtype: torch.dtype, shapes: tuple = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes]


def run(kind, hyper, dtype, rounded=None, steps=STEPS):
    """Steps with a falling rate: parameters and states. ``rounded``: what parameters are kept in between steps."""
    shapes = SHAPES[:-1] if kind is torch.optim.Adafactor else SHAPES  # it divides by the number of elements
    params = [nn.Parameter(values) for values in start(rounded or dtype, shapes)]
    if rounded is not None:
        params = [nn.Parameter(param.detach().to(dtype)) for param in params]
    optimizer = kind(params, **hyper)
    for step in range(steps):
        for param, grad in zip(params, grads(step, rounded or dtype, shapes), strict=True):
            param.grad = grad.to(dtype)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= SCHEDULE
        if rounded is not None:
            for param in params:
                param.data.copy_(param.detach().to(rounded))
    return [param.detach() for param in params], [optimizer.state[param] for param in params]


def by_paper(row: Row, hyper: dict, dtype=F64):
    """The same by the paper's equations, in float64."""
    states: list[dict] = [{} for _ in SHAPES]
    params, hyper = [p.double() for p in start(dtype)], dict(hyper)
    sign = -1.0 if hyper.pop("maximize", False) else 1.0
    for step in range(STEPS):
        for index, grad in enumerate(grads(step, dtype)):
            params[index] = row.paper(states[index], params[index], sign * grad.double(), step + 1, **hyper)
        hyper["lr"] *= SCHEDULE
    return params, states


def meant(row: Row, hyper: dict, dtype: torch.dtype):
    return by_paper(row, hyper, dtype) if row.torch is None else run(row.torch, {**hyper, "foreach": False}, dtype)


def ulps(ours: Tensor, theirs: Tensor) -> float:
    """Distance in units in the last place, of 0.5 for smaller values: sums of terms that large may cancel."""
    unit = torch.finfo(ours.dtype).eps * theirs.abs().clamp(min=0.5)
    return ((ours - theirs).abs() / unit).max().item() if ours.numel() else 0.0


@pytest.mark.parametrize(("row", "config"), CASES, ids=CASE_NAMES)
def test_float32_agrees_within_a_few_ulps(row, config):
    (ours, states), (theirs, expected) = (
        run(row.kind, row.configs[config], F32),
        meant(row, row.configs[config], F32),
    )
    for got, want in zip(ours, theirs, strict=False):
        assert ulps(got, want.to(F64)) <= 6
    for got, want in zip(states, expected, strict=False):
        for name in got.keys() & want.keys():
            assert ulps(got[name], torch.as_tensor(want[name], dtype=F64)) <= 12, name


@pytest.mark.parametrize(("row", "config"), CASES, ids=CASE_NAMES)
def test_float64_agrees_to_1e_12(row, config):
    tight = {"rtol": 1e-12, "atol": 1e-14} if not row.has_single_numbers else {"rtol": 1e-7, "atol": 1e-7}
    expected, want = meant(row, row.configs[config], F64)
    ours, states = run(row.kind, row.configs[config], F64)
    torch.testing.assert_close(ours[: len(expected)], expected, **tight)
    for got, meant_state in zip(states, want, strict=False):
        for name in (got.keys() & meant_state.keys()) - {"step"}:
            torch.testing.assert_close(got[name], torch.as_tensor(meant_state[name]), **tight, check_dtype=False)


@pytest.mark.parametrize(
    ("row", "config"),
    [c for c in CASES if c[0].torch],
    ids=[name for name, (row, _) in zip(CASE_NAMES, CASES, strict=True) if row.torch],
)
def test_bfloat16_is_torchs_float32_rounded_after_each_step(row, config):
    ours, _ = run(row.kind, row.configs[config], BF16)
    theirs, _ = run(row.torch, {**row.configs[config], "foreach": False}, F32, rounded=BF16)
    differ = sum((got != want.to(BF16)).sum().item() for got, want in zip(ours, theirs, strict=False))
    assert differ <= 2  # where float32's last bit decides


@pytest.mark.parametrize(("row", "config"), CASES, ids=CASE_NAMES)
def test_there_are_the_states_that_the_configuration_needs(row, config):
    _, states = run(row.kind, row.configs[config], F32, steps=1)
    _, expected = (
        by_paper(row, row.configs[config]) if row.torch is None else run(row.torch, row.configs[config], F32, steps=1)
    )
    wanted = {name for name, value in expected[0].items() if value is not None} - {"step"}
    own = set(states[0]) - {"step"}
    assert own == (wanted if row.torch else own & wanted)


@pytest.mark.parametrize("row", [row for row in ROWS if row.torch], ids=lambda row: row.name)
def test_the_signature_is_torchs(row):
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(kind).parameters.values()]
        for kind in (row.kind, row.torch)
    )
    assert ours == theirs
    defaults, wanted = (kind([nn.Parameter(torch.ones(1, 1))]).defaults for kind in (row.kind, row.torch))
    if row.name == "Muon":
        wanted["adjust_lr_fn"] = "original"  # what torch's None means
    assert defaults == wanted


def bits_of(make, kind, hyper, dtype, monkeypatch):
    monkeypatch.setattr(compiled, "_COMPILED", WeakKeyDictionary())
    monkeypatch.setattr(compiled, "back_end", lambda device: make)
    params, states = run(kind, hyper, dtype, steps=3)
    return params + [value for state in states for value in state.values()]


@pytest.mark.parametrize(("row", "config"), CASES, ids=CASE_NAMES)
def test_both_back_ends_give_the_same_bits(row, config, monkeypatch):
    for dtype in (F32, F64, BF16):
        got, want = (
            bits_of(make, row.kind, row.configs[config], dtype, monkeypatch)
            for make in (llvm.compile_phase, reference.compile_phase)
        )
        for compiled_, meant_ in zip(got, want, strict=True):
            assert same_bits(compiled_, meant_)


FUSED = {
    name: (row, config)
    for name, (row, config) in zip(CASE_NAMES, CASES, strict=True)
    if row.name in ("SGD", "Adam", "AdamW", "Adagrad") and config != "small betas"  # torch rounds 1 − β to float32
}


@pytest.mark.parametrize("name", FUSED)
def test_the_bits_are_those_of_torchs_fused_kernel(name):
    """All but the last three of an array: torch rounds otherwise in what is left over from its vectors."""
    row, config = FUSED[name]
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(1_000_003, generator=generator)
    params = [nn.Parameter(values.clone()) for _ in range(2)]
    optimizers = [row.kind(params[:1], **row.configs[config]), row.torch(params[1:], **row.configs[config], fused=True)]
    for _ in range(4):
        grad = torch.randn(values.shape, generator=generator)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad
            optimizer.step()
    ours, theirs = ({"param": p.detach(), **o.state[p]} for p, o in zip(params, optimizers, strict=True))
    for word in ours.keys() - {"step"}:
        assert torch.equal(ours[word][:-3], theirs[word][:-3]), word


@pytest.mark.parametrize(
    ("row", "hyper", "said"),
    [
        (row, {name: value}, f"{name} ≥ 0 in parameter group 0")
        for row in ROWS
        for name in ("lr", "eps", "weight_decay", "momentum", "lr_decay", "momentum_decay", "trust_coefficient")
        if isinstance(row.kind.rule.hyperparameters.get(name), float)
        for value in (-0.5, float("nan"))
    ]
    + [
        (row, {"betas": betas}, said)
        for row in ROWS
        if "betas" in row.kind.rule.hyperparameters and row.name != "Adan"
        for betas, said in (((1.0, 0.9), r"0 ≤ betas\[0\] < 1"), ((0.9, float("nan")), r"0 ≤ betas\[1\] < 1"))
    ],
    ids=lambda value: value.name if isinstance(value, Row) else "",
)
def test_ranges_are_checked(row, hyper, said):
    with pytest.raises(ConfigError, match=said):
        row.kind([nn.Parameter(torch.ones(1, 1))], **hyper)


@pytest.mark.parametrize(
    ("name", "hyper", "said"),
    [
        ("SGD", {"nesterov": True}, "momentum > 0 and dampening = 0 with nesterov"),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "got momentum=0.9 and dampening=0.1"),
        ("Adagrad", {"initial_accumulator_value": -1.0}, "initial_accumulator_value ≥ 0"),
        ("Adadelta", {"rho": 1.1}, "0 ≤ rho ≤ 1 in parameter group 0, got 1.1"),
        ("RMSprop", {"alpha": -0.1}, "alpha ≥ 0"),
        ("Rprop", {"etas": (1.0, 0.5)}, r"0 < etas\[0\] < 1 < etas\[1\]"),
        ("Rprop", {"step_sizes": 3.0}, "step_sizes to be two numbers"),
        ("Adan", {"betas": (0.9, 0.9)}, r"betas to be three numbers .* give \(beta1, beta2, beta3\)"),
        ("AdamWScheduleFree", {"betas": (0.0, 0.9)}, r"0 < betas\[0\]"),
        ("AdamWScheduleFree", {"warmup_steps": -1}, "warmup_steps ≥ 0"),
    ],
)
def test_other_ranges_are_checked(name, hyper, said):
    kind = next(row.kind for row in ROWS if row.name == name)
    with pytest.raises(ValueError, match=said):
        kind([nn.Parameter(torch.ones(1))], **hyper)
