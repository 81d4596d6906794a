"""8-bit states: the map as published, the nearest value for every number, and the same bytes on every back end."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from shardstep.errors import ConfigError, RuleError
from shardstep.optim import AdamW8bit
from shardstep.rules import compiled, rule, state, zeros
from shardstep.rules.backends import llvm, reference, triton
from shardstep.rules.backends.dynamic8 import MAPS, decode, encode
from shardstep.rules.backends.llvm import kernel
from shardstep.rules.binding import Binding
from shardstep.rules.ir import Phase, parse_text
from shardstep.rules.lower import program_of
from shardstep.rules.passes import compile_phases, compile_truths
from shardstep.rules.scalars import compile_scalars
from shardstep.types import Batch, Segment, Update
from tests.rules.examples import lamb, rows_in_8_bits
from tests.rules.programs import same_bits
from tests.rules.test_llvm import TARGETS, machine_runs

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIGNED, UNSIGNED = torch.int8, torch.uint8
BOTH = pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path_factory.getbasetemp() / "code"))


# - the map


@BOTH
def test_the_values_are_256_in_ascending_order(dtype):
    table = MAPS[dtype].table
    assert table.shape == (256,)
    assert (np.diff(table) > 0).all()
    assert (0 in table, table[-1]) == (True, 1)


PUBLISHED = {
    SIGNED: {0: -0.99296875, 1: -0.97890625, 126: -5.5e-7, 127: 0, 128: 5.5e-7, 129: 3.25e-6, 130: 7.75e-6, 255: 1},
    UNSIGNED: {0: 0, 1: 3.25e-7, 2: 7.75e-7, 3: 2.125e-6, 6: 8.875e-6, 127: 0.103515625, 254: 0.996484375, 255: 1},
}  # fmt: skip
"""By place among the sorted: centres of the parts of [0.1, 1] times a power of ten."""


@BOTH
def test_the_values_are_the_published_ones(dtype):
    table = MAPS[dtype].table
    for place, value in PUBLISHED[dtype].items():
        assert table[place] == np.float32(value)
    made = [0.0, 1.0]
    for decade in range(7):  # as in create_dynamic_map of bitsandbytes, in float32
        parts = torch.linspace(0.1, 1, 2 ** (decade + (dtype == UNSIGNED)) + 1)
        centres = 10.0 ** (decade - 6) * (parts[:-1] + parts[1:]) / 2
        made += centres.tolist() + ((-centres).tolist() if dtype == SIGNED else [])
    assert np.abs(np.sort(np.array(made, np.float32)) - table).max() < 6e-8


def nearest(values: list[int], unit: int, x: float) -> int:
    """The place of the nearest of the exact values, of two the one nearer to zero: by trying all."""
    exact = int(Fraction(x) * unit)
    return min(range(256), key=lambda place: (abs(values[place] - exact), abs(values[place])))


@BOTH
def test_encoding_finds_the_nearest_of_all_values(dtype):
    first = -127 if dtype == SIGNED else 1
    values = [MAPS[dtype].value(number) for number in range(first, first + 256)]
    unit = math.lcm(*(value.denominator for value in values)) << 149  # in which all are whole
    halves = np.array([float((a + b) / 2) for a, b in pairwise(values)], np.float32)
    around = [halves, np.nextafter(halves, np.float32(2)), np.nextafter(halves, np.float32(-2)), MAPS[dtype].table]
    generator = np.random.default_rng(0)
    random = generator.normal(size=300) * 10.0 ** generator.integers(-9, 1, 300)
    numbers = np.concatenate([*around, np.clip(random, -1, 1), [-1, 1, -0.0, 1e-45]]).astype(np.float32)
    blocks = np.zeros((-(-len(numbers) // 255), 256), np.float32)
    blocks[:, 0] = 1  # so the scale is 1
    blocks[:, 1:] = np.resize(np.append(numbers, np.zeros(255, np.float32)), blocks[:, 1:].shape)
    codes, scale = encode(torch.from_numpy(blocks), dtype)
    assert (scale == 1).all()
    places = codes.numpy().astype(int) + (128 if dtype == SIGNED else 0)
    whole = [int(value * unit) for value in values]
    found = set(zip(blocks.ravel().tolist(), places.ravel().tolist(), strict=True))
    assert not [(x, place) for x, place in found if place != nearest(whole, unit, x)]


def test_an_element_loses_little():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for dtype, given in ((SIGNED, values), (UNSIGNED, values.square())):
        codes, scale = encode(given, dtype)
        assert codes.shape == (10_000,)
        assert scale.tolist() == [block.abs().max() for block in given.split(256)]
        error = (decode(codes, scale) - given).abs()
        step = np.diff(MAPS[dtype].table).max()
        assert (error <= 0.5001 * step * scale.repeat_interleave(256)[:10_000]).all()


@BOTH
def test_what_is_not_finite_takes_its_block_with_it_and_no_other(dtype):
    for bad in (math.inf, -math.inf, math.nan):
        values = torch.ones(600)
        values[300] = bad
        codes, scale = encode(values, dtype)
        assert scale.view(torch.int32).tolist() == [0x3F800000, 0x7FC00000, 0x3F800000]
        back = decode(codes, scale)
        assert (back[:256] == 1).all()
        assert back[256:512].isnan().all()
        assert (back[512:] == 1).all()


@BOTH
def test_zeros_denormals_and_float64(dtype):
    codes, scale = encode(torch.tensor([0.0, -0.0]), dtype)
    assert (decode(codes, scale).tolist(), scale.item()) == ([0.0, 0.0], 0.0)
    tiny = torch.tensor([2.0**-149, 2.0**-140])
    assert same_bits(decode(*encode(tiny, dtype)), torch.tensor([2.0**-149, 2.0**-140]))
    assert encode(torch.tensor([1 + 2.0**-30, 1e300], dtype=F64), dtype)[1].isnan().all()  # infinite in float32
    assert encode(torch.tensor([1 + 2.0**-30], dtype=F64), dtype)[1].item() == 1
    assert [part.shape for part in encode(torch.zeros(0, 3), dtype)] == [(0, 3), (0,)]


# - the same bytes on every back end


def phases_of(rule_, compute=F32):
    """With the hyper-parameters that make its scalars."""
    program = program_of(rule_)
    hypers = {**rule_.hyperparameters, "step": 3, "grad_scale": 0.3}
    return compile_phases(program, compile_truths(program)(hypers), compute), hypers


ADAMW8 = AdamW8bit.rule
BINDINGS = {"float32": (F32, F32, None), "float64": (F64, F64, None), "mixed": (F32, BF16, BF16)}
"""What is computed in, the gradient's dtype, and that of the low copy."""


