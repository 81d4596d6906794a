"""Stochastic rounding of params without a master: by exact arithmetic, on every back end, however memory is cut."""

import math
import re
from dataclasses import replace
from fractions import Fraction
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pytest
import torch

from shardstep.errors import ConfigError, RuleError
from shardstep.optim.adam import adamw
from shardstep.rules import compiled, noise
from shardstep.rules.backends import llvm, reference, triton
from shardstep.rules.binding import Binding, check_dtypes
from shardstep.rules.compiled import CompiledRule, compile_rule
from shardstep.rules.ir import parse_text, to_text, verify
from shardstep.rules.language import rule
from shardstep.rules.lower import program_of
from shardstep.rules.passes import compile_truths, cut, stages
from shardstep.rules.passes.stochastic import round_stochastically
from shardstep.rules.scalars import compile_scalars
from shardstep.types import Batch, Segment, Update
from tests.rules.exact import FORMATS
from tests.rules.examples import adafactor, lamb
from tests.rules.programs import same_bits

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TURN = 2**32
DROPPED = {BF16: 16, F16: 13}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path_factory.getbasetemp() / "code"))


@rule
def become(param, grad):
    """The new param is the gradient."""
    return grad


def segment(param, grad, seed, step=1, offset=0, shape=None, **state):
    return Segment(0, step, param.clone(), grad.clone(), state, None, 1.0, offset, shape, seed)


def update(rule, *segments, **hypers):
    batch = Batch(list(segments), [Update(s.group, s.step, s.shape or ()) for s in segments], lambda sums, _: sums)
    compile_rule(rule).update(batch, [{**rule.hyperparameters, **hypers}])


def rounded(values, dtype, seed, step=1, offset=0):
    """``values`` as the params that a kernel makes of them."""
    made = segment(torch.zeros(len(values), dtype=dtype), values, seed, step, offset)
    update(become, made)
    return made.param


# What it means, in integers and fractions.


def key(seed, step, high):
    """Its two words."""
    digest = blake2b(f"{seed} {step} {high}".encode(), digest_size=8).digest()
    pieces = [int.from_bytes(digest[i : i + 2], "little") for i in (0, 2, 4, 6)]
    return [(upper << 16) ^ (0x4B00_0000 | lower) for upper, lower in (pieces[:2], pieces[2:])]


def noise_at(place, seed, step, bits):
    """An integer below 2 ** bits."""
    first, second = key(seed, step, place // TURN)
    word = place % TURN ^ first
    word = (word ^ word >> 16) * 0x7FEB352D % TURN ^ second
    return (word ^ word >> 15) * 0x846CA68B % TURN >> 32 - bits


def neighbour(value, dtype, noise, bits):
    """What a finite number becomes."""
    precision, least, largest = FORMATS[dtype]
    size = abs(Fraction(value))
    exponent = max(math.frexp(value)[1] - 1, least)
    unit = Fraction(2) ** (exponent - precision + 1)
    # Where float16 is denormal, the way from one number to the next has 2 ** bits places, and there are more.
    places = round(size / unit * 2**bits)
    moved = (places + noise) // 2**bits * unit
    return math.copysign(float(moved) if moved < Fraction(2) ** (largest + 1) else math.inf, value)


def awkward(dtype, n=600):
    """Numbers of every size, of both signs, and those around the ends of the format."""
    generator = np.random.default_rng(1)
    scale = 2.0 ** generator.integers(-150, 128, n) if dtype == BF16 else 2.0 ** generator.integers(-42, 17, n)
    info = torch.finfo(dtype)
    ends = [0.0, info.tiny, info.tiny * info.eps, info.max, info.max * (1 + info.eps / 8), 1.0, 2.0**-149]
    values = np.concatenate([generator.standard_normal(n) * scale, ends, -np.asarray(ends)]).astype(np.float32)
    return torch.from_numpy(values)


@pytest.mark.parametrize("dtype", DROPPED)
@pytest.mark.parametrize("offset", [0, 123_456_789, TURN - 300, 5 * TURN + 17])
def test_it_is_the_neighbour_that_the_noise_chooses(dtype, offset):
    values = awkward(dtype)
    got = rounded(values, dtype, seed=-7, step=3, offset=offset)
    want = [
        neighbour(value, dtype, noise_at(offset + k, -7, 3, DROPPED[dtype]), DROPPED[dtype])
        for k, value in enumerate(values.tolist())
    ]
    assert same_bits(got.float(), torch.tensor(want))


@pytest.mark.parametrize("dtype", DROPPED)
def test_what_fits_stays_and_signs_do_not_matter(dtype):
    fits = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, math.nan]).to(dtype)
    fits = torch.cat([fits, torch.arange(2**15 - 1, dtype=torch.int16).view(dtype)])
    assert same_bits(rounded(fits.float(), dtype, seed=1), fits)
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000], dtype=torch.int32).view(F32)
    assert rounded(nans, dtype, seed=1).isnan().all()
    values = awkward(dtype)
    assert same_bits(rounded(-values, dtype, seed=2), -rounded(values, dtype, seed=2))


