"""exp, log, tanh, rsqrt and pow: how near they are, their special values, and what the pass leaves alone."""

import math

import mpmath
import numpy as np
import pytest
import torch

from shardstep.rules import ir
from shardstep.rules.backends.reference import run_whole
from shardstep.rules.passes.elementary import ELEMENTARY, expand
from tests.rules.exact import same
from tests.rules.programs import same_bits

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
EXACT = {"exp": mpmath.exp, "log": mpmath.log, "tanh": mpmath.tanh, "rsqrt": lambda x: 1 / mpmath.sqrt(x)}
IN_FLOAT64 = {"exp": np.exp, "log": np.log, "tanh": np.tanh, "rsqrt": lambda x: 1 / np.sqrt(x)}
BOUND = {"exp": 0.81, "log": 0.85, "tanh": 1.8, "rsqrt": 1.5}
PARAM = ("param",)


def program_of(operation, *operands):
    """``operation`` of arrays and hyper-parameters, by name."""
    states = tuple(ir.State(name) for name in operands if name == "a")
    hypers = tuple(ir.Hyper(name) for name in operands if name not in ("a", "param", "grad"))
    program = ir.Program(operation, states, hypers, (), ())
    build = ir.Builder(program.shapes)
    numbers = [build.load(name) if name in program.shapes else build.hyper(name) for name in operands]
    result = build.emit(operation, *numbers)
    return ir.verify(program.with_instructions(build.instructions, [("param", result)]))


def run(operation, values, *, dtype, second=PARAM, **hypers):
    """Of an array alone; or of it (called a) and a hyper-parameter, in the order that ``second`` gives."""
    program = program_of(operation, *second)
    expanded = ir.verify(expand(program, dtype))
    assert not {line.operation for line in expanded.instructions if line.type.shape == "element"} & set(ELEMENTARY)
    array = torch.from_numpy(np.ascontiguousarray(values))
    arrays = {"param": array, "grad": array, **{state.name: array for state in program.states}}
    direct = run_whole(program, arrays, hypers, compute=dtype)["param"]
    assert same_bits(direct, run_whole(expanded, arrays, hypers, compute=dtype)["param"])
    return direct.numpy()


def sample(operation, dtype, numel, rng):
    """All exponents, the range in which something happens, and the neighbourhood of one."""
    real, bits = DTYPES[dtype], torch.iinfo(torch.int32 if dtype == torch.float32 else torch.int64).max
    anything = rng.integers(0, bits, numel, endpoint=True).astype(f"u{torch.finfo(dtype).bits // 8}").view(real)
    if operation in ("log", "rsqrt"):
        inside, near = rng.uniform(0.5, 2, numel), 1 + rng.standard_normal(numel) * 1e-3
        return np.concatenate([anything, inside.astype(real), near.astype(real)])
    ends = {torch.float32: (-104, 89), torch.float64: (-746, 710)}[dtype] if operation == "exp" else (-22, 22)
    inside, near = rng.uniform(*ends, numel), rng.uniform(-1.2, 1.2, numel)
    return np.concatenate([anything, -anything, inside.astype(real), near.astype(real)])


@pytest.mark.parametrize("operation", list(EXACT))
def test_float32_is_as_near_as_promised_at_all_exponents(operation):
    values = sample(operation, torch.float32, 400_000, np.random.default_rng(3))
    got = run(operation, values, dtype=torch.float32).astype(np.float64)
    with np.errstate(all="ignore"):
        want = IN_FLOAT64[operation](values.astype(np.float64))
        limit = 2.0**128 * (1 - 2.0**-25)  # from here on the nearest float32 is infinite
        ulp = np.ldexp(1.0, np.maximum(np.frexp(want)[1] - 24, -149))
        error = np.where(np.abs(want) < limit, np.abs(got - want) / ulp, np.where(got == want, 0, 9))
        error = np.where((want >= limit) & np.isinf(got) | (np.isnan(want) & np.isnan(got)), 0, error)
    worst = int(np.argmax(error))
    assert error[worst] <= BOUND[operation], f"{operation}({values[worst]!r}) = {got[worst]!r}"


@pytest.mark.parametrize("operation", list(EXACT))
def test_float64_is_as_near_as_promised(operation):
    values = sample(operation, torch.float64, 700, np.random.default_rng(4))
    values = values[np.isfinite(values)]
    got = run(operation, values, dtype=torch.float64)
    with mpmath.workprec(140):
        for value, result in zip(values.tolist(), got.tolist(), strict=True):
            want = EXACT[operation](mpmath.mpf(value))
            if abs(want) >= mpmath.mpf(2) ** 1024:
                assert result == math.copysign(math.inf, float(mpmath.sign(want)))
                continue
            ulp = mpmath.mpf(2) ** max(mpmath.frexp(want)[1] - 53, -1074)
            assert abs(mpmath.mpf(result) - want) <= BOUND[operation] * ulp, f"{operation}({value!r}) = {result!r}"


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("operation", "value", "want"),
    [
        ("exp", 0.0, 1.0),
        ("exp", -0.0, 1.0),
        ("exp", math.inf, math.inf),
        ("exp", -math.inf, 0.0),
        ("exp", 1e30, math.inf),
        ("exp", -1e30, 0.0),
        ("exp", math.nan, math.nan),
        ("log", 0.0, -math.inf),
        ("log", -0.0, -math.inf),
        ("log", 1.0, 0.0),
        ("log", -1.0, math.nan),
        ("log", -math.inf, math.nan),
        ("log", math.inf, math.inf),
        ("log", math.nan, math.nan),
        ("tanh", 0.0, 0.0),
        ("tanh", -0.0, -0.0),
        ("tanh", math.inf, 1.0),
        ("tanh", -math.inf, -1.0),
        ("tanh", 30.0, 1.0),
        ("tanh", 1e-40, 1e-40),
        ("tanh", math.nan, math.nan),
        ("rsqrt", 4.0, 0.5),
        ("rsqrt", 0.0, math.inf),
        ("rsqrt", -1.0, math.nan),
        ("rsqrt", math.inf, 0.0),
        ("rsqrt", math.nan, math.nan),
    ],
)
def test_special_values(operation, value, want, dtype):
    real = DTYPES[dtype]
    got = run(operation, np.array([value], real), dtype=dtype)
    assert same(float(got[0]), float(real(want)))


