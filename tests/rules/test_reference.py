"""The bits of the reference back end: against numpy one operation at a time, and against any way to cut."""

import random
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from shardstep.errors import ConfigError
from shardstep.optim.adamw import adamw
from shardstep.rules import rule, zeros
from shardstep.rules.backends import reference
from shardstep.rules.backends.reference import compile_program
from shardstep.rules.backends.slots import assign_slots
from shardstep.rules.host import evaluate
from shardstep.rules.link import link
from shardstep.rules.program import Constant, Instruction, Program, Uniform, Value

SCALARS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "step": 3}
NUMPY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "sign": lambda x: (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype),
    "minimum": lambda x, y: np.minimum(x, y) + x.dtype.type(0),
    "maximum": lambda x, y: np.maximum(x, y) + x.dtype.type(0),
}


def numpy_run(program, arrays, scalars):
    """The program in numpy, in whole arrays, one value after another."""
    dtype = arrays[0].dtype.type
    uniforms = [np.full(1, evaluate(u, scalars)).astype(dtype) for u in program.uniforms]
    values = [array.copy() for array in arrays]
    with np.errstate(all="ignore"):
        for line in program.instructions:
            operands = [uniforms[a.index] if isinstance(a, Uniform) else values[a.index] for a in line.arguments]
            values.append(NUMPY[line.operation](*operands))
    return [values[output] for output in program.outputs]


def same_bits(got, want):
    """Equal bit for bit, except that one NaN is as good as another."""
    bits = {4: np.uint32, 8: np.uint64}[got.dtype.itemsize]
    return got.dtype == want.dtype and bool(
        np.all((got.view(bits) == want.view(bits)) | (np.isnan(got) & np.isnan(want)))
    )


def arrays_of(numel, count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-20, 3, max(numel, 1), dtype=torch.float64)[:numel]
    return [(torch.randn(numel, generator=generator).double() * scale).to(dtype) for _ in range(count)]


def adamw_arrays(numel, seed=0, dtype=torch.float32):
    param, grad, first, second = arrays_of(numel, 4, seed, dtype)
    return param, grad, {"exp_avg": first, "exp_avg_sq": second.square()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [0, 1, 17, 65_536, 65_537, 200_003])
def test_adamw_is_each_operation_rounded_once(dtype, numel):
    param, grad, states = adamw_arrays(numel, dtype=dtype)
    program = link(adamw)._program
    want = numpy_run(program, [a.numpy() for a in (param, grad, *states.values())], SCALARS)
    kept = grad.clone()
    link(adamw)(param, grad, states, SCALARS, 1.0, None)
    for got, expected in zip((param, *states.values()), want, strict=True):
        assert same_bits(got.numpy(), expected)
    assert torch.equal(grad, kept)