def test_beyond_the_largest_number_it_is_infinite_as_often_as_it_lies_there():
    values = torch.full((4096,), 2.0**128 * (1 - 2.0**-10))  # three quarters of the way
    got = rounded(values, BF16, seed=0).float()
    assert set(got.tolist()) == {torch.finfo(BF16).max, math.inf}
    assert abs(got.isinf().float().mean() - 0.75) < 0.03


@pytest.mark.parametrize("dtype", DROPPED)
def test_its_expectation_is_the_value(dtype):
    """Over seeds, steps and places; to nearest, the mean error of these is −0.3 units."""
    n, keys = 2048, 100
    values = torch.full((n,), 1 + 0.3 * torch.finfo(dtype).eps)
    total = torch.zeros(n, dtype=F64)
    for number in range(keys):
        total += rounded(values, dtype, seed=number // 10, step=1 + number % 10).double() - values.double()
    errors = total / keys / torch.finfo(dtype).eps
    deviation = math.sqrt(0.3 * 0.7 / keys)
    assert abs(errors.mean()) < 4 * deviation / math.sqrt(n)
    assert errors.abs().max() < 5 * deviation
    assert 0.9 < errors.std() / deviation < 1.1


def test_noise_depends_on_seed_step_and_place():
    values = torch.full((4096,), 1 + 2.0**-8)
    first = rounded(values, BF16, seed=1)
    others = [
        rounded(values, BF16, seed=2),
        rounded(values, BF16, seed=1, step=2),
        rounded(values, BF16, seed=1, offset=4096),
        rounded(values, BF16, seed=1, offset=TURN),
    ]
    for other in others:
        assert 0.45 < (first != other).float().mean() < 0.55
    assert same_bits(rounded(values, BF16, seed=1), first)


# Wherever it runs, and however it is cut.


def inputs(n, dtype):
    generator = torch.Generator().manual_seed(4)
    param, grad, mean, square = torch.randn(4, n, generator=generator)
    grad[::97] = math.nan
    param[5::101] *= 1e-39
    return {"param": param.to(dtype), "grad": grad.to(BF16), "exp_avg": mean, "exp_avg_sq": square.square()}


def adamw_phase(dtype):
    """The phase, its binding, and its scalars."""
    hypers = {
        **adamw.hyperparameters,
        "step": 5,
        "grad_scale": 0.5,
        "rounding_key": noise.key_of(segment(torch.zeros(1), torch.zeros(1), 3, 5), 3),
    }
    program = program_of(adamw)
    phases = cut(stages(program, compile_truths(program)(hypers), F32, dtype)[-1][1])
    stored = tuple((name, array.dtype) for name, array in inputs(1, dtype).items())
    return phases.phases[0], Binding(F32, stored), compile_scalars(phases.program, phases.phases[0].scalars)(hypers, {})


def ran(kernel, arrays, scalars, offset):
    arrays = {name: array.clone() for name, array in arrays.items()}
    kernel(arrays, scalars, offset=offset)
    return arrays


@pytest.mark.parametrize("dtype", DROPPED)
@pytest.mark.parametrize("target", [None, "sse2", "avx2", "avx512"])
def test_llvm_gives_the_bits_of_the_reference(target, dtype):
    phase, binding, scalars = adamw_phase(dtype)
    try:
        kernel = llvm.compile_phase(phase, binding, target=target)
    except llvm.TargetUnsupported:
        pytest.skip(f"this machine cannot run {target}")
    arrays = inputs(3001, dtype)
    for offset in (0, 17, TURN - 2**14):
        want = ran(reference.compile_phase(phase, binding), arrays, scalars, offset)
        got = ran(kernel, arrays, scalars, offset)
        for name in arrays:
            assert same_bits(got[name], want[name])


@pytest.mark.parametrize("dtype", DROPPED)
def test_triton_gives_the_bits_of_the_reference(dtype):
    knobs = pytest.importorskip("triton").knobs
    phase, binding, scalars = adamw_phase(dtype)
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        kernel = triton.compile_phase(phase, binding)
    arrays = inputs(1039, dtype)
    with np.errstate(all="ignore"):
        got = ran(kernel, arrays, scalars, 77)
    want = ran(reference.compile_phase(phase, binding), arrays, scalars, 77)
    for name in arrays:
        assert same_bits(got[name], want[name])


def test_triton_compiles_it_without_inexact_instructions():
    pytest.importorskip("triton")
    phase, binding, _ = adamw_phase(BF16)
    text = triton.compile_text(phase, binding, 90)["ptx"]
    assert not re.findall(r"\.(?:ftz|approx|full|sat)\b|bf16", text)
    assert "ld.global.v4.b32" in text


def part(arrays, start, stop, offset):
    """Elements of the whole, which begins at ``offset``."""
    states = {name: arrays[name][start:stop].clone() for name in ("exp_avg", "exp_avg_sq")}
    return segment(arrays["param"][start:stop], arrays["grad"][start:stop], 9, 2, offset + start, **states)


@pytest.mark.parametrize("offset", [0, 1000, TURN - 1500, 3 * TURN - 2999])
@pytest.mark.parametrize("cuts", [[0, 1, 7, 1500, 1501, 2048, 3000], [0, 999, 3000], range(3001)])
def test_cuts_change_nothing_even_where_the_low_word_begins_anew(cuts, offset):
    arrays = inputs(3000, BF16)
    whole = part(arrays, 0, 3000, offset)
    parts = [part(arrays, start, stop, offset) for start, stop in pairwise(cuts)]
    update(adamw, whole)
    update(adamw, *parts)
    assert same_bits(torch.cat([made.param for made in parts]), whole.param)
    assert same_bits(torch.cat([made.state["exp_avg"] for made in parts]), whole.state["exp_avg"])


def test_without_llvm_the_bits_are_the_same(monkeypatch):
    arrays = inputs(3000, BF16)
    made = [part(arrays, 0, 3000, TURN - 77) for _ in range(2)]
    for one, back_end in zip(made, (llvm.compile_phase, reference.compile_phase), strict=True):
        monkeypatch.setattr(compiled, "back_end", lambda device, back_end=back_end: back_end)
        CompiledRule(adamw).update(Batch([one], [Update(0, 2, ())], lambda sums, _: sums), [adamw.hyperparameters])
    assert same_bits(made[0].param, made[1].param)


@pytest.mark.parametrize("offset", [0, TURN - 1024])
def test_sums_are_of_what_was_not_rounded_yet(offset):
    """LAMB: the same states as without a seed, and the neighbours of the same params."""
    arrays = inputs(3000, BF16)
    grad = torch.nan_to_num(arrays["grad"])
    made = []
    for seed, param in ((8, arrays["param"]), (None, arrays["param"]), (None, arrays["param"].float())):
        states = {name: torch.zeros(3000) for name in ("exp_avg", "exp_avg_sq")}
        made.append(segment(param, grad, seed, 1, offset, (3000,), **states))
        update(lamb, made[-1], lr=0.1)
    random, nearest, exact = made
    assert same_bits(random.state["exp_avg"], nearest.state["exp_avg"])
    assert same_bits(nearest.param, exact.param.to(BF16))
    assert same_bits(random.param, rounded(exact.param, BF16, 8, 1, offset))
    assert not random.param.equal(nearest.param)


def test_rules_in_several_phases_round_so_too():
    torch.manual_seed(0)
    param, grad = torch.randn(2, 40 * 30)
    made = []
    for dtype, seed in ((BF16, 6), (BF16, None), (F32, None)):
        one = segment(param.to(BF16).to(dtype), grad, seed, 2, 100, (40, 30))
        made.append(replace(one, tensor_state={"row": torch.zeros(40, 1), "column": torch.zeros(1, 30)}))
        update(adafactor, made[-1])
    random, nearest, exact = made
    assert same_bits(nearest.param, exact.param.to(BF16))
    assert same_bits(random.param, rounded(exact.param, BF16, 6, 2, 100))


# What it is not.


def test_without_a_seed_it_is_to_nearest_even():
    values = awkward(BF16)
    assert same_bits(rounded(values, BF16, seed=None), values.to(BF16))


def test_a_master_is_not_rounded():
    values = awkward(BF16)
    low = torch.zeros(len(values), dtype=BF16)
    made = replace(segment(torch.zeros_like(values), values, seed=1), low=low)
    update(become, made)
    assert same_bits(made.param, values)
    assert same_bits(low, values.to(BF16))


def test_a_copy_of_the_param_is_the_same():
    values = awkward(BF16)
    low = torch.zeros(len(values), dtype=BF16)
    made = replace(segment(torch.zeros(len(values), dtype=BF16), values, seed=1), low=low)
    update(become, made)
    assert same_bits(low, made.param)


def test_an_integer_param_is_refused():
    with pytest.raises(ConfigError, match=r"expected a floating-point param, got torch\.int32"):
        check_dtypes(segment(torch.zeros(1, dtype=torch.int32), torch.zeros(1), None))


def test_the_name_of_the_key_is_taken():
    with pytest.raises(RuleError, match="rounding_key"):

        @rule
        def own_key(param, grad, *, rounding_key=1.0):
            return param - rounding_key * grad


def test_the_pass_adds_a_key_and_leaves_other_stores_alone():
    before = parse_text(
        "rule r\nstate m element = 0.0\n%0 = load param : real element\n%1 = load grad : real element\n"
        "%2 = sub %0 %1 : real element\nstore param %2\nstore m %1\n"
    )
    after = verify(round_stochastically(before, BF16))
    text = to_text(after)
    assert "hyper rounding_key 4\n" in text
    assert text.endswith("store m %1\n")
    number = dict(after.stores)["param"]
    assert re.search(rf"%{number} = where %\d+ %2 %\d+ : real element", text)
    counts = {}
    for line in after.instructions:
        counts[line.operation] = counts.get(line.operation, 0) + 1
    assert (counts["word_mul"], counts["index"], counts["hyper"]) == (2, 1, 4)


def test_keys_are_the_same_on_every_machine_and_in_every_release():
    assert noise.key_of(segment(torch.zeros(1), torch.zeros(1), seed=0), 0) == PINNED
    assert all(2**23 <= piece < 2**23 + 2**16 for piece in PINNED)


PINNED = (8406825.0, 8400188.0, 8443532.0, 8440787.0)
