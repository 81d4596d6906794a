"""The bits of the LLVM back end: against the reference, on every target, and however the memory is cut."""

import ast
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from shardstep.errors import ConfigError, RuleError
from shardstep.rules.backends import reference
from shardstep.rules.backends.llvm import Row, TargetUnsupported, compile_phase, kernel, to_assembly, to_llvm
from shardstep.rules.backends.llvm.row import cuts
from shardstep.rules.binding import Binding
from shardstep.rules.ir import Builder, Hyper, Phase, Program, State, parse_text, verify

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
WORDS = {F32: torch.int32, F64: torch.int64, BF16: torch.int16, F16: torch.int16}

ADAMW = """rule adamw
state m element = 0.0
state v element = 0.0
hyper s0
hyper s1
hyper s2
hyper s3
hyper s4
%0 = load param : real element
%1 = load grad : real element
%2 = load m : real element
%3 = load v : real element
%4 = hyper s0 : real uniform
%5 = mul %1 %4 : real element
%6 = sub %5 %2 : real element
%7 = hyper s1 : real uniform
%8 = fma %7 %6 %2 : real element
%9 = const 0.001 : real uniform
%10 = mul %9 %5 : real element
%11 = const 0.999 : real uniform
%12 = mul %3 %11 : real element
%13 = fma %10 %5 %12 : real element
%14 = sqrt %13 : real element
%15 = hyper s2 : real uniform
%16 = div %14 %15 : real element
%17 = const 1e-08 : real uniform
%18 = add %16 %17 : real element
%19 = hyper s3 : real uniform
%20 = mul %8 %19 : real element
%21 = div %20 %18 : real element
%22 = hyper s4 : real uniform
%23 = mul %0 %22 : real element
%24 = sub %23 %21 : real element
store param %24
store m %8
store v %13
"""
SCALARS = (0.37, 0.1, 0.7, 1e-3, 0.99999)


def machine_runs(target):
    try:
        compile_phase(copying(), Binding(F32, (("param", F32), ("grad", F32))), target=target)
    except TargetUnsupported:
        return False
    return True


TARGETS = [None, "sse2", "avx2", "avx512"]


@pytest.fixture(autouse=True)
def own_cache_and_seed(tmp_path_factory, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path_factory.getbasetemp() / "code"))


@pytest.fixture(params=TARGETS, ids=str)
def target(request):
    if not machine_runs(request.param):
        pytest.skip(f"this machine cannot run {request.param}")
    return request.param


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(kernel, "WORTH_THREADS", 5_000)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def phase_of(build, stores, states=(), scalars=0, sums=()):
    hypers = tuple(Hyper(f"s{i}") for i in range(scalars))
    program = Program("test", tuple(states), hypers, tuple(build.instructions), tuple(stores))
    return Phase(verify(program), tuple(range(scalars)), tuple((number, number) for number in sums))


def copying():
    """The new param is the gradient."""
    build = Builder({"param": "element", "grad": "element"})
    return phase_of(build, [("param", build.load("grad"))])


def adamw():
    return Phase(verify(parse_text(ADAMW)), tuple(range(5)))


def adamw_binding(mixed=False, compute=F32):
    grad, low = (BF16, BF16) if mixed else (compute, None)
    return Binding(compute, (("param", compute), ("grad", grad), ("m", compute), ("v", compute)), low)


