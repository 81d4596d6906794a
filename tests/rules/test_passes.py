"""Every pass: before and after as text, and both run, bit for bit. The whole pipeline on random programs.

A file of passes/ is named after its pass; it holds a program, perhaps the truths of its conditions, and what comes
out. ``python -m tests.rules.test_passes FILE`` prints the latter.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from shardstep.errors import RuleError
from shardstep.rules.ir import Phases, Program, VerifyError, parse_text, to_text, verify
from shardstep.rules.passes import compile_phases, compile_truths, conditions, pipeline, stages, used_arrays
from shardstep.rules.passes.common import share_common
from shardstep.rules.passes.constants import fold_constants
from shardstep.rules.passes.dead import drop_dead
from shardstep.rules.passes.exact import find_largest
from shardstep.rules.passes.gradient import scale_gradient
from shardstep.rules.passes.specialise import specialise
from shardstep.rules.passes.split import split
from shardstep.rules.passes.strength import reduce_strength
from tests.rules.passes.arrays import arrays_for, same_bits
from tests.rules.passes.plain_evaluator import run, run_phases
from tests.rules.passes.random_programs import programs

FIXTURES = sorted(Path(__file__).with_name("passes").glob("*.txt"))
PASSES = {
    "gradient": scale_gradient,
    "exact": find_largest,
    "constants": fold_constants,
    "strength": reduce_strength,
    "common": share_common,
    "dead": drop_dead,
}
HYPERS = {"lr": 0.1, "beta": 0.9, "betas": (0.9, 0.999), "step": 3.0, "weight_decay": 0.0}


def read(path: Path) -> tuple[Program, list[bool], str]:
    before, after = path.read_text().split("---\n", 1)
    *_, last = before.splitlines()
    decided: list[bool] = []
    if last.startswith("truths"):
        decided = [word == "true" for word in last.split()[1:]]
        before = before.removesuffix(last + "\n")
    return verify(parse_text(before)), decided, after


def apply(name: str, program: Program, decided: list[bool]) -> Program | Phases:
    if name == "split":
        return split(program)
    return specialise(program, decided) if name == "specialise" else PASSES[name](program)


def shown(result: Program | Phases) -> str:
    if isinstance(result, Program):
        return to_text(result)
    text = to_text(result.program)
    for phase in result.phases:
        scalars = "".join(f" s{i} = %{number}" for i, number in enumerate(phase.scalars))
        vectors = [f" v{i} = {'anchors of ' * v.anchors}%{v.number}" for i, v in enumerate(phase.vectors)]
        sums = "".join(f" %{own} is %{whole}" for own, whole in phase.sums)
        text += f"--- phase{scalars}{''.join(vectors)}{sums}\n{to_text(phase.body)}"
    return text


def hypers_of(program: Program, decided: list[bool]) -> dict[str, object]:
    """Numbers by name; the truths for those hyper-parameters that are conditions."""
    found: dict[str, object] = {**HYPERS, "grad_scale": 1.0}
    for number, truth in zip(conditions(program), decided, strict=bool(decided)):
        line = program.instructions[number]
        if line.operation == "hyper":
            found[line.attributes[0]] = truth
    return found


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_each_pass_gives_its_text_and_the_same_bits(path):
    before, decided, after = read(path)
    result = apply(path.stem.split(".")[0], before, decided)
    assert shown(result) == after
    hypers = hypers_of(before, decided)
    arrays = arrays_for(["param", "grad", *(state.name for state in before.states)], awkward="tame" not in path.stem)
    arrays |= {state.name: arrays[state.name][:1] for state in before.states if state.shape in ("row", "tensor")}
    old, _ = run(before, arrays, hypers)
    if isinstance(result, Phases):
        for phase in result.phases:
            verify(phase.body)
        new = run_phases(result, arrays, hypers)
    else:
        new, _ = run(verify(result), arrays, hypers)
    assert all(same_bits(old[name], new[name]) for name in arrays)


def test_every_pass_has_a_fixture():
    assert {path.stem.split(".")[0] for path in FIXTURES} == {*PASSES, "split", "specialise"}


def test_the_gradient_is_scaled_once():
    once = scale_gradient(read_named("gradient.once"))
    assert scale_gradient(once) is once
    arrays = arrays_for(["param", "grad"])
    scaled, _ = run(once, arrays, {"lr": 0.1, "grad_scale": 0.3})
    by_hand, _ = run(read_named("gradient.once"), {**arrays, "grad": arrays["grad"] * np.float32(0.3)}, {"lr": 0.1})
    assert same_bits(scaled["param"], by_hand["param"])


def read_named(name: str) -> Program:
    return read(Path(__file__).with_name("passes") / f"{name}.txt")[0]


def test_places_of_the_first_survive_sharing():
    program = parse_text(
        "rule r\n%0 = load param : real element @ 3:4\n%1 = neg %0 : real element @ 4:4\n"
        "%2 = neg %0 : real element @ 5:4\n%3 = add %1 %2 : real element @ 6:4\nstore param %3\n"
    )
    assert "@ 4:4" in to_text(share_common(program), places=True)
    assert "@ 5:4" not in to_text(share_common(program), places=True)


NESTED = """\
rule nested
hyper fast
hyper c
%0 = load param : real element
%1 = hyper fast : bool uniform
%2 = hyper c : real uniform
%3 = const 1.0 : real uniform
%4 = div %3 %2 : real uniform
%5 = gt %4 %3 : bool uniform
%6 = neg %0 : real element
%7 = choose %5 %6 %0 : real element
%8 = choose %1 %7 %0 : real element
%9 = choose %1 %0 %8 : real element
%10 = add %8 %9 : real element
store param %10
"""


def test_conditions_are_listed_once():
    assert conditions(parse_text(NESTED)) == (5, 1)


def test_truths_ask_only_for_the_branches_taken():
    truths = compile_truths(parse_text(NESTED))
    assert truths({"fast": True, "c": 0.5}) == (True, True)
    assert truths({"fast": torch.tensor(True), "c": torch.tensor([2.0])}) == (False, True)
    assert truths({"fast": False, "c": 0.5}) == (False, False)
    assert truths({"fast": False, "c": 0.0}) == (False, False)
    with pytest.raises(RuleError, match=r"1 / c to have a value, got a division by zero with fast=True, c=0\.0"):
        truths({"fast": True, "c": 0.0})


def test_a_reduction_of_what_became_uniform_is_refused_by_its_line():
    program = parse_text(
        "rule r\nhyper flag\n%0 = load param : real element\n%1 = hyper flag : bool uniform\n"
        "%2 = const 1.0 : real uniform\n%3 = choose %1 %2 %0 : real element\n%4 = sum %3 : real tensor @ 7:4\n"
        "store param %4\n"
    )
    assert verify(specialise(program, [False]))
    with pytest.raises(RuleError, match="rule 'r', line 7: expected element values in sum"):
        specialise(program, [True])


WARM_UP = """rule r
state m element = 0.0
state v element = 0.0
hyper step
hyper flag
%0 = load param : real element
%1 = load grad : real element
%2 = load m : real element
%3 = hyper step : real uniform
%4 = const 5.0 : real uniform
%5 = gt %3 %4 : bool uniform
%6 = choose %5 %1 %2 : real element
%7 = hyper flag : bool uniform
%8 = load v : real element
%9 = choose %7 %1 %8 : real element
%10 = add %0 %9 : real element
%11 = choose %7 %10 %0 : real element
store param %11
store m %6
store v %9
"""


@pytest.mark.parametrize("flag", [True, False])
def test_a_branch_of_later_steps_counts_among_what_is_used(flag):
    used = {"param", "grad", "m"} | ({"v"} if flag else set())
    assert used_arrays(verify(parse_text(WARM_UP)), {"flag": flag}) == used


REFUSED = {
    "row_sum": "%1 = row_sum %0 : real row @ 9:4\nstore param %1\n",
    "matmul": "%1 = transpose %0 : real cr @ 8:4\n%2 = matmul %0 %1 : real rr @ 9:4\n%3 = sum %2 : real tensor\n"
    "store param %3\n",
}


@pytest.mark.parametrize("what", REFUSED)
def test_matrices_and_sums_that_are_no_totals_are_refused_by_their_line(what):
    program = verify(parse_text(f"rule r\nstate rows row = 0.0\n%0 = load param : real element\n{REFUSED[what]}"))
    line = "8" if what == "matmul" else "9"
    name = "transpose" if what == "matmul" else what
    with pytest.raises(RuleError, match=f"rule 'r', line {line}: .*{name}.*only the reference back end"):
        split(program)


def test_all_stores_are_in_the_last_phase_and_early_ones_hold_no_more_than_their_reductions_need():
    phases = split(read_named("split.lamb")).phases
    assert [len(phase.body.stores) for phase in phases] == [0, 0, 2]
    for phase in phases:
        assert to_text(drop_unneeded(phase.body, [own for own, _ in phase.sums])) == to_text(phase.body)


def drop_unneeded(body: Program, roots: list[int]) -> Program:
    used = {argument for line in body.instructions for argument in line.arguments}
    used |= {*roots, *(value for _, value in body.stores)}
    return body if used == set(range(len(body.instructions))) else drop_dead(body)


def test_a_pass_that_breaks_the_program_names_itself(monkeypatch):
    broken = parse_text("rule r\n%0 = load param : real element\n%1 = neg %0 : real uniform\nstore param %1\n")
    monkeypatch.setattr(pipeline, "scale_gradient", lambda program: broken)
    with pytest.raises(VerifyError, match="after the pass 'gradient'"):
        compile_phases(parse_text("rule r\n%0 = load param : real element\nstore param %0\n"), [], torch.float32)


def test_stages_name_the_passes_and_end_where_nothing_changes():
    found = stages(read_named("constants.identities"), [], torch.float32)
    assert [name for name, _ in found][:9] == (
        "ir gradient specialise exact constants dead elementary constants strength".split()
    )
    assert len(found[-1][1].instructions) < len(found[0][1].instructions)
    last = found[-1][1]
    assert drop_dead(share_common(reduce_strength(fold_constants(last)))) == last


@pytest.mark.parametrize("name", [name for name in PASSES if name != "gradient"])
def test_a_pass_with_nothing_to_do_gives_back_the_same_program(name):
    last = stages(read_named("constants.identities"), [], torch.float32)[-1][1]
    assert PASSES[name](last) is last


def test_programs_that_differ_in_the_sign_of_a_zero_are_two():
    program = parse_text(SIGNED_ZERO.format("0.0"))
    other = parse_text(SIGNED_ZERO.format("-0.0"))
    assert to_text(program.with_instructions(other.instructions, program.stores)) == to_text(other)
    assert program.with_instructions(program.instructions, program.stores) is program


SIGNED_ZERO = """rule r
%0 = load param : real element
%1 = const {} : real uniform
%2 = add %0 %1 : real element
store param %2
"""


def test_what_sharing_makes_equal_folds_in_the_next_round():
    program = parse_text(
        "rule r\n%0 = load param : real element\n%1 = load grad : real element\n%2 = lt %0 %1 : bool element\n"
        "%3 = add %0 %1 : real element\n%4 = add %1 %0 : real element\n%5 = where %2 %3 %4 : real element\n"
        "%6 = where %2 %4 %5 : real element\nstore param %6\n"
    )
    operations = [line.operation for line in stages(program, [], torch.float32)[-1][1].instructions]
    assert operations == "load load hyper mul add".split()


@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_phases_have_no_elementary_functions_of_elements_but_the_host_keeps_its_own(compute):
    program = parse_text(
        "rule r\nhyper lr\n%0 = load param : real element\n%1 = hyper lr : real uniform\n%2 = exp %1 : real uniform\n"
        "%3 = tanh %0 : real element\n%4 = mul %2 %3 : real element\nstore param %4\n"
    )
    phases = compile_phases(program, [], compute)
    assert not {line.operation for line in phases.phases[0].body.instructions} & {"exp", "tanh"}
    assert [phases.program.instructions[number].operation for number in phases.phases[0].scalars] == ["exp"]


@settings(max_examples=300)
@given(programs(), st.booleans())
def test_the_pipeline_keeps_every_bit(program, flag):
    hypers = {"lr": 0.1, "betas": (0.9, 0.999), "step": 2, "flag": flag, "grad_scale": 1.0}
    arrays = arrays_for(["param", "grad", "a", "b"], n=70)
    try:
        new = run_phases(compile_phases(program, compile_truths(program)(hypers), torch.float32), arrays, hypers)
    except RuleError as error:
        if "to have a value" not in str(error):
            raise
        reject()  # a uniform value that divides by zero, or the like
    old, _ = run(program, arrays, hypers)
    assert all(same_bits(old[name], new[name]) for name in arrays)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        given_program, given_truths, _ = read(Path(name))
        print(shown(apply(Path(name).stem.split(".")[0], given_program, given_truths)), end="")
