"""Rules with rows and columns, in phases: the bits of the whole evaluation, for every cut, on every back end."""

import math
import os
import random
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch

from shardstep.errors import RuleError
from shardstep.rules import ir
from shardstep.rules.backends import llvm, reference
from shardstep.rules.backends.reference import run_whole
from shardstep.rules.backends.triton import compile_phase as compile_triton
from shardstep.rules.passes import compile_truths, stages
from shardstep.rules.passes.gradient import scale_gradient
from shardstep.rules.passes.pipeline import cut
from shardstep.rules.view import state_shape
from tests.rules.parts import run_in_parts
from tests.rules.programs import SCALARS, random_array, random_program, same_bits

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
HYPERS = {**dict(zip(SCALARS, (0.9, -1e-3, 2.5), strict=True)), "grad_scale": 0.7}
SHAPES = [(), (5,), (1500,), (6, 9), (3, 700), (700, 3), (40, 64), (4, 5, 6), (3, 2, 3, 3), (2, 37, 41), (0, 4), (4, 0)]
BACK_ENDS = {"reference": reference.compile_phase, "llvm": llvm.compile_phase}


def arrays_for(program, shape, compute, seed):
    """Of awkward numbers, but for half of the seeds: NaN spreads over rows and columns quickly."""
    found = {}
    for index, (name, of) in enumerate(program.shapes.items()):
        own = state_shape(of, shape)
        values = random_array(math.prod(own), compute, 10 * seed + index).view(own)
        if seed % 4:
            values = torch.where(values.abs() < 1e5, values, 1.0)
        found[name] = values.to(BF16) if name == "grad" and seed % 3 == 0 else values
    return found


def phases_of(program, hypers, compute):
    truths = compile_truths(program)(hypers)
    return cut(stages(program, truths, compute)[-1][1])


@pytest.mark.parametrize("name", BACK_ENDS)
@pytest.mark.parametrize("seed", range(60))
def test_random_programs_give_the_bits_of_the_whole_evaluation(seed, name):
    random_case(seed, BACK_ENDS[name])


def random_case(seed, make):
    rng = random.Random(seed)
    compute = rng.choice((F32, F32, F64))
    program = random_program(rng, length=14, elementary=True, hosted=seed % 2 == 0, lines=True)
    shape = rng.choice(SHAPES)
    arrays, offset = arrays_for(program, shape, compute, seed), 128 * rng.randrange(20)
    try:
        want = run_whole(scale_gradient(program), arrays, HYPERS, compute=compute, offset=offset)
    except RuleError:  # a scalar has no value
        return
    got = {key: array.clone() for key, array in arrays.items()}
    numel = math.prod(shape)
    blocks = list(range(1024 - offset % 1024, numel, 1024))
    places = rng.sample(blocks, min(len(blocks), rng.randrange(3)))
    phases = phases_of(program, HYPERS, compute)
    run_in_parts(phases, got, HYPERS, make, places, compute=compute, offset=offset)
    for key in arrays:
        assert same_bits(got[key], want.get(key, arrays[key])), key


def sums_of_lines(compute):
    """The largest and the sum of each row and column, and a param made of them."""
    states = [ir.State("row", "row"), ir.State("column", "column"), ir.State("top", "row"), ir.State("left", "column")]
    build = ir.Builder({"param": "element", "grad": "element", **{state.name: state.shape for state in states}})
    grad = build.load("grad")
    row, column = build.emit("row_sum", grad), build.emit("column_sum", grad)
    values = [row, column, build.emit("row_max", grad), build.emit("column_max", grad)]
    stores = [(state.name, value) for state, value in zip(states, values, strict=True)]
    stores.append(("param", build.emit("mul", row, column)))
    program = ir.verify(ir.Program("lines", tuple(states), (), tuple(build.instructions), tuple(stores)))
    return program, phases_of(program, HYPERS, compute)


SUMMED = [(5,), (37, 150), (4, 3, 3)]


def triton_cases():
    """For a process in which Triton interprets its kernels in numpy."""
    for seed in range(8):
        random_case(seed, compile_triton)
    for compute, shape in product((F32, F64), SUMMED):
        program, phases = sums_of_lines(compute)
        arrays = arrays_for(program, shape, compute, seed=1 if compute == F32 else 4)
        want = run_whole(scale_gradient(program), arrays, HYPERS, compute=compute)
        run_in_parts(phases, arrays, HYPERS, compile_triton, (1, 3, 4), compute=compute)
        assert all(same_bits(arrays[name], want[name]) for name in want), (compute, shape)


def test_triton_gives_the_same_bits():
    """In a process of its own: Triton's own reductions are interpreted only if they were imported so."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "from tests.rules.test_lines import triton_cases; triton_cases()"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("compute", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(37, 100), (3, 50, 21), (30, 10, 3, 3), (1, 3000)], ids=str)
def test_no_cut_changes_a_bit(shape, compute):
    program, phases = sums_of_lines(compute)
    arrays = arrays_for(program, shape, compute, seed=1)
    if compute == F64:  # of one magnitude: plain sums would differ
        arrays["grad"] = arrays["grad"].sigmoid() + 1
    want = run_whole(scale_gradient(program), arrays, HYPERS, compute=compute)
    rng, numel = random.Random(5), math.prod(shape)
    for _ in range(125):
        places = sorted(rng.sample(range(1, numel), rng.randrange(1, 6)))
        got = {name: array.clone() for name, array in arrays.items()}
        run_in_parts(phases, got, HYPERS, llvm.compile_phase, places, compute=compute)
        assert all(same_bits(got[name], want[name]) for name in want), places


@pytest.mark.parametrize("target", ["sse2", "avx2", "avx512"])
def test_every_machine_gives_the_same_bits(target):
    program, phases = sums_of_lines(F32)
    arrays = arrays_for(program, (37, 100), F32, seed=4)
    want = run_whole(scale_gradient(program), arrays, HYPERS, compute=F32)
    try:
        run_in_parts(phases, arrays, HYPERS, partial(llvm.compile_phase, target=target), compute=F32)
    except llvm.TargetUnsupported as error:
        pytest.skip(str(error))
    assert all(same_bits(arrays[name], want[name]) for name in want)


@pytest.mark.parametrize("shape", [(1100, 1000), (40, 170, 170)], ids=str)
def test_threads_change_nothing(shape, monkeypatch):
    program, phases = sums_of_lines(F32)
    arrays = arrays_for(program, shape, F32, seed=1)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append({name: array.clone() for name, array in arrays.items()})
        run_in_parts(phases, results[-1], HYPERS, llvm.compile_phase, compute=F32)
    assert all(same_bits(results[0][name], other[name]) for other in results[1:] for name in arrays)
    want = run_whole(scale_gradient(program), arrays, HYPERS, compute=F32)
    assert all(same_bits(results[0][name], want[name]) for name in want)