def adamw_arrays(numel, binding, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-30, 3, max(numel, 1), dtype=F64)[:numel]
    arrays = {
        name: (torch.randn(numel, generator=generator, dtype=F64) * scale).to(dtype) for name, dtype in binding.stored
    }
    arrays["v"].square_()
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 3e38])
    for array in arrays.values():
        places = torch.randint(0, max(numel, 1), (numel // 50,), generator=generator)
        array[places] = special[places % 7].to(array.dtype)
    return arrays


def same_bits(got, want):
    """Equal bit for bit, except that one NaN is as good as another."""
    equal = got.view(WORDS[got.dtype]) == want.view(WORDS[want.dtype])
    return got.dtype == want.dtype and bool((equal | (got.isnan() & want.isnan())).all())


def copies(arrays):
    return {name: array.clone() for name, array in arrays.items()}


def run_both(phase, binding, arrays, scalars=(), target=None, offset=0):
    """On the reference and here: (arrays, low, partials) of each."""
    results = []
    for made in (reference.compile_phase(phase, binding), compile_phase(phase, binding, target=target)):
        mine = copies(arrays)
        numel = next(iter(mine.values())).numel()
        low = None if binding.low is None else torch.zeros(numel, dtype=binding.low)
        partials = made(mine, scalars, offset=offset, low=low)
        results.append((mine, low, partials))
    return results


def assert_same(reference, ours):
    for name, array in reference[0].items():
        assert same_bits(ours[0][name], array), name
    assert ours[1] is reference[1] is None or same_bits(ours[1], reference[1])
    assert len(ours[2]) == len(reference[2])
    for got, want in zip(ours[2], reference[2], strict=True):
        assert got.shape == want.shape
        assert same_bits(got, want)


def special_values(dtype, count, seed=0):
    """Every pair of the values that go wrong, then random bits, some of them denormal."""
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    chosen = [0.0, 1.0, 1.5, 3.0, 1e-3, 1 / 3, tiny, tiny / 2, tiny / 1024, huge, huge / 2, float("inf"), float("nan")]
    values = torch.tensor([sign * value for value in chosen for sign in (1, -1)], dtype=dtype)
    pairs = torch.cartesian_prod(values, values)[torch.randperm(len(values) ** 2)]
    limit = torch.iinfo(WORDS[dtype])
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(limit.min, limit.max, (count, 2), generator=generator, dtype=WORDS[dtype])
    bits[::5] &= {F32: -0x7F800001, F64: -0x7FF0000000000001}[dtype]
    return torch.cat([pairs, bits.view(dtype)]).T.contiguous()


def every_operation():
    """A state for each operation's result; words go back and forth, truth becomes 1 or 0."""
    results = []
    names = [f"o{i}" for i in range(40)]
    build = Builder({"param": "element", "grad": "element", **dict.fromkeys(names, "element")})
    a, b = build.load("param"), build.load("grad")
    c = build.emit("mul", build.load("o0"), build.constant(0.3))
    one, zero = build.constant(1.0), build.constant(-0.0)
    results += [build.emit(o, a) for o in ("neg", "abs", "sign", "sqrt", "bfloat16")]
    results += [build.emit(o, a, b) for o in ("add", "sub", "mul", "div", "minimum", "maximum")]
    results += [build.emit("fma", a, b, c), build.emit("fma", a, c, build.constant(1e-3))]
    truths = [build.emit(o, a, b) for o in ("lt", "le", "gt", "ge", "eq", "ne")]
    truths += [build.emit("and", truths[0], truths[5]), build.emit("or", truths[2], truths[4])]
    truths += [build.emit("not", truths[1]), build.emit("and", truths[0], build.constant(True, "bool"))]
    results += [build.emit("where", truth, one, zero) for truth in truths]
    words = [build.emit("bits", a), build.emit("bits", b)]
    results += [
        build.emit("from_bits", build.emit(f"word_{o}", *words)) for o in ("add", "sub", "mul", "and", "or", "xor")
    ]
    shifts = [("word_shl", 5), ("word_shr", 7), ("word_shl", 0)]
    results += [build.emit("from_bits", build.emit(o, words[0], attributes=(n,))) for o, n in shifts]
    index = build.emit("word_xor", build.emit("index"), build.constant(0x9E3779B9, "word"))
    results.append(build.emit("from_bits", index))
    results.append(build.emit("add", build.hyper("s0"), a))
    stores = list(zip(names, results, strict=False))
    return phase_of(build, stores, [State(name) for name in names[: len(results)]], scalars=1)


@pytest.mark.parametrize("compute", [F32, F64], ids=str)
def test_every_operation_on_special_values(compute, target):
    phase = every_operation()
    a, b = special_values(compute, 2000)
    arrays = {"param": a, "grad": b, **{state.name: b.flip(0) for state in phase.body.states}}
    binding = Binding(compute, tuple((name, compute) for name in arrays))
    assert_same(*run_both(phase, binding, arrays, (1e-42,), target, offset=2**32 - 77))


@pytest.mark.parametrize("compute", [F32, F64], ids=str)
def test_fma_rounds_the_exact_sum_once(compute, target):
    build = Builder({"param": "element", "grad": "element", "m": "element"})
    result = build.emit("fma", build.load("param"), build.load("grad"), build.load("m"))
    phase = phase_of(build, [("param", result)], [State("m")])
    arrays = {name: torch.randn(200, dtype=compute) for name in ("param", "grad", "m")}
    arrays["m"] = -(arrays["param"] * arrays["grad"]) * (1 + torch.randint(0, 2, (200,)) * torch.finfo(compute).eps)
    numbers = zip(*(array.tolist() for array in arrays.values()), strict=True)
    exact = [Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in numbers]
    compile_phase(phase, Binding(compute, tuple((name, compute) for name in arrays)), target=target)(arrays, ())
    assert arrays["param"].tolist() == [nearest(e, compute) for e in exact]


def nearest(exact, dtype):
    """Of the floats near a fraction: float() rounds once to float64; for float32 look at the neighbours too."""
    guess = torch.tensor(float(exact), dtype=dtype)
    around = [guess, *(torch.nextafter(guess, torch.tensor(end, dtype=dtype)) for end in (-torch.inf, torch.inf))]
    return min((abs(Fraction(x.item()) - exact), x.view(WORDS[dtype]).item() & 1, x.item()) for x in around)[2]


@pytest.mark.parametrize("low", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("state", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("grad", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("compute", [F32, F64], ids=str)
def test_every_combination_of_dtypes(compute, grad, state, low):
    build = Builder({"param": "element", "grad": "element", "m": "element"})
    new_param = build.emit("add", build.load("grad"), build.constant(0.0))
    new_state = build.emit("mul", build.load("param"), build.load("m"))
    phase = phase_of(build, [("param", new_param), ("m", new_state)], [State("m")])
    binding = Binding(compute, (("param", compute), ("grad", grad), ("m", state or compute)), low)
    values = special_values(F64, 0) if F64 in (compute, grad) else special_values(F32, 0)
    arrays = {"param": values[0].to(compute), "grad": values[1].to(grad), "m": torch.full_like(values[0], 0.7)}
    arrays["m"] = arrays["m"].to(state or compute)
    assert_same(*run_both(phase, binding, arrays))


@pytest.mark.parametrize("stored", [BF16, F16], ids=str)
def test_16_bits_are_read_exactly_and_written_to_the_nearest_even(stored, target):
    """Against torch's own casts, for all 65,536 patterns and the values around and between them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(stored)
    made = compile_phase(copying(), Binding(F32, (("param", F32), ("grad", stored))), target=target)
    param = torch.zeros(2**16)
    made({"param": param, "grad": every}, ())
    assert same_bits(param, every.float())

    bits = every.float().view(torch.int32)
    around = torch.cat([(bits + step).view(F32) for step in (0, 1, -1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)])
    low, param = torch.zeros(len(around), dtype=stored), torch.zeros(len(around))
    made = compile_phase(copying(), Binding(F32, (("param", F32), ("grad", F32)), stored), target=target)
    made({"param": param, "grad": around}, (), low=low)
    assert same_bits(low, around.to(stored))


@pytest.mark.parametrize("stored", [BF16, F16], ids=str)
def test_float64_is_rounded_to_16_bits_once(stored):
    """Just above a tie of the 16 bits, but at the tie in float32: rounding twice would round down."""
    tie = {BF16: 1 + 2.0**-8, F16: 1 + 2.0**-11}[stored]
    above = {BF16: 1 + 2.0**-7, F16: 1 + 2.0**-10}[stored]
    grad, low = torch.tensor([tie, tie + 2.0**-40, -tie - 2.0**-40], dtype=F64), torch.zeros(3, dtype=stored)
    binding = Binding(F64, (("param", F64), ("grad", F64)), stored)
    compile_phase(copying(), binding)({"param": torch.zeros(3, dtype=F64), "grad": grad}, (), low=low)
    assert low.tolist() == [1.0, above, -above]


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
def test_no_bit_depends_on_2000_cuts(mixed, target):
    numel, chance = 1_000_003, random.Random(1)
    binding = adamw_binding(mixed)
    start = adamw_arrays(numel, binding)
    made = compile_phase(adamw(), binding, target=target)

    def run(places):
        arrays, low = copies(start), torch.zeros(numel, dtype=BF16) if mixed else None
        rows = [
            Row({k: a[i:j] for k, a in arrays.items()}, SCALARS, i, None if low is None else low[i:j])
            for i, j in itertools.pairwise([0, *places, numel])
        ]
        made.many(rows)
        return [*arrays.values(), low] if mixed else list(arrays.values())

    whole, pieces = run([]), run(sorted(chance.randrange(numel) for _ in range(2000)))
    assert all(same_bits(got, want) for got, want in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("compute", [F32, F64], ids=str)
def test_adamw_is_the_reference_s_and_every_target_s(compute, mixed, target):
    binding = adamw_binding(mixed, compute)
    assert_same(*run_both(adamw(), binding, adamw_arrays(10_007, binding), SCALARS, target))


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 31, 33, 64, 100])
@pytest.mark.parametrize("shift", [0, 1, 5, 31])
def test_heads_and_tails_touch_their_elements_only(numel, shift):
    """Wherever the low copy begins in its cache line."""
    binding = adamw_binding(mixed=True)
    made, meant = compile_phase(adamw(), binding), reference.compile_phase(adamw(), binding)
    results = []
    for one in (made, meant):
        whole = adamw_arrays(200, binding)
        low = torch.full((200,), 7.0, dtype=BF16)
        one({k: a[shift : shift + numel] for k, a in whole.items()}, SCALARS, low=low[shift : shift + numel])
        results.append([*whole.values(), low])
    assert all(same_bits(got, want) for got, want in zip(*results, strict=True))


def reductions(stores=True):
    """The sum of squares and the largest magnitude of the gradient, and the sum of the new param."""
    build = Builder({"param": "element", "grad": "element"})
    grad, param = build.load("grad"), build.load("param")
    new = build.emit("sub", param, build.emit("mul", grad, build.hyper("s0")))
    sums = [
        build.emit("sum", build.emit("mul", grad, grad)),
        build.emit("max", build.emit("abs", grad)),
        build.emit("sum", new),
        build.emit("max", build.emit("neg", grad)),
    ]
    return phase_of(build, [("param", new)] if stores else [], scalars=1, sums=sums)


@pytest.mark.parametrize("offset", [0, 1, 1000, 1024 * 77 + 16, 2**40 + 1023])
@pytest.mark.parametrize("numel", [0, 1, 23, 1024, 1025, 5000])
def test_partials_are_the_reference_s(numel, offset):
    for compute, grad, low in [(F32, BF16, BF16), (F64, F32, None)]:
        arrays = {"param": torch.randn(numel, dtype=compute), "grad": torch.randn(numel).to(grad)}
        binding = Binding(compute, (("param", compute), ("grad", grad)), low)
        assert_same(*run_both(reductions(), binding, arrays, (0.3,), offset=offset))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -0.0], ids=str)
def test_partials_of_odd_values(odd, target):
    arrays = {"param": torch.randn(3000), "grad": torch.full((3000,), -0.0)}
    arrays["grad"][1500] = odd
    binding = Binding(F32, (("param", F32), ("grad", F32)))
    assert_same(*run_both(reductions(), binding, arrays, (0.3,), target, offset=5))


def test_partials_do_not_depend_on_cuts_between_blocks(target):
    numel, offset, chance = 300_000, 12_345, random.Random(2)
    binding = Binding(F32, (("param", F32), ("grad", F32)))
    arrays = {"param": torch.randn(numel), "grad": torch.randn(numel)}
    made = compile_phase(reductions(stores=False), binding, target=target)
    whole = made(arrays, (0.3,), offset=offset)
    on_host = compile_phase(reductions(stores=False), binding)(arrays, (0.3,), offset=offset)
    assert all(same_bits(got, want) for got, want in zip(whole, on_host, strict=True))
    borders = range(-offset % 1024, numel, 1024)
    for count in (1, 3, 40):
        places = [0, *sorted(chance.sample(borders, count)), numel]
        rows = [Row({k: a[i:j] for k, a in arrays.items()}, (0.3,), offset + i) for i, j in itertools.pairwise(places)]
        joined = [torch.cat(parts) for parts in zip(*made.many(rows), strict=True)]
        assert all(same_bits(got, want) for got, want in zip(joined, whole, strict=True))


def test_the_thread_s_flushing_of_denormals_changes_nothing(target):
    """Neither of elements nor of constants, scalars and sums; and the thread keeps what it had set."""
    build = Builder({"param": "element", "grad": "element"})
    scaled = build.emit("mul", build.load("grad"), build.constant(0.5))
    new = build.emit("add", build.emit("add", scaled, build.hyper("s0")), build.constant(1.1e-39))
    phase = phase_of(build, [("param", new)], scalars=1, sums=[build.emit("sum", new)])
    binding = Binding(F32, (("param", F32), ("grad", F16)), BF16)
    bits = torch.arange(2048, dtype=torch.int16)

    def run(flush):
        with_flush = torch.set_flush_denormal(flush)
        try:
            text = to_llvm(phase, binding, target=target)
            param, low = torch.zeros(2048), torch.zeros(2048, dtype=BF16)
            made = compile_phase(phase, binding, target=target)
            (sums,) = made({"param": param, "grad": bits.view(F16)}, (3e-39,), low=low)
            flushed = (torch.tensor(1e-39) * 1).item() == 0
        finally:
            torch.set_flush_denormal(False)
        assert flushed == (flush and with_flush)
        return text, param, low, sums

    plain, flushing = run(False), run(True)
    assert plain[0] == flushing[0]
    assert all(same_bits(got, want) for got, want in zip(flushing[1:], plain[1:], strict=True))
    assert plain[1][0] != 0


@pytest.mark.parametrize("sums", [False, True], ids=["elements", "sums"])
def test_threads_do_not_change_bits(sums, two_threads, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK", 4_000)
    phase, scalars = (reductions(), (0.3,)) if sums else (adamw(), SCALARS)
    binding = Binding(F32, (("param", F32), ("grad", F32)), BF16) if sums else adamw_binding(mixed=True)
    arrays = {name: torch.randn(50_001).abs().to(dtype) for name, dtype in binding.stored}
    called, run_all = [], kernel.run_all
    monkeypatch.setattr(kernel, "run_all", lambda *a: called.append(len(a[1])) or run_all(*a))
    assert_same(*run_both(phase, binding, arrays, scalars, offset=777))
    assert 13 <= called[0] <= 17


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks beside threads, which is the point
def test_a_forked_child_has_threads_of_its_own(two_threads):
    binding = adamw_binding()
    made, arrays = compile_phase(adamw(), binding), adamw_arrays(10_000, binding)
    made(arrays, SCALARS)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the child if it waits for its parent's threads
        made(arrays, SCALARS)
        os._exit(not any(thread.name.startswith("shardstep") for thread in threading.enumerate()))
    assert os.waitpid(child, 0)[1] == 0


def test_many_tensors_of_one_call_have_their_own_scalars(two_threads):
    binding = adamw_binding(mixed=True)
    made = compile_phase(adamw(), binding)
    starts = [adamw_arrays(numel, binding, seed=numel) for numel in (3, 0, 20_000, 1024, 7, 999)]
    rows, alone = [], []
    for index, start in enumerate(starts):
        scalars = (1.0 + index, *SCALARS[1:])
        numel = start["param"].numel()
        rows.append(Row(copies(start), scalars, 5 * index, torch.zeros(numel, dtype=BF16)))
        alone.append(Row(copies(start), scalars, 5 * index, torch.zeros(numel, dtype=BF16)))
        made(alone[-1].arrays, scalars, offset=5 * index, low=alone[-1].low)
    assert made.many(rows) == [()] * len(rows)
    for got, want in zip(rows, alone, strict=True):
        assert all(same_bits(got.arrays[name], want.arrays[name]) for name in want.arrays)
        assert same_bits(got.low, want.low)
    assert made.many([]) == []


def test_what_is_the_same_for_all_elements_is_float64_until_it_meets_them():
    build = Builder({"param": "element", "grad": "element"})
    shared = build.emit("sub", build.emit("add", build.hyper("s0"), build.constant(1.0)), build.constant(1.0))
    chosen = build.emit("where", build.emit("lt", shared, build.constant(1e-9)), shared, build.constant(7.0))
    salt = build.emit("word_xor", build.emit("bits", shared), build.constant(2**32 - 2, "word"))
    mixed = build.emit("from_bits", build.emit("word_and", build.emit("bits", build.load("grad")), salt))
    stores = [("param", build.emit("add", build.emit("mul", build.load("param"), chosen), mixed))]
    phase = phase_of(build, stores, scalars=1)
    for compute in (F32, F64):
        binding = Binding(compute, (("param", compute), ("grad", compute)))
        arrays = {"param": torch.randn(50, dtype=compute), "grad": torch.randn(50, dtype=compute)}
        assert_same(*run_both(phase, binding, arrays, (1e-10,)))


def test_constants_are_rounded_once():
    ties = [1 + 2.0**-24, 1 + 3 * 2.0**-24, 2.0**-150, 3 * 2.0**-150, 3.4028235677973366e38]
    for value in (1e39, -1e39, 1e-46, -1e-46, 6e-46, 1.1e-39, -0.0, 0.1, float("-inf"), *ties):
        build = Builder({"param": "element", "grad": "element"})
        phase = phase_of(build, [("param", build.constant(value))])
        param = torch.zeros(40)
        compile_phase(phase, Binding(F32, (("param", F32), ("grad", F32))))({"param": param}, ())
        assert same_bits(param, torch.full((40,), value, dtype=F64).float())


def test_only_the_fmas_that_are_written():
    """And none of the instructions that round, flush or estimate in ways of their own."""
    if not machine_runs("avx512"):
        pytest.skip("this machine cannot run avx512")
    text = to_assembly(adamw(), adamw_binding(mixed=True), target="avx512")
    assert text.count("vfm") == 6  # two in the scalar body, two for each half of the vectors
    assert text.count("vmovnt") == 1
    assert "vfm" not in to_assembly(reductions(), Binding(F32, (("param", F32), ("grad", F32))), target="avx512")
    for instruction in ("vcvtneps2bf16", "rsqrt", "rcp", "vcvtps2ph"):
        assert instruction not in text
    assert not {"fast", "contract", "reassoc"} & set(to_llvm(adamw(), adamw_binding()).split())


def test_the_second_compilation_finds_the_code_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path))
    compile_phase(adamw(), adamw_binding())
    from shardstep.rules.backends.llvm import compiler

    monkeypatch.setattr(compiler, "object_code", lambda *_: pytest.fail("made again"))
    compile_phase(adamw(), adamw_binding())
    with pytest.raises(pytest.fail.Exception):
        compile_phase(adamw(), adamw_binding(mixed=True))


def test_names_may_have_any_letters():
    build = Builder({"param": "element", "grad": "element", "β": "element"})
    phase = phase_of(build, [("β", build.load("grad")), ("param", build.load("β"))], [State("β")])
    arrays = {"param": torch.zeros(20), "grad": torch.randn(20), "β": torch.randn(20)}
    assert_same(*run_both(phase, Binding(F32, tuple((name, F32) for name in arrays)), arrays))


@pytest.mark.parametrize("operation", ["exp", "rsqrt"])
def test_what_has_no_bits_of_its_own_is_refused(operation):
    build = Builder({"param": "element", "grad": "element"})
    phase = phase_of(build, [("param", build.emit(operation, build.load("grad")))])
    with pytest.raises(RuleError, match=f"got {operation} : real element"):
        compile_phase(phase, Binding(F32, (("param", F32), ("grad", F32))))


def test_rows_and_columns_are_refused():
    build = Builder({"param": "element", "grad": "element", "r": "row"})
    phase = phase_of(build, [("param", build.emit("mul", build.load("grad"), build.load("r")))], [State("r", "row")])
    with pytest.raises(RuleError, match="got load : real row"):
        compile_phase(phase, Binding(F32, (("param", F32), ("grad", F32), ("r", F32))))


def test_a_target_that_this_machine_does_not_have():
    with pytest.raises(TargetUnsupported, match="got 'sparc'"):
        compile_phase(copying(), Binding(F32, (("param", F32), ("grad", F32))), target="sparc")


def test_a_low_copy_goes_where_the_binding_says():
    arrays = {"param": torch.zeros(3), "grad": torch.ones(3)}
    stored = (("param", F32), ("grad", F32))
    with pytest.raises(ConfigError, match=r"expected a tensor for the torch.bfloat16 copy"):
        compile_phase(copying(), Binding(F32, stored, BF16))(arrays, ())
    with pytest.raises(ConfigError, match="expected no low copy"):
        compile_phase(copying(), Binding(F32, stored))(arrays, (), low=torch.zeros(3, dtype=BF16))


@pytest.mark.parametrize("offset", [0, 1, 1023, 5000])
def test_cuts_are_on_the_grid(offset):
    pieces = list(cuts(10_000, offset, 3000))
    assert [begin for begin, _ in pieces[1:]] == [end for _, end in pieces[:-1]]
    assert (pieces[0][0], pieces[-1][1]) == (0, 10_000)
    assert all((offset + end) % 1024 == 0 for _, end in pieces[:-1])
    assert max(end - begin for begin, end in pieces) <= 3000


def test_llvmlite_has_one_door_that_opens_late():
    package = Path(kernel.__file__).parents[3]
    users = [
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if any("llvmlite" in name for name in imported(file))
    ]
    assert users == ["rules/backends/llvm/compiler.py"]
    check = "import sys, shardstep.rules.backends.llvm; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=package.parent, timeout=60).returncode == 0


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
