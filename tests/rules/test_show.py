"""Rules as people look at them: every stage as text, and one element run line by line."""

import re
from pathlib import Path

import pytest

from shardstep.cli import main
from shardstep.errors import ConfigError
from shardstep.optim.adam import adamw
from shardstep.optim.muon import muon
from shardstep.optim.shampoo import shampoo
from shardstep.rules import rule, state
from shardstep.rules.show import STAGES, debug, show
from tests.rules import examples
from tests.rules.examples import adafactor, lamb, sgd

EXAMPLES = Path(__file__).with_name("examples.py")

TOLD = {
    "parse": "name exp_avg_sq @",
    "check": "elementwise: every operation is on one element at a time",
    "ir": "store exp_avg_sq",
    "passes": "s7 = lr / (1 - betas[0] ** step)",
    "llvm": "@llvm.sqrt",
    "asm": "sqrt",
    "triton": "tl.sqrt_rn",
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_a_rule_can_be_shown(stage, capsys):
    assert main(["rules", "show", "adamw", "--stage", stage]) == 0
    assert TOLD[stage] in capsys.readouterr().out


def test_flags_decide_what_is_left_of_a_rule():
    plain = show(sgd, "passes", {"momentum": 0.0})
    assert "momentum_buffer %" not in plain.split("--- phase 0")[1]
    assert "momentum_buffer %" in show(sgd, "passes", {"nesterov": True}).split("--- phase 0")[1]


def test_sums_cut_a_rule_into_phases():
    assert "--- phase 1" in show(lamb, "passes", {})


@rule
def narrow(param, grad, moment=state(dtype="bfloat16"), *, lr=0.1):
    moment = moment + grad
    return param - lr * moment, moment


def test_code_is_for_states_as_they_are_declared():
    assert "from_bfloat16(tl.load(at_moment" in show(narrow, "triton", {})


def test_a_rule_for_whole_tensors_has_no_phases():
    assert "--- phase 0" not in show(examples.muon, "passes", {})
    assert show(adafactor, "check", {}).splitlines()[-1].startswith("factored: row_sum in line")


def test_the_rules_that_come_along_are_listed(capsys):
    assert main(["rules", "list"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert listed["adamw"].split()[1:4] == ["elementwise", "exp_avg,", "exp_avg_sq,"]
    assert listed["lamb"].split()[1] == "reduced"


def test_the_list_is_a_table(capsys):
    main(["rules", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.rindex(" ") for line in lines}) == 1, "the last column begins at one place"


@pytest.mark.parametrize("stage", ["parse", "ir", "asm"])
def test_a_flag_of_another_name_is_refused_at_every_stage(capsys, stage):
    assert main(["rules", "show", "adam", "--stage", stage, "--flags", "amsgrd=true"]) == 2
    assert "(lr, betas, eps, " in (said := capsys.readouterr().err)
    assert "got amsgrd" in said


def test_a_rule_of_ones_own_file(capsys):
    assert main(["rules", "show", f"{EXAMPLES}:sgd", "--flags", "nesterov=true", "momentum=0.5"]) == 0
    assert capsys.readouterr().out.startswith("rule sgd\n")


def test_the_debugger_names_the_line_of_the_first_nan(capsys):
    words = "--param 1 --grad 1 --exp-avg-sq -4 --betas 0.9,0.999".split()
    assert main(["rules", "debug", "adamw", *words]) == 0
    told = capsys.readouterr().out
    assert "exp_avg_sq = -4.0" in told
    last = told.splitlines()[-1]
    assert last.startswith("the first value that is not finite, sqrt(")
    assert "denominator = sqrt(second)" in last


@rule
def branching(param, grad, *, lr=1e38, squared=True):
    scaled = grad * lr * lr if squared else grad * lr
    return param - scaled


def test_the_debugger_leaves_out_what_is_not_taken():
    assert "is made in line" in debug(branching, {}, {})
    assert debug(branching, {}, {"squared": False}).endswith("every value is finite\n")


def test_the_debugger_says_when_it_was_given():
    told = debug(adamw, {"grad": float("nan")}, {"lr": 0.5})
    assert told.endswith("the first value that is not finite is given: grad = nan\n")
    assert debug(adamw, {}, {}).endswith("every value is finite\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "adamm"], "expected one of adabelief, adadelta"),
        (["show", "nowhere.py:rule"], "expected a Python file"),
        (["show", f"{EXAMPLES}:ROUNDS"], "expected a function under @rule called 'ROUNDS'"),
        (["show", "adamw", "--stage", "passes", "--flags", "lr"], "expected NAME=VALUE"),
        (["show", "adamw", "--stage", "passes", "--flags", "rate=1"], "expected hyper-parameters of 'adamw'"),
        (["show", "adamw", "--stage", "passes", "--flags", "lr=fast"], "expected a number"),
        (["debug", "adamw", "--param"], "expected pairs of --name value"),
        (["debug", "adamw", "--param", "1,2"], "expected one number for param"),
    ],
)
def test_ill_use_of_the_command_line(words, said, capsys):
    assert main(["rules", *words]) == 2
    assert said in capsys.readouterr().err


def test_unknown_stages_and_values():
    with pytest.raises(ConfigError, match="expected a stage among parse, check"):
        show(adamw, "link", {})
    with pytest.raises(ConfigError, match="expected values for param, grad, exp_avg, exp_avg_sq"):
        debug(adamw, {"momentum": 1.0}, {})


def test_steps_of_a_rule_with_matrix_products():
    text = show(muon, "passes", {"rows": 4, "columns": 3, "ns_steps": 1})
    gram = re.search(r"--- middle: (b\d+) = (b\d+)\.T @ \2, in bfloat16", text)
    assert gram
    s = gram[1]
    assert f"= (ns_coefficients[2]) * ({s} @ {s}) + (ns_coefficients[1]) * {s}, in bfloat16" in text
    assert text.count("--- head: a pass") == 2
    assert text.index("--- middle") < text.index("--- tail: a pass")
    for stage in ("llvm", "triton"):
        assert show(muon, stage, {}).count("define void @run" if stage == "llvm" else "@triton.jit\ndef muon") == 3


def test_states_of_squares_and_identities_are_shown():
    assert "left: real rr" in show(shampoo, "check", {})
    text = show(shampoo, "passes", {"step": 1})
    assert len(re.findall(r"--- middle: b\d+ = identity\n", text)) == 2
    assert len(re.findall(r"--- middle: b\d+ = b\d+(\.T)? @ ", text)) == 4 + 2 * 32
    assert "store left_root" in text
    assert "store left_root" not in show(shampoo, "passes", {"step": 2, "update_freq": 2}).split("--- head")[1]
