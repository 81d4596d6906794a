"""One rule, one meaning: what the compiler makes of a program is what the program says, on every back end."""

import math
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from shardstep.errors import RuleError
from shardstep.optim import AdamW, Optimizer
from shardstep.rules import compiled
from shardstep.rules.backends import blocks, llvm, reference, rounding
from shardstep.rules.backends.evaluation import exactly
from shardstep.rules.binding import Binding
from shardstep.rules.ir import Phase, parse_text
from shardstep.rules.passes import compile_phases, compile_truths
from shardstep.rules.passes.gradient import scale_gradient
from shardstep.rules.scalars import compile_scalars
from shardstep.types import Batch, Segment, Update
from tests.rules import examples
from tests.rules.programs import SCALARS, programs, random_array, random_arrays, same_bits

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NUMEL, OFFSET = 2100, 777
CUT = 2 * 1024 - OFFSET
"""Where a shard may end: at a block of the global grid."""

HYPERS = {**dict(zip(SCALARS, (0.9, -1e-3, 2.5), strict=True)), "grad_scale": 0.3}
BACK_ENDS = {"llvm": llvm.compile_phase, "reference": reference.compile_phase}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path_factory.getbasetemp() / "code"))


# Random programs.


def run_phases(phases, make, arrays, binding, low):
    """In place, in two pieces, by a back end's ``compile_phase``; the sums between phases by the host."""
    lines = phases.program.instructions
    known = {number: float(NUMEL) for number, line in enumerate(lines) if line.operation == "numel"}
    for phase in phases.phases:
        scalars = compile_scalars(phases.program, phase.scalars)(HYPERS, known)
        kernel = make(phase, binding)
        pieces = []
        for part in (slice(0, CUT), slice(CUT, NUMEL)):
            run = {name: array[part] for name, array in arrays.items()}
            pieces.append(kernel(run, scalars, offset=OFFSET + part.start, low=None if phase.sums else low[part]))
        for (inner, outer), *parts in zip(phase.sums, *pieces, strict=True):
            operation = phase.body.instructions[inner].operation
            known[outer] = float(blocks.combine(operation, torch.cat(parts).numpy()))


@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    programs(elementary=True, hosted=True),
    st.sampled_from([F32, F64]),
    st.sampled_from([BF16, None]),
    st.sampled_from([BF16, F16]),
    st.integers(0, 99),
)
def test_phases_give_the_bits_of_the_program(program, compute, grad, low_dtype, seed):
    arrays = random_arrays(program, NUMEL, compute, seed)
    arrays["grad"] = random_array(NUMEL, grad or compute, seed)
    try:
        want = reference.run_whole(scale_gradient(program), arrays, HYPERS, compute=compute, offset=OFFSET)
    except RuleError:
        reject()  # a per-step scalar has no value
    phases = compile_phases(program, compile_truths(program)(HYPERS), compute)
    for make in BACK_ENDS.values():
        got, low = {name: array.clone() for name, array in arrays.items()}, torch.empty(NUMEL, dtype=low_dtype)
        binding = Binding(compute, tuple((name, array.dtype) for name, array in arrays.items()), low_dtype)
        run_phases(phases, make, got, binding, low)
        for name in arrays:
            assert same_bits(got[name], want.get(name, arrays[name])), name
        copy = torch.empty_like(low)
        with exactly():
            rounding.write(rounding.read(want["param"], compute), copy)
        assert same_bits(low, copy)


@pytest.mark.parametrize("make", BACK_ENDS.values(), ids=BACK_ENDS)
def test_a_phase_may_need_no_array(make):
    body = parse_text(
        "rule r\n%0 = index : word element\n%1 = from_bits %0 : real element\n%2 = max %1 : real tensor\n"
    )
    arrays = {"param": torch.zeros(1500), "grad": torch.zeros(1500)}
    (partials,) = make(Phase(body, (), ((2, 2),)), Binding(F32, tuple((name, F32) for name in arrays)))(arrays, ())
    assert partials.tolist() == torch.tensor([1023, 1499], dtype=torch.int32).view(F32).tolist()


# Real rules.


def optimizer_of(rule):
    return type(rule.name.title(), (Optimizer,), {"rule": rule})


RULES = {
    "adamw": (AdamW, {}),
    "lion": (optimizer_of(examples.lion), {"weight_decay": 0.1}),
    "sgd": (optimizer_of(examples.sgd), {}),
    "sgd nesterov": (optimizer_of(examples.sgd), {"nesterov": True, "weight_decay": 0.1, "maximize": True}),
    "sgd plain": (optimizer_of(examples.sgd), {"momentum": 0.0}),
    "lamb": (optimizer_of(examples.lamb), {"weight_decay": 0.1}),
}
SHAPES = ((37, 41), (5,), (), (3, 1024), (0,))


def three_steps(kind, options, dtype):
    """The parameters and all states."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_() for shape in SHAPES]
    optimizer = kind([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], **options)
    for _ in range(3):
        for param in params:
            grad = torch.randn(param.shape, generator=generator, dtype=F64)
            param.grad = (grad * 10.0 ** torch.randint(-9, 5, param.shape, generator=generator)).to(dtype)
        optimizer.step()
    return [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_optimizers_give_the_same_bits_on_both_back_ends(name, dtype, monkeypatch):
    kernels = []

    def counted(make):
        return lambda device: lambda *given: kernels.append(made := make(*given)) or made

    results = {}
    for key, make in BACK_ENDS.items():
        monkeypatch.setattr(compiled, "_COMPILED", WeakKeyDictionary())
        monkeypatch.setattr(compiled, "back_end", counted(make))
        results[key] = three_steps(*RULES[name], dtype)
    assert {isinstance(kernel, llvm.LlvmKernel) for kernel in kernels} == {True, False}
    for got, want in zip(*results.values(), strict=True):
        assert same_bits(got, want)
    assert not any(math.isnan(value) for got in results["llvm"] for value in got.flatten().tolist())


@pytest.mark.parametrize("rule", [examples.muon, AdamW.rule], ids=lambda rule: rule.name)
def test_the_copy_of_a_large_param_overflows_silently(rule):
    param, low = torch.full((4, 4), 3.4e38).view(-1), torch.zeros(16, dtype=F16)
    made = compiled.compile_rule(rule)
    states = {state.name: torch.zeros(16) for state in made.program.states}
    segment = Segment(0, 1, param, torch.ones(16), states, low, 1.0, shape=(4, 4))
    made.update(Batch([segment], [Update(0, 1, (4, 4))], lambda sums, _: sums), [{**rule.hyperparameters}])
    assert low.isinf().all()


def test_the_line_of_a_nan_is_known_for_16_bit_params():
    optimizer = AdamW([torch.zeros(1, requires_grad=True)])
    states = {name: torch.zeros(1) for name in optimizer.state_names}
    segment = Segment(0, 1, torch.ones(1, dtype=BF16), torch.full((1,), math.nan), states, None, 1.0)
    assert "grad" in optimizer.explain(segment, 0)