def test_the_square_root_is_correctly_rounded():
    @rule
    def root(param, grad):
        return sqrt(grad)  # noqa: F821

    bits = torch.randint(0, 0x7F800000, (300_001,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    grad = bits.view(torch.float32)
    for target in ("cpu", "elsewhere"):
        kernel = compile_program(link(root)._program)
        kernel._steps["cpu"] = kernel._steps[target]
        param = torch.empty_like(grad)
        kernel(param, grad, {}, {}, 1.0, None)
        assert torch.equal(param, grad.double().sqrt().float())
    assert not torch.equal(torch.sqrt(grad), param), "torch.sqrt has become exact: the numpy route may go"


def cut_at(places, tensors):
    edges = [0, *sorted(places), tensors[0].numel()]
    for low, high in pairwise(edges):
        yield [tensor[low:high] for tensor in tensors]


@pytest.mark.parametrize("mode", ["plain", "bf16 grad and low, scaled", "float64"])
def test_no_bit_depends_on_where_the_arrays_are_cut(mode, monkeypatch):
    monkeypatch.setattr(reference, "CPU_TILE", 1000)  # so that tiles end inside the pieces too
    monkeypatch.setattr(reference, "_SCRATCH", reference._Scratch())
    dtype = torch.float64 if mode == "float64" else torch.float32
    numel, chance = 10_007, random.Random(5)
    low_mode = mode.startswith("bf16")
    scale = 0.37 if low_mode else 1.0
    param, grad, states = adamw_arrays(numel, dtype=dtype)
    if low_mode:
        grad = grad.bfloat16()
    low = torch.empty(numel, dtype=torch.bfloat16)
    start = [param, grad, *states.values(), low]

    def run(places):
        tensors = [t.clone() for t in start]
        for p, g, first, second, out in cut_at(places, tensors):
            pieces = {"exp_avg": first, "exp_avg_sq": second}
            link(adamw)(p, g, pieces, SCALARS, scale, out if low_mode else None)
        return tensors[:-1] + (tensors[-1:] if low_mode else [])

    whole = run([])
    for _ in range(200):
        places = [chance.randrange(numel + 1) for _ in range(chance.choice((1, 2, 7, 30)))]
        for got, want in zip(run(places), whole, strict=True):
            assert torch.equal(got, want), places


def test_zero_against_minus_zero_does_not_depend_on_the_position():
    @rule
    def extremes(param, grad, small=zeros, large=zeros):
        return param, minimum(param, grad), maximum(param, grad)  # noqa: F821

    for numel in range(1, 70):
        param, grad = torch.zeros(numel), torch.full((numel,), -0.0)
        states = {"small": torch.ones(numel), "large": torch.ones(numel)}
        link(extremes)(param, grad, states, {}, 1.0, None)
        assert not any(np.signbit(state.numpy()).any() for state in states.values())


def random_program(chance):
    states = chance.randrange(4)
    inputs = 2 + states
    uniforms = tuple(Constant(chance.uniform(-2, 2)) for _ in range(2))
    lines = []
    for index in range(chance.randrange(14)):
        operation = chance.choice(list(NUMPY))
        values = [Value(chance.randrange(inputs + index)) for _ in range(2)]
        if operation in ("neg", "sqrt", "abs", "sign"):
            values = values[:1]
        elif chance.random() < 0.3:
            values[chance.randrange(2)] = Uniform(chance.randrange(2))
        lines.append(Instruction(operation, tuple(values)))
    outputs = tuple(chance.randrange(inputs + len(lines)) for _ in range(1 + states))
    return Program("random", tuple(f"s{i}" for i in range(states)), uniforms, tuple(lines), outputs)


@pytest.mark.parametrize("seed", range(8))
def test_slots_never_lose_a_value(seed):
    chance = random.Random(seed)
    for _ in range(100):
        program = random_program(chance)
        arrays = [torch.randn(37) for _ in range(program.inputs)]
        want = numpy_run(program, [a.numpy() for a in arrays], {})
        states = dict(zip(program.states, arrays[2:], strict=True))
        compile_program(program)(arrays[0], arrays[1], states, {}, 1.0, None)
        for got, expected in zip((arrays[0], *arrays[2:]), want, strict=True):
            assert same_bits(got.numpy(), expected), str(program)


def test_adamw_needs_two_registers_and_no_copy():
    slots = assign_slots(link(adamw)._program)
    assert slots.registers == 2
    assert "copy" not in [line.operation for line in slots.operations]


def test_a_state_may_keep_the_gradient_and_arrays_may_swap():
    @rule
    def swap(param, grad, previous=zeros, other=zeros):
        return other, grad, param

    param, grad, previous, other = (torch.full((5,), float(i)) for i in range(4))
    link(swap)(param, grad, {"previous": previous, "other": other}, {}, 0.5, None)
    assert [t[0].item() for t in (param, grad, previous, other)] == [3.0, 1.0, 0.5, 0.0]


@rule
def take_grad(param, grad):
    return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_the_gradient_is_converted_then_scaled_and_left_alone(dtype, scale):
    grad = torch.randn(70_001).to(dtype)
    kept, param = grad.clone(), torch.empty(70_001)
    link(take_grad)(param, grad, {}, {}, scale, None)
    assert torch.equal(param, grad.float() * torch.tensor(scale))
    assert torch.equal(grad, kept)


def to_bfloat16(x):
    """Round to nearest even by integer arithmetic; None where the answer is some NaN."""
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded, np.isnan(x.numpy())


@pytest.mark.parametrize("numel", [*range(1, 36), 65_535, 65_537])
def test_low_is_rounded_to_nearest_even(numel):
    chance = np.random.default_rng(numel)
    bits = chance.integers(0, 2**32, numel, dtype=np.uint32)
    bits[::5] &= 0x807FFFFF  # denormals and zeros
    bits[1::5] = (bits[1::5] & 0xFFFF0000) | 0x8000  # ties
    bits[4::25] = chance.choice(np.array([0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7FC00001], np.uint32))
    grad = torch.from_numpy(bits.view(np.float32))
    want, nan = to_bfloat16(grad)
    param, low = torch.empty(numel), torch.empty(numel, dtype=torch.bfloat16)
    link(take_grad)(param, grad, {}, {}, 1.0, low)
    got = low.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(got[~nan], want[~nan])
    assert low.isnan().numpy()[nan].all()

    half = torch.empty(numel, dtype=torch.float16)
    link(take_grad)(param, grad, {}, {}, 1.0, half)
    with np.errstate(over="ignore"):
        assert np.array_equal(half.numpy(), grad.numpy().astype(np.float16), equal_nan=True)


def test_threads_do_not_share_scratch():
    starts = [adamw_arrays(90_001, seed) for seed in range(4)]
    wanted = []
    for param, grad, states in starts:
        copy = param.clone()
        link(adamw)(copy, grad, {k: v.clone() for k, v in states.items()}, SCALARS, 0.5, None)
        wanted.append(copy)
    threads = [
        threading.Thread(target=link(adamw), args=(param, grad, states, SCALARS, 0.5, None))
        for param, grad, states in starts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (param, _, _), want in zip(starts, wanted, strict=True):
        assert torch.equal(param, want)


def test_a_scalar_too_large_for_float32_is_infinite():
    @rule
    def large(param, grad, *, lr=1e300):
        return param + lr * grad

    param = torch.zeros(3)
    link(large)(param, torch.ones(3), {}, {"lr": 1e300}, 1.0, None)
    assert param.isinf().all()


def test_the_root_of_a_negative_number_is_a_quiet_nan():
    @rule
    def root(param, grad):
        return sqrt(grad)  # noqa: F821

    param = torch.zeros(3)
    link(root)(param, torch.tensor([-1.0, 4.0, float("nan")]), {}, {}, 1.0, None)
    assert param.isnan().tolist() == [True, False, True]


def test_a_rule_is_compiled_once():
    assert link(adamw) is link(adamw)


def test_arrays_that_would_give_wrong_numbers_are_refused():
    n = 8
    ok, state = torch.zeros(n), {"exp_avg": torch.zeros(n), "exp_avg_sq": torch.zeros(n)}
    cases = [
        ((ok.bfloat16(), ok, state, None), "float32 or float64 param"),
        ((ok, torch.zeros(n + 1), state, None), "grad to be contiguous of shape"),
        ((ok, torch.zeros(2 * n)[::2], state, None), "grad to be contiguous of shape"),
        ((ok, torch.zeros(n, device="meta"), state, None), "grad on cpu like param"),
        ((ok, torch.zeros(n, dtype=torch.int32), state, None), "grad as floating point"),
        (
            (ok, ok.clone(), {**state, "exp_avg": torch.zeros(n, dtype=torch.float64)}, None),
            "state 'exp_avg' as",
        ),
        ((ok, ok.clone(), {"exp_avg": state["exp_avg"]}, None), "expected the states"),
        ((ok.view(2, 4), ok, state, None), "param to be contiguous of shape"),
        ((ok, ok.clone(), state, torch.zeros(n, 1, dtype=torch.bfloat16)), "low to be contiguous"),
    ]
    for (param, grad, states, low), said in cases:
        with pytest.raises(ConfigError) as caught:
            link(adamw)(param, grad, states, SCALARS, 1.0, low)
        assert said in str(caught.value)
