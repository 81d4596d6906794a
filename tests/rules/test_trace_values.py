"""The debugger: every line's value for one element, and the line that made the first infinity or NaN."""

import math

import pytest
import torch

from shardstep.errors import ConfigError
from shardstep.rules import ir
from shardstep.rules.trace_values import first_non_finite, trace_values

TEXT = """rule r
state exp_avg element = 0.0
state exp_avg_sq element = 0.0 float16
hyper betas 2
hyper lr
%0 = load grad : real element @ 2:4
%1 = mul %0 %0 : real element @ 2:11
%2 = hyper betas 1 : real uniform @ 3:0
%3 = load exp_avg_sq : real element @ 3:4
%4 = fma %2 %1 %3 : real element @ 3:8
%5 = sqrt %4 : real element @ 4:4
%6 = log %5 : real element @ 5:4
%7 = const -inf : real uniform @ 6:0
%8 = gt %6 %7 : bool element @ 6:4
%9 = load param : real element @ 7:0
%10 = hyper lr : real uniform @ 7:8
%11 = where %8 %6 %9 : real element @ 7:12
%12 = mul %11 %10 : real element @ 7:20
%13 = bits %12 : word element
%14 = sum %12 : real tensor
store param %12
store exp_avg_sq %4
"""
PROGRAM = ir.verify(ir.parse_text(TEXT))
VALUES = {"param": 1.0, "grad": 3.0, "exp_avg": 0.0, "exp_avg_sq": 0.5}
HYPERS = {"betas": (0.9, 0.5), "lr": 0.1}


def trace(compute=torch.float32, hypers=HYPERS, **values):
    return trace_values(PROGRAM, VALUES | values, hypers, compute)


def test_inputs_come_first_then_the_lines_then_what_is_stored():
    lines = trace()
    assert [line.name for line in lines[:5]] == ["grad", "betas[1]", "exp_avg_sq", "param", "lr"]
    assert [line.operation for line in lines[5:]] == (
        "mul fma sqrt log const gt where mul bits sum store store".split()
    )
    fma = lines[6]
    assert [lines[a].value for a in fma.arguments] == [0.5, 9.0, 0.5]
    assert fma.place == ir.Place(3, 8)
    assert fma.value == 5.0


def test_values_are_those_of_the_compute_dtype():
    lines = {line.operation: line.value for line in trace()}
    root = torch.tensor(5.0, dtype=torch.float64).sqrt().float().item()
    assert lines["sqrt"] == root
    assert lines["log"] == pytest.approx(math.log(root), rel=2**-23)
    assert lines["gt"] is True
    assert lines["bits"] == torch.tensor(lines["sum"]).view(torch.int32).item()
    assert {line.operation: line.value for line in trace(torch.float64)}["sqrt"] == math.sqrt(5.0)


def test_a_stored_state_is_rounded_to_its_dtype():
    store = trace(grad=0.1)[-1]
    assert store.name == "exp_avg_sq"
    assert store.value == torch.tensor(0.505).half().item()


@pytest.mark.parametrize(
    ("values", "operation", "line"),
    [
        ({}, None, None),
        ({"grad": math.nan}, "load", 2),
        ({"exp_avg_sq": -math.inf}, "load", 3),
        ({"grad": 1e30}, "mul", 2),
        ({"exp_avg_sq": -9.0}, "sqrt", 4),
        ({"grad": 0.0, "exp_avg_sq": 0.0}, "log", 5),
        ({"grad": 400.0}, "store", 3),
    ],
)
def test_the_first_line_that_made_an_infinity_or_a_nan(values, operation, line):
    found = first_non_finite(trace(**values))
    assert (found and (found.operation, found.place.line)) == (operation and (operation, line))


def test_a_hyper_parameter_may_be_the_one():
    found = first_non_finite(trace(hypers=HYPERS | {"lr": math.inf}))
    assert found.name == "lr"


def test_an_infinity_written_in_the_rule_is_meant_but_not_what_comes_of_it():
    text = "rule r\n%0 = load grad : real element\n%1 = const inf : real uniform\n"
    text += "%2 = minimum %0 %1 : real element\n{}store param %2\n"
    fine = ir.parse_text(text.format(""))
    assert first_non_finite(trace_values(fine, {"grad": 1.0}, {}, torch.float32)) is None
    bad = ir.parse_text(text.format("").replace("minimum", "add"))
    assert first_non_finite(trace_values(bad, {"grad": 1.0}, {}, torch.float32)).operation == "add"


def test_a_missing_value_is_named():
    with pytest.raises(ConfigError, match=r"'r': expected a value for exp_avg_sq, got values for param, grad"):
        trace_values(PROGRAM, {"param": 1.0, "grad": 1.0}, HYPERS, torch.float32)
    with pytest.raises(ConfigError, match="expected a value for lr, got values for betas"):
        trace_values(PROGRAM, VALUES, {"betas": (0.9, 0.5)}, torch.float32)
