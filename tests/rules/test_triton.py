"""The Triton back end without a GPU: its machine code for sm_80 and sm_90, and its bits in Triton's interpreter."""

import re
import sys
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from shardstep.errors import ConfigError, RuleError
from shardstep.rules import ir
from shardstep.rules.backends import reference
from shardstep.rules.backends.triton import compile_phase, compile_text, source
from shardstep.rules.binding import Binding
from tests.rules.phases import ADAMW, CASES, F32, F64, LION
from tests.rules.programs import same_bits

SCALARS = [0.1, 0.001, 0.999, 0.9486832980505138, 1e-8, 0.99999, 1.0]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-140), 2.0**-126, 3e38, -3e38, np.inf, -np.inf, np.nan, 1e-30]


# Running and comparing.


def numbers(n, dtype, seed, *, special, positive=False):
    """Values of every size, and ``special`` of them the ones where a rounding or a comparison may go wrong."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(n) * 10.0 ** generator.integers(-12, 4, n)
    values = np.where(generator.random(n) < special, generator.choice(SPECIAL, n), values)
    return torch.from_numpy(np.abs(values) if positive else values).to(dtype)


def make(case, binding, n):
    special = 0.0005 if case.sums else 0.2  # one NaN hides the order of all other summands of its block
    arrays = {
        name: numbers(n, dtype, seed, special=special, positive=name == "exp_avg_sq")
        for seed, (name, dtype) in enumerate(binding.stored)
    }
    return arrays, None if binding.low is None else torch.zeros(n, dtype=binding.low)


def check(kernel, case, binding, n, offset, device="cpu", skew=0):
    arrays, low = make(case, binding, n)
    scalars = SCALARS[: len(case.scalars)]
    after, low_after = {k: v.clone() for k, v in arrays.items()}, None if low is None else low.clone()
    partials = reference.compile_phase(case, binding)(after, scalars, offset=offset, low=low_after)
    # A view that begins ``skew`` elements into its memory is no longer aligned.
    run = {k: torch.cat([v[:skew], v]).to(device)[skew:] for k, v in arrays.items()}
    run_low = None if low is None else low.to(device)
    with np.errstate(all="ignore"):
        got = kernel(run, scalars, offset=offset, low=run_low)
    for name, want in after.items():
        assert same_bits(run[name].cpu(), want)
    if low is not None:
        assert same_bits(run_low.cpu(), low_after)
    assert len(got) == len(partials)
    for block, want in zip(got, partials, strict=True):
        assert same_bits(block.cpu(), want)


@cache
def interpreted(name):
    knobs = pytest.importorskip("triton").knobs
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        return compile_phase(*CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_interpreter_gives_the_bits_of_numpy(name):
    check(interpreted(name), *CASES[name], n=2 * 1024 + 320, offset=0)


RUNS = [(1, 0, 0), (7, 2**32 - 3, 0), (16, 2**33, 0), (1024, 1, 1), (1039, 77, 0), (1039, 77, 3)]


@pytest.mark.parametrize(("n", "offset", "skew"), RUNS)
@pytest.mark.parametrize("name", ["words", "adamw mixed"])
def test_any_length_at_any_position(name, n, offset, skew):
    check(interpreted(name), *CASES[name], n=n, offset=offset, skew=skew)


@pytest.mark.parametrize(("n", "offset"), [(1, 1023), (2, 1023), (5, 0), (1500, 1029), (1024, 2**33), (33 * 1024, 512)])
def test_partials_lie_on_the_global_grid(n, offset):
    check(interpreted("sums mixed"), *CASES["sums mixed"], n=n, offset=offset)


def test_partials_do_not_depend_on_cuts_between_blocks():
    kernel, (case, binding) = interpreted("sums"), CASES["sums"]
    arrays, _ = make(case, binding, 5000)
    cuts = [slice(0, 2048 - 100), slice(2048 - 100, 5000)]
    with np.errstate(all="ignore"):
        parts = [kernel({k: v[cut].clone() for k, v in arrays.items()}, [0.5], offset=100 + cut.start) for cut in cuts]
        whole = kernel(arrays, [0.5], offset=100)
    for number, block in enumerate(whole):
        assert same_bits(torch.cat([part[number] for part in parts]), block)


@pytest.mark.parametrize("name", ["adamw mixed", "adamw float16"])
def test_a_nan_stays_one_in_the_low_copy(name):
    """Rounding in integers would carry this one over into the sign."""
    case, binding = CASES[name]
    arrays, low = make(case, binding, 3)
    arrays["param"].view(torch.int32)[:] = torch.tensor([0x7FFFFFFF, -1, 0x7F800001])
    with np.errstate(all="ignore"):
        interpreted(name)(arrays, SCALARS, low=low)
    assert low.isnan().all()


def test_nothing_is_done_with_nothing():
    assert interpreted("adamw")({name: torch.empty(0) for name in ADAMW.body.shapes}, SCALARS) == ()
    empty = interpreted("sums")({"param": torch.empty(0), "grad": torch.empty(0)}, [1.0], offset=9)
    assert [part.shape for part in empty] == [(0,)] * 3


# The machine code.


@cache
def ptx(name, arch, aligned=True):
    pytest.importorskip("triton")
    return compile_text(*CASES[name], arch, aligned=aligned)["ptx"]


def mnemonics(text):
    """How often each instruction occurs, without the rest of its line."""
    return Counter(re.findall(r"^\s+(?:@!?%\w+ )?([a-z][a-z0-9_.:]+)\s", text, re.MULTILINE))


ON_DEVICES = pytest.mark.parametrize("arch", [80, 90])
FLAT = [name for name in CASES if not name.startswith("sums")]


@ON_DEVICES
@pytest.mark.parametrize("name", CASES)
def test_only_correctly_rounded_instructions(name, arch):
    text = ptx(name, arch)
    assert not re.findall(r"\.(?:ftz|approx|full|sat)\b|\b(?:rcp|rsqrt|ex2|lg2|tanh)\.|\bmad\.(?:rn|f)|bf16", text)
    counts = mnemonics(text)
    wanted = Counter(line.operation for line in CASES[name][0].body.instructions)
    elements = 4 if name.startswith("sums") else 8
    kind = "f64" if CASES[name][1].compute == F64 else "f32"
    for operation in ("fma", "div", "sqrt"):
        found = {key: count for key, count in counts.items() if key.startswith(f"{operation}.")}
        count = wanted[operation] * elements
        assert found == ({f"{operation}.rn.{kind}": count} if count else {})


@ON_DEVICES
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("adamw")])
def test_as_many_operations_as_the_program_has(name, arch):
    counts = mnemonics(ptx(name, arch))
    kind = "f64" if CASES[name][1].compute == F64 else "f32"
    assert [counts[f"{operation}.rn.{kind}"] // 8 for operation in ("mul", "add", "sub")] == [4, 1, 2]


@ON_DEVICES
@pytest.mark.parametrize("name", FLAT)
def test_flat_kernels_move_128_bits_at_a_time(name, arch):
    case, binding = CASES[name]
    counts = mnemonics(ptx(name, arch))
    sizes = {key: dtype.itemsize for key, dtype in binding.stored}
    used = {line.attributes[0] for line in case.body.instructions if line.operation == "load"}
    loads = sum(sizes[key] for key in used) // 2  # 8 elements in units of 16 bytes
    stores = (sum(sizes[key] for key, _ in case.body.stores) + (binding.low.itemsize if binding.low else 0)) // 2
    for direction, count in (("ld.global", loads), ("st.global", stores)):
        found = {key: number for key, number in counts.items() if key.startswith(direction)}
        assert set(found) <= {f"{direction}.v4.b32", f"{direction}.v2.b64"}
        assert sum(found.values()) == count


@ON_DEVICES
def test_a_kernel_with_sums_loads_128_bits_at_a_time(arch):
    counts = mnemonics(ptx("sums", arch))
    assert counts["ld.global.v4.b32"] == 2
    assert counts["st.global.v4.b32"] == 1
    assert {key for key in counts if key.startswith("ld.global")} == {"ld.global.v4.b32"}


@pytest.mark.parametrize("name", ["adamw mixed", "sums mixed"])
def test_where_nothing_is_aligned_each_element_is_loaded_alone(name):
    loads = {key for key in mnemonics(ptx(name, 90, False)) if key.startswith("ld.global")}
    assert loads == {"ld.global.b32", "ld.global.b16"}


# The text, and what is refused.


def test_the_text_has_one_instruction_a_line():
    lines = source(*CASES["adamw mixed"]).splitlines()
    assert "    v12 = tl.fma(v4, v11, v2)  # line 3" in lines
    assert "    v17 = tl.div_rn(v16, v7)" in lines
    assert "    v1 = from_bfloat16(tl.load(at_grad + i, mask=inside, other=0.0))" in lines
    assert sum(bool(re.match(r"    v\d+ = ", line)) for line in lines) == len(ADAMW.body.instructions)


@pytest.mark.parametrize("value", [1e39, -1e300, float("inf"), float("nan"), 1e-45, -0.0, 0.1])
def test_constants_are_rounded_once(value):
    build = ir.Builder({"param": "element"})
    stored = build.emit("add", build.emit("mul", build.load("param"), build.constant(0.0)), build.constant(value))
    case = ir.Phase(ir.Program("constant", (), (), tuple(build.instructions), (("param", stored),)), ())
    knobs = pytest.importorskip("triton").knobs
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        kernel = compile_phase(case, Binding(F32, (("param", F32),)))
    param = torch.full((3,), -1.0)  # times zero -0.0, which keeps the sign of the zero that is added
    kernel({"param": param}, [])
    assert same_bits(param, torch.full((3,), value, dtype=F64).to(F32))


@pytest.mark.parametrize("operation", ["exp", "rsqrt", "row_sum", "column_sum"])
def test_what_a_kernel_does_not_have_is_refused(operation):
    build = ir.Builder({"param": "element"})
    value = build.emit(operation, build.load("param"), place=ir.Place(7, 4))
    sums = ((value, value),) if operation.endswith("sum") else ()
    case = ir.Phase(ir.Program("odd", (), (), tuple(build.instructions), ()), (), sums)
    with pytest.raises(RuleError, match=operation):
        source(case, Binding(F32, (("param", F32),)))


def test_an_array_that_is_not_of_elements_is_refused():
    build = ir.Builder({"param": "element", "rows": "row"})
    value = build.emit("add", build.load("param"), build.load("rows"))
    body = ir.Program("odd", (ir.State("rows", "row"),), (), tuple(build.instructions), (("param", value),))
    with pytest.raises(RuleError, match="'rows' with one for each row"):
        source(ir.Phase(body, ()), Binding(F32, (("param", F32), ("rows", F32))))


def test_an_array_without_a_dtype_is_named():
    with pytest.raises(RuleError, match="a dtype for 'exp_avg'"):
        source(CASES["lion"][0], Binding(F32, (("param", F32), ("grad", F32))))


def test_without_triton_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="install triton"):
        compile_phase(*CASES["lion"])


def test_tensors_that_are_not_on_a_gpu_are_refused():
    pytest.importorskip("triton")
    with pytest.raises(ConfigError, match="on a CUDA device"):
        compile_phase(*CASES["lion"])({name: torch.ones(4) for name in LION.body.shapes}, [0.1, 0.2])


def test_a_missing_copy_is_named():
    with pytest.raises(ConfigError, match="tensor low"):
        interpreted("adamw mixed")({name: torch.ones(4) for name in ADAMW.body.shapes}, SCALARS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("n", "offset", "skew"), [(4096, 0, 0), (5000, 1029, 0), (5000, 2**33 + 16, 1)])
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_the_bits_of_numpy(name, n, offset, skew):
    check(compile_phase(*CASES[name]), *CASES[name], n=n, offset=offset, device="cuda", skew=skew)