def power_by_ieee(base, exponent, info):
    try:
        result = math.pow(base, exponent)
    except OverflowError:
        result = math.copysign(math.inf, base if exponent % 2 == 1 else 1.0)
    except ValueError:  # Python raises for a zero as for a negative base
        result = math.nan if base else math.copysign(math.inf, base if exponent % 2 == 1 else 1.0)
    if abs(result) > info.max:
        return math.copysign(math.inf, result)
    return math.copysign(0.0, result) if abs(result) < info.tiny * info.eps else result


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("exponent", [0.0, -0.0, 1.0, -1.0, 2.0, 3.0, -3.0, 0.5, -0.8, 2.5, 1000.0, 1001.0, -1001.0])
def test_a_power_has_the_special_values_of_ieee(exponent, dtype):
    values = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 7.0, -1e-30, math.inf, -math.inf, math.nan]
    values = np.array(values, DTYPES[dtype])
    got = run("pow", values, dtype=dtype, second=("a", "e"), e=exponent)
    for value, result in zip(values.tolist(), got.tolist(), strict=True):
        want = power_by_ieee(value, float(DTYPES[dtype](exponent)), torch.finfo(dtype))
        if want == 0 or not math.isfinite(want):
            assert same(result, want), (value, exponent)
        else:
            assert result == pytest.approx(want, rel=1500 * torch.finfo(dtype).eps), (value, exponent)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("exponent", [0.1, -0.8, 1.7, 5.0, -12.3])
def test_a_power_is_as_near_as_promised(exponent, dtype):
    rng = np.random.default_rng(5)
    values = (2.0 ** rng.uniform(-6, 6, 700)).astype(DTYPES[dtype])
    got = run("pow", values, dtype=dtype, second=("a", "e"), e=exponent)
    exponent, digits = float(DTYPES[dtype](exponent)), 24 if dtype == torch.float32 else 53
    with mpmath.workprec(140):
        for value, result in zip(values.tolist(), got.tolist(), strict=True):
            want = mpmath.mpf(value) ** exponent
            ulp = mpmath.mpf(2) ** (mpmath.frexp(want)[1] - digits)
            bound = 2 * abs(exponent * math.log(value)) + 1.6
            assert abs(mpmath.mpf(result) - want) <= bound * ulp, value


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("base", [2.0, 0.3, 1.0, 0.0, -2.0])
def test_a_power_with_an_element_as_exponent(base, dtype):
    values = np.array([0.0, 1.0, -1.0, 0.5, 3.0, -7.5, 1000.0], DTYPES[dtype])
    got = run("pow", values, dtype=dtype, second=("c", "a"), c=base)
    want = [power_by_ieee(base, value, torch.finfo(dtype)) for value in values.tolist()]
    assert got.tolist() == pytest.approx(want, rel=1500 * torch.finfo(dtype).eps, nan_ok=True)


def test_uniform_and_tensor_values_stay_as_they_are():
    text = """rule r
hyper lr
%0 = load grad : real element
%1 = hyper lr : real uniform
%2 = exp %1 : real uniform
%3 = sum %0 : real tensor
%4 = pow %3 %2 : real tensor
%5 = mul %0 %4 : real element
store param %5
"""
    program = ir.verify(ir.parse_text(text))
    assert expand(program, torch.float32) == program


def test_the_instructions_keep_their_place_and_are_those_of_the_dtype():
    program = program_of("exp", "grad")
    lines = list(program.instructions)
    lines[-1] = ir.Instruction("exp", (), (0,), lines[-1].type, ir.Place(7, 3))
    expanded = expand(program.with_instructions(lines, program.stores), torch.float32)
    assert {line.place for line in expanded.instructions[1:]} == {ir.Place(7, 3)}
    shifts = {line.attributes for line in expanded.instructions if line.operation == "word_shl"}
    assert shifts == {(23,)}


def test_rows_are_expanded_too():
    text = """rule r
%0 = load grad : real element
%1 = row_sum %0 : real row
%2 = exp %1 : real row
%3 = mul %0 %2 : real element
store param %3
"""
    program = ir.verify(ir.parse_text(text))
    expanded = ir.verify(expand(program, torch.float64))
    assert all(line.operation != "exp" for line in expanded.instructions)
    grad = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    got = run_whole(expanded, {"param": grad, "grad": grad}, {}, compute=torch.float64)["param"]
    assert torch.allclose(got, grad * math.e)
