"""Real rules as machine code for GPUs: what the compiler made of them is what the instructions do, and no more."""

import re
from collections import Counter
from functools import cache

import pytest
import torch

from shardstep.optim.adam import adamw
from shardstep.rules.backends.triton import compile_text, source
from shardstep.rules.binding import Binding
from shardstep.rules.lower import program_of
from shardstep.rules.passes import compile_phases, compile_truths
from tests.rules.examples import lamb, lion, sgd
from tests.rules.test_triton import mnemonics

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

RULES = {
    "adamw": (adamw, {}),
    "lion": (lion, {}),
    "sgd": (sgd, {"nesterov": True, "weight_decay": 0.1}),
    "lamb": (lamb, {}),
}
KERNELS = [("adamw", 0), ("lion", 0), ("sgd", 0), ("lamb", 0), ("lamb", 1)]
BINDINGS = {"float32": (F32, F32, None), "float64": (F64, F64, None), "mixed": (F32, BF16, BF16)}
"""The dtypes of the param and its states, of the gradient, and of the low copy."""

BASIC = ("add", "sub", "mul", "div", "sqrt", "fma")


def phases_of(name, compute):
    rule, flags = RULES[name]
    program = program_of(rule)
    return compile_phases(
        program, compile_truths(program)({**rule.hyperparameters, "step": 2, **flags}), compute
    ).phases


@cache
def made(name, number, dtypes, arch):
    """A phase, its binding and its instructions."""
    compute, grad, low = BINDINGS[dtypes]
    phase = phases_of(name, compute)[number]
    stored = tuple((array, grad if array == "grad" else compute) for array in phase.body.shapes)
    binding = Binding(compute, stored, low)
    pytest.importorskip("triton")
    return phase, binding, compile_text(phase, binding, arch)["ptx"]


ON_DEVICES = pytest.mark.parametrize("arch", [80, 90])
OF_DTYPES = pytest.mark.parametrize("dtypes", BINDINGS)
OF_KERNELS = pytest.mark.parametrize(("name", "number"), KERNELS)


def test_these_are_all_kernels():
    assert [(name, number) for name in RULES for number in range(len(phases_of(name, F32)))] == KERNELS


@ON_DEVICES
@OF_DTYPES
@OF_KERNELS
def test_each_operation_is_one_correctly_rounded_instruction(name, number, dtypes, arch):
    phase, binding, text = made(name, number, dtypes, arch)
    assert not re.findall(r"\.(?:ftz|approx|full|sat)\b|\b(?:rcp|rsqrt|ex2|lg2|tanh)\.|\bmad\.(?:rn|f)|bf16", text)
    kind = "f64" if binding.compute == F64 else "f32"
    found = {key: count for key, count in mnemonics(text).items() if key.endswith((".rn.f32", ".rn.f64"))}
    if phase.sums:
        found.pop("add.rn.f64")  # sums are float64, with additions of their own
    operations = Counter(line.operation for line in phase.body.instructions)
    each = 4 if phase.sums else 8
    wanted = {f"{op}.rn.{kind}": operations[op] * each for op in BASIC if operations[op]}
    if phase.sums:
        wanted.pop("add.rn.f64", None)
    assert found == wanted


@ON_DEVICES
@OF_DTYPES
@OF_KERNELS
def test_memory_moves_128_bits_at_a_time(name, number, dtypes, arch):
    phase, binding, text = made(name, number, dtypes, arch)
    sizes = {array: dtype.itemsize for array, dtype in binding.stored}
    each = 4 if phase.sums else 8
    loaded = {line.attributes[0] for line in phase.body.instructions if line.operation == "load"}
    low = binding.low.itemsize if binding.low and not phase.sums else 0
    moved = {"ld.global": sum(sizes[array] for array in loaded) * each}
    moved["st.global"] = (sum(sizes[array] for array, _ in phase.body.stores) + low) * each
    for direction, size in moved.items():
        found = {key: count for key, count in mnemonics(text).items() if key.startswith(direction)}
        if phase.sums and direction == "st.global":
            assert set(found) == {"st.global.b64"}  # the partials, one for a block
        else:
            # Four 16-bit numbers are half of that, in a kernel that takes four at a time.
            half = {"ld.global.v2.b32"} if phase.sums and dtypes == "mixed" else set()
            assert set(found) <= {f"{direction}.v4.b32", f"{direction}.v2.b64", *half}
            assert sum(count * (8 if key in half else 16) for key, count in found.items()) == size


@OF_DTYPES
@OF_KERNELS
def test_the_text_says_which_line_of_the_rule_it_is(name, number, dtypes):
    phase, binding, _ = made(name, number, dtypes, 80)
    lines = {line.place.line for line in phase.body.instructions if line.place}
    assert lines == set(map(int, re.findall(r"  # line (\d+)$", source(phase, binding), re.MULTILINE)))