def binding_of(dtypes):
    compute, grad, low = BINDINGS[dtypes]
    states = (("exp_avg", SIGNED), ("exp_avg_scale", F32), ("exp_avg_sq", UNSIGNED), ("exp_avg_sq_scale", F32))
    return Binding(compute, (("param", compute), ("grad", grad), *states), low)


def arrays_for(binding, numel):
    """All magnitudes, and blocks of zeros, of infinities and NaNs, and of denormals."""
    generator = torch.Generator().manual_seed(1)

    def numbers():
        made = torch.randn(numel, generator=generator, dtype=F64)
        made *= 10.0 ** torch.randint(-8, 1, (numel,), generator=generator)
        made[256:512] = 0
        made[700:701] = math.inf
        made[1100:1101] = math.nan
        made[1536:1792] *= 2.0**-130
        return made

    arrays = {"param": numbers().to(binding.compute), "grad": numbers().to(dict(binding.stored)["grad"])}
    for name, dtype in (("exp_avg", SIGNED), ("exp_avg_sq", UNSIGNED)):
        kept = numbers().to(F32)
        arrays[name], arrays[f"{name}_scale"] = encode(kept if dtype == SIGNED else kept.square(), dtype)
    return arrays


def run(make, dtypes, numel, cuts=(), skew=0):
    """One step in pieces, by a back end's ``compile_phase``; ``low`` begins ``skew`` elements into its memory."""
    phases, hypers = phases_of(ADAMW8, BINDINGS[dtypes][0])
    binding = binding_of(dtypes)
    arrays = arrays_for(binding, numel)
    low = torch.zeros(numel + skew, dtype=binding.low)[skew:] if binding.low else None
    (phase,) = phases.phases
    call = make(phase, binding)
    scalars = compile_scalars(phases.program, phase.scalars)(hypers, {})
    for start, stop in zip((0, *cuts), (*cuts, numel), strict=True):
        piece = {
            name: array[start // 256 : -(-stop // 256)] if name.endswith("scale") else array[start:stop]
            for name, array in arrays.items()
        }
        with np.errstate(all="ignore"):
            call(piece, scalars, offset=start, low=None if low is None else low[start:stop])
    return arrays if low is None else {**arrays, "low": low}


def assert_same(got, want):
    for name, values in want.items():
        assert same_bits(got[name], values), name
        if name.endswith("_scale"):
            assert torch.equal(got[name].view(torch.int32), values.view(torch.int32)), "one NaN only"


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtypes", BINDINGS)
def test_machine_code_gives_the_bytes_of_numpy(dtypes, target):
    if not machine_runs(target):
        pytest.skip(f"this machine cannot run {target}")

    def make(phase, binding):
        return llvm.compile_phase(phase, binding, target=target)

    for numel, skew in ((1, 0), (255, 3), (2500, 0), (5000, 5)):
        assert_same(run(make, dtypes, numel, skew=skew), run(reference.compile_phase, dtypes, numel, skew=skew))


@BOTH
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_machine_code_gives_each_byte_its_value_and_each_value_its_byte(dtype, target):
    """All bytes, and the floats around all halves: of the reference, which knows them by trying."""
    if not machine_runs(target):
        pytest.skip(f"this machine cannot run {target}")
    binding = Binding(F32, (("param", F32), ("grad", F32), ("m", dtype), ("m_scale", F32)))
    load = Phase(parse_text("rule r\nstate m element = 0.0\n%0 = load m : real element\nstore param %0\n"), ())
    store = Phase(parse_text("rule r\nstate m element = 0.0\n%0 = load grad : real element\nstore m %0\n"), ())
    codes = torch.arange(-128, 128).to(SIGNED).view(dtype)
    bounds = torch.from_numpy(MAPS[dtype].bounds.copy())
    bits = bounds.view(torch.int32)[:, None] + torch.arange(-2, 3, dtype=torch.int32)
    around = bits.view(-1).view(F32)
    numbers = torch.cat([torch.cat([torch.ones(1), part]) for part in torch.cat([around, -around]).split(255)])
    for scale in (1.0, 0.3, 2.0**-128, 3e38):
        given = {"param": torch.zeros(256), "grad": torch.zeros(256), "m": codes, "m_scale": torch.tensor([scale])}
        llvm.compile_phase(load, binding, target=target)(given, ())
        assert same_bits(given["param"], decode(codes, given["m_scale"]))
        grad = numbers * scale
        given = {"param": grad, "grad": grad, "m": torch.zeros(len(grad), dtype=dtype)}
        given["m_scale"] = torch.zeros(-(-len(grad) // 256))
        llvm.compile_phase(store, binding, target=target)(given, ())
        assert_same(given, dict(zip(("m", "m_scale"), encode(grad, dtype), strict=True)))


def interpreted(phase, binding):
    knobs = pytest.importorskip("triton").knobs
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        return triton.compile_phase(phase, binding)


@pytest.mark.parametrize(("dtypes", "numel"), [("float32", 2064), ("float64", 300), ("mixed", 1300)])
def test_the_triton_interpreter_gives_the_bytes_of_numpy(dtypes, numel):
    assert_same(run(interpreted, dtypes, numel), run(reference.compile_phase, dtypes, numel))


@pytest.mark.parametrize("make", [llvm.compile_phase, reference.compile_phase, interpreted])
def test_what_a_rule_makes_of_nothing_behind_the_end_enters_no_scale(make):
    text = "rule r\nstate m element = 0.0\n%0 = load grad : real element\n%1 = const 1.0 : real uniform\n"
    phase = Phase(parse_text(f"{text}%2 = add %0 %1 : real element\nstore m %2\n"), ())
    grad = torch.full((300,), -0.75)
    arrays = {"param": grad.clone(), "grad": grad, "m": torch.zeros(300, dtype=SIGNED), "m_scale": torch.zeros(2)}
    with np.errstate(all="ignore"):
        make(phase, Binding(F32, tuple((name, array.dtype) for name, array in arrays.items())))(arrays, ())
    assert arrays["m_scale"].tolist() == [0.25, 0.25]


def test_a_gpu_kernel_rounds_each_operation_once_and_loads_128_bits():
    pytest.importorskip("triton")
    phases, _ = phases_of(ADAMW8)
    text = triton.compile_text(phases.phases[0], binding_of("float32"), 90)["ptx"]
    for word in ("approx", ".ftz", "rcp.", "mad.rn"):
        assert word not in text
    assert text.count("fma.rn.f32") == 8 * (2 + 2 * 2)  # two of the rule; two of each encoding
    assert "ld.global.v4.b32" in text


@pytest.mark.parametrize("make", [llvm.compile_phase, reference.compile_phase], ids=["llvm", "reference"])
def test_cuts_at_blocks_and_threads_do_not_show(make, monkeypatch):
    numel = 70_000
    whole = run(make, "mixed", numel)
    generator = np.random.default_rng(0)
    monkeypatch.setattr(kernel, "WORTH_THREADS", 5_000)
    threads = torch.get_num_threads()
    for _ in range(3):
        cuts = tuple(1024 * np.sort(generator.choice(np.arange(1, 68), 5, replace=False)))
        assert_same(run(make, "mixed", numel, cuts), whole)
    try:
        torch.set_num_threads(2)
        assert_same(run(make, "mixed", numel), whole)
    finally:
        torch.set_num_threads(threads)


def test_sums_over_tensors_are_of_the_decoded_values(monkeypatch):
    """LAMB in 8 bits, from an offset that is no block's beginning, on both back ends."""
    lamb8 = lamb.stored(**dict(zip(lamb.states, ("dynamic8", "dynamic8_unsigned"), strict=True)))
    results = []
    for make in (llvm.compile_phase, reference.compile_phase):
        monkeypatch.setattr(compiled, "back_end", lambda device, make=make: make)
        arrays = arrays_for(binding_of("float32"), 5000)
        for name in ("param", "grad"):
            arrays[name] = torch.nan_to_num(arrays[name], 1.0, 1.0)
        states = {}
        for name, kept in zip(lamb.states, ("exp_avg", "exp_avg_sq"), strict=True):
            numbers = torch.nan_to_num(decode(arrays[kept], arrays[f"{kept}_scale"]))
            states[name], states[f"{name}_scale"] = encode(numbers, arrays[kept].dtype)
        segment = Segment(0, 2, arrays["param"], arrays["grad"], states, None, 1.0, offset=768, shape=(5000,))
        made = compiled.CompiledRule(lamb8)
        assert made.is_by_tensor_with([])
        made.update(Batch([segment], [Update(0, 2, ())], lambda sums, _: sums), [{**lamb8.hyperparameters, "lr": 0.1}])
        results.append({"param": segment.param, **states})
    assert_same(*results)
    assert results[0]["param"].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (37, 100), (3, 700), (300, 3), (4, 5, 60), (2, 3000)], ids=str)
def test_means_of_rows_and_columns_are_of_the_decoded_values(shape, dtype, monkeypatch):
    """Several steps, from places where only scales begin, on both back ends and by several threads."""
    monkeypatch.setattr(kernel, "WORTH_THREADS", 2_000)
    results = []
    for make, threads in ((reference, 1), (llvm, 1), (llvm, 3)):
        monkeypatch.setattr(compiled, "back_end", lambda device, make=make: make.compile_phase)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made, generator, numel = (
            compiled.CompiledRule(rows_in_8_bits),
            torch.Generator().manual_seed(3),
            math.prod(shape),
        )
        param = torch.randn(numel, generator=generator).to(F64 if dtype == F64 else F32)
        states = dict(zip(("exp_avg", "exp_avg_scale"), encode(torch.zeros(numel), SIGNED), strict=True))
        row = torch.zeros((*shape[:-1], 1), dtype=param.dtype)
        low = torch.zeros(numel, dtype=BF16) if dtype == BF16 else None
        for step in (1, 2, 3):
            grad = torch.randn(numel, generator=generator) * torch.logspace(-6, 2, numel)
            given = Segment(0, step, param, grad.to(dtype), states, low, 0.7, 768, shape, tensor_state={"row": row})
            batch = Batch([given], [Update(0, step, shape)], lambda sums, _: sums)
            made.update(batch, [rows_in_8_bits.hyperparameters])
        results.append({"param": param, "row": row, **states} | ({} if low is None else {"low": low}))
    assert results[0]["exp_avg"].any()
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


# - what is refused


@rule
def momentum(param, grad, buffer=state(0.5, dtype="dynamic8"), buffer_2=zeros, *, lr=0.1):
    buffer = buffer + grad
    return param - lr * buffer, buffer, buffer_2 + grad


def test_a_rule_says_what_its_states_are_stored_in():
    other = momentum.stored(buffer="bfloat16", buffer_2="dynamic8_unsigned")
    assert [declared.dtype for declared in momentum.declared] == ["dynamic8", None]
    assert [declared.dtype for declared in other.declared] == ["bfloat16", "dynamic8_unsigned"]
    assert [declared.start for declared in other.declared] == [0.5, 0.0]
    assert (other.name, other.function, type(other)) == (momentum.name, momentum.function, type(momentum))


def test_mistakes_with_dtypes_are_refused():
    with pytest.raises(RuleError, match=r"expected states of the rule 'momentum' \(buffer, buffer_2\), got grad; "):
        momentum.stored(grad="dynamic8")
    with pytest.raises(RuleError, match=r"E09.* expected the state 'buffer' stored as one of .*, got dtype='int8'"):
        momentum.stored(buffer="int8")

    with pytest.raises(RuleError, match=r"E20 .*'m', stored in 8 bits, to have a value for each element, got 'row'"):

        @rule
        def in_rows(param, grad, m=state(dtype="dynamic8", shape="row")):
            return param, m

    with pytest.raises(RuleError, match=r"E12 .*starts from -1\.0, which is zero in dynamic8_unsigned"):

        @rule
        def negative(param, grad, m=state(-1.0, dtype="dynamic8_unsigned")):
            return param, m

    with pytest.raises(RuleError, match=r"E11 .*starts from inf, which dynamic8 does not have"):

        @rule
        def infinite(param, grad, m=state(math.inf, dtype="dynamic8")):
            return param, m

    with pytest.raises(RuleError, match=r"E28 .*'m_scale' has the name of what belongs to 'm'"):

        @rule
        def named(param, grad, m=state(dtype="dynamic8"), m_scale=zeros):
            return param, m, m_scale


def segment_with(**changed):
    states = {"exp_avg": torch.zeros(300, dtype=SIGNED), "exp_avg_scale": torch.zeros(2)}
    states |= {"exp_avg_sq": torch.zeros(300, dtype=UNSIGNED), "exp_avg_sq_scale": torch.zeros(2)}
    states |= {name: value for name, value in changed.items() if name in states}
    states = {name: value for name, value in states.items() if value is not None}
    return Segment(0, 1, torch.ones(300), torch.ones(300), states, None, 1.0, offset=changed.get("offset", 0))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"offset": 128}, "begin at a multiple of 256 elements, got one at 128"),
        ({"exp_avg_scale": None}, r"scales for states in 8 bits, got none called \['exp_avg_scale'\]"),
        ({"exp_avg_scale": torch.zeros(1)}, r"scales 'exp_avg_scale' of shape \(2,\) on cpu, got shape \(1,\)"),
        ({"exp_avg_sq_scale": torch.zeros(2, dtype=F64)}, "scales 'exp_avg_sq_scale' as float32, got torch.float64"),
        ({"exp_avg": torch.zeros(299, dtype=SIGNED)}, "expected contiguous arrays of 300 elements"),
    ],
)
def test_segments_that_do_not_fit_are_refused(changed, said):
    segment = segment_with(**changed)
    made = compiled.compile_rule(ADAMW8)
    with pytest.raises(ConfigError, match=said):
        made.update(Batch([segment], [Update(0, 1, ())], lambda sums, _: sums), [{**ADAMW8.hyperparameters}])
