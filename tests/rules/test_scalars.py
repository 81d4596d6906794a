"""The host's scalars: what they are worth, what is refused and in which words, and how fast they are."""

import math
import sys
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardstep.errors import RuleError
from shardstep.rules.ir import Program, parse_text, verify
from shardstep.rules.scalars import compile_scalars, evaluate, expression
from shardstep.rules.scalars.arithmetic import ARITHMETIC, fused

ADAMW = """\
rule adamw
hyper lr
hyper betas 2
hyper weight_decay
hyper step
hyper grad_scale
%0 = hyper betas 0 : real uniform @ 3:0
%1 = hyper betas 1 : real uniform @ 3:0
%2 = hyper step : real uniform @ 4:0
%3 = const 1.0 : real uniform @ 4:0
%4 = pow %0 %2 : real uniform @ 4:0
%5 = sub %3 %4 : real uniform @ 4:0
%6 = pow %1 %2 : real uniform @ 5:0
%7 = sub %3 %6 : real uniform @ 5:0
%8 = sqrt %7 : real uniform @ 5:0
%9 = hyper lr : real uniform @ 6:0
%10 = div %9 %5 : real uniform @ 6:0
%11 = hyper weight_decay : real uniform @ 7:0
%12 = mul %9 %11 : real uniform @ 7:0
%13 = sub %3 %12 : real uniform @ 7:0
%14 = sub %3 %0 : real uniform @ 8:0
%15 = sub %3 %1 : real uniform @ 9:0
%16 = hyper grad_scale : real uniform @ 2:0
"""
HYPERS = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01, "step": 7, "grad_scale": 0.5}
WANTED = (1, 8, 10, 13, 14, 15, 16)


def slow(program: Program, wanted):
    return lambda hypers, known: evaluate(program, wanted, hypers, known)


both = pytest.mark.parametrize("make", [compile_scalars, slow])


@both
def test_adamw_has_the_values_of_its_equations(make):
    b0, b1 = HYPERS["betas"]
    expected = (b1, math.sqrt(1 - b1**7.0), 1e-3 / (1 - b0**7.0), 1 - 1e-3 * 0.01, 1 - b0, 1 - b1, 0.5)
    assert make(verify(parse_text(ADAMW)), WANTED)(HYPERS, {}) == expected


@both
def test_hyper_parameters_may_be_tensors_lists_and_truth_values(make):
    program = parse_text(
        "rule r\nhyper lr\nhyper betas 2\nhyper flag\n%0 = hyper lr : real uniform\n%1 = hyper betas 1 : real uniform\n"
        "%2 = hyper flag : real uniform\n%3 = hyper flag : bool uniform\n%4 = add %0 %1 : real uniform\n"
    )
    hypers = {"lr": torch.tensor([0.5]), "betas": [torch.tensor(0.25), 2], "flag": True}
    found = make(verify(program), (0, 1, 2, 3, 4))(hypers, {})
    assert found == (0.5, 2.0, 1.0, True, 2.5)
    assert [type(value) for value in found] == [float, float, float, bool, float]


ERRORS = {
    "a division by zero": ("div %0 %1", {"x": 0.1, "y": 0}, "x / y"),
    "the square root of a negative number": ("sqrt %0", {"x": -1.0, "y": 0}, "sqrt(x)"),
    "the logarithm of a negative number": ("log %0", {"x": -1.0, "y": 0}, "log(x)"),
    "the logarithm of zero": ("log %0", {"x": 0.0, "y": 0}, "log(x)"),
    "a negative power of zero": ("pow %0 %1", {"x": 0.0, "y": -1.0}, "x ** y"),
    "a fractional power of a negative number": ("pow %0 %1", {"x": -2.0, "y": 0.5}, "x ** y"),
    "no number (NaN)": ("sub %0 %1", {"x": math.inf, "y": math.inf}, "x - y"),
}
TOO_LARGE = {
    "mul %0 %1": {"x": 1e200, "y": -1e200},
    "add %0 %0": {"x": 1e308, "y": 0.0},
    "sub %0 %1": {"x": 1e308, "y": -1e308},
    "div %0 %1": {"x": 1e308, "y": 0.1},
    "pow %0 %1": {"x": 10.0, "y": 400.0},
    "exp %0": {"x": 1000.0, "y": 0.0},
    "fma %0 %0 %1": {"x": 1e200, "y": 0.0},
}


def one_operation(text: str, shape: str = "uniform") -> Program:
    sources = {
        "uniform": "%0 = hyper x : real uniform @ 11:4\n%1 = hyper y : real uniform @ 11:8\n",
        "tensor": "%0 = numel : real tensor\n%1 = rows : real tensor\n",
    }[shape]
    return verify(parse_text(f"rule r\nhyper x\nhyper y\n{sources}%2 = {text} : real {shape} @ 12:4\n"))


@both
@pytest.mark.parametrize("wrong", ERRORS)
def test_a_uniform_value_that_has_none_is_refused_in_the_words_of_the_rule(make, wrong):
    text, hypers, words = ERRORS[wrong]
    with pytest.raises(RuleError) as error:
        make(one_operation(text), (2,))(hypers, {})
    given_ = f"x={hypers['x']}, y={hypers['y']}"
    assert str(error.value) == (
        f"rule 'r', line 12: expected the per-step scalar {words} to have a value, got {wrong} with {given_}; "
        "change the hyper-parameters"
    )


@both
def test_a_remainder_by_zero_is_refused(make):
    with pytest.raises(RuleError, match="expected the per-step scalar x % y to have a value, got a division by zero"):
        make(one_operation("mod %0 %1"), (2,))({"x": 0.1, "y": 0}, {})


@both
@pytest.mark.parametrize("text", TOO_LARGE)
def test_a_uniform_value_that_overflows_is_refused(make, text):
    with pytest.raises(RuleError, match="got a number too large for float64"):
        make(one_operation(text), (2,))(TOO_LARGE[text], {})


@both
def test_an_overflow_is_refused_even_where_the_result_hides_it(make):
    program = parse_text(
        "rule r\nhyper x\n%0 = hyper x : real uniform\n%1 = mul %0 %0 : real uniform\n%2 = div %0 %1 : real uniform\n"
    )
    with pytest.raises(RuleError, match=r"x \* x to have a value"):
        make(verify(program), (2,))({"x": 1e200}, {})


@both
def test_an_infinity_that_was_given_is_no_overflow(make):
    assert make(one_operation("add %0 %1"), (2,))({"x": math.inf, "y": 1.0}, {}) == (math.inf,)
    assert math.isnan(make(one_operation("mul %0 %1"), (2,))({"x": math.nan, "y": 0.0}, {})[0])


TENSOR = [
    ("div %0 %1", 1.0, 0.0, math.inf),
    ("div %0 %1", 1.0, -0.0, -math.inf),
    ("div %0 %1", 0.0, 0.0, math.nan),
    ("mod %0 %1", 7.0, 4.0, 3.0),
    ("mod %0 %1", -1.0, 4.0, 3.0),
    ("mod %0 %1", 1.0, 0.0, math.nan),
    ("mod %0 %1", math.inf, 2.0, math.nan),
    ("sqrt %0", -1.0, 0.0, math.nan),
    ("rsqrt %0", 0.0, 0.0, math.inf),
    ("log %0", 0.0, 0.0, -math.inf),
    ("log %0", -1.0, 0.0, math.nan),
    ("exp %0", 1000.0, 0.0, math.inf),
    ("pow %0 %1", -10.0, 401.0, -math.inf),
    ("pow %0 %1", -10.0, 402.0, math.inf),
    ("pow %0 %1", -0.0, -3.0, -math.inf),
    ("pow %0 %1", -0.0, -2.0, math.inf),
    ("pow %0 %1", -2.0, 0.5, math.nan),
    ("mul %0 %1", 1e200, 1e200, math.inf),
    ("fma %0 %1 %0", -1e200, 1e200, -math.inf),
    ("minimum %0 %1", 0.0, -0.0, 0.0),
    ("maximum %0 %1", -0.0, -0.0, 0.0),
    ("minimum %0 %1", math.nan, 1.0, math.nan),
    ("maximum %0 %1", 1.0, math.nan, math.nan),
    ("maximum %0 %1", 1.0, 2.0, 2.0),
    ("minimum %0 %1", 1.0, 2.0, 1.0),
    ("sign %0", -0.0, 0.0, 0.0),
    ("sign %0", math.nan, 0.0, 0.0),
    ("sign %0", -5.0, 0.0, -1.0),
    ("neg %0", 0.0, 0.0, -0.0),
    ("abs %0", -0.0, 0.0, 0.0),
]


@both
@pytest.mark.parametrize(("text", "a", "b", "expected"), TENSOR)
def test_tensor_values_follow_ieee(make, text, a, b, expected):
    (found,) = make(one_operation(text, "tensor"), (2,))({}, {0: a, 1: b})
    assert repr(found) == repr(expected)  # tells 0.0 from -0.0


@both
def test_comparisons_with_nan_are_false_but_for_ne(make):
    lines = [f"%{i} = {name} %0 %1 : bool tensor" for i, name in enumerate("lt le gt ge eq ne".split(), 2)]
    program = verify(parse_text("rule r\n%0 = numel : real tensor\n%1 = rows : real tensor\n" + "\n".join(lines)))
    assert make(program, range(2, 8))({}, {0: math.nan, 1: math.nan}) == (False,) * 5 + (True,)
    assert make(program, range(2, 8))({}, {0: 0.0, 1: -0.0}) == (False, True, False, True, True, False)


@both
def test_only_the_branch_that_is_taken_needs_a_value(make):
    program = parse_text(
        "rule r\nhyper x\n%0 = hyper x : real uniform\n%1 = const 0.0 : real uniform\n%2 = const 1.0 : real uniform\n"
        "%3 = div %2 %0 : real uniform\n%4 = gt %0 %1 : bool uniform\n%5 = where %4 %3 %1 : real uniform\n"
        "%6 = choose %4 %3 %2 : real uniform\n"
    )
    assert make(verify(program), (5, 6))({"x": 0.0}, {}) == (0.0, 1.0)
    assert make(program, (5, 6))({"x": 4.0}, {}) == (0.25, 0.25)


@both
def test_a_long_chain_is_no_recursion(make):
    lines = ["%0 = hyper x : real uniform", *(f"%{i} = neg %{i - 1} : real uniform" for i in range(1, 3001))]
    assert make(verify(parse_text("rule r\nhyper x\n" + "\n".join(lines))), (3000,))({"x": 2.0}, {}) == (2.0,)


@both
@pytest.mark.parametrize("value", [None, "fast", torch.tensor([1.0, 2.0]), (1.0,)])
def test_what_is_no_number_is_named(make, value):
    hypers = {**HYPERS, "lr": value}
    with pytest.raises(RuleError, match=r"rule 'adamw', line 6: expected a number for the hyper-parameter lr, got lr="):
        make(parse_text(ADAMW), WANTED)(hypers, {})
    with pytest.raises(RuleError, match=r"hyper-parameter betas\[1\], got betas=\(0\.9,\)"):
        make(parse_text(ADAMW), WANTED)({**HYPERS, "betas": (0.9,)}, {})


def test_values_that_are_not_the_hosts_are_refused():
    program = parse_text("rule r\n%0 = load param : real element @ 5:1\n%1 = sum %0 : real tensor @ 6:1\n")
    assert compile_scalars(program, (1,))({}, {1: 3}) == (3.0,)
    with pytest.raises(RuleError, match="line 5: expected one number for all elements of a tensor, got param"):
        compile_scalars(program, (0,))
    with pytest.raises(RuleError, match="line 6: expected the host to know the value of sum, got none"):
        compile_scalars(program, (1,))({}, {})


def test_no_text_from_outside_is_executed():
    hostile = "x'];boom();['"
    program = parse_text("rule r\nhyper x\n%0 = hyper x : real uniform\n")
    line = program.instructions[0]
    object.__setattr__(line, "attributes", (hostile,))
    with pytest.raises(RuleError, match="expected an identifier for a hyper-parameter"):
        compile_scalars(program, (0,))


WORDS = {
    "sqrt(1 - betas[1] ** step)": 8,
    "lr / (1 - betas[0] ** step)": 10,
    "1 - lr * weight_decay": 13,
}


@pytest.mark.parametrize("words", WORDS)
def test_expressions_read_as_the_rule_has_them(words):
    assert expression(parse_text(ADAMW), WORDS[words]) == words


def test_brackets_stand_where_they_are_needed_and_long_expressions_end():
    program = parse_text(
        "rule r\nhyper a\n%0 = hyper a : real uniform\n%1 = const -2.0 : real uniform\n%2 = neg %0 : real uniform\n"
        "%3 = pow %2 %1 : real uniform\n%4 = sub %0 %3 : real uniform\n%5 = sub %0 %4 : real uniform\n"
        "%6 = lt %5 %0 : bool uniform\n%7 = not %6 : bool uniform\n%8 = and %7 %6 : bool uniform\n"
        "%9 = choose %8 %0 %1 : real uniform\n%10 = minimum %9 %0 : real uniform\n%11 = mul %9 %1 : real uniform\n"
        "%12 = pow %1 %0 : real uniform\n%13 = pow %12 %0 : real uniform\n%14 = pow %0 %12 : real uniform\n"
    )
    assert expression(program, 5) == "a - (a - (-a) ** (-2))"
    assert expression(program, 8) == "not a - (a - … ** (-2)) < a and a - (a - (-a) ** (-2)) < a"
    assert expression(program, 12) == "(-2) ** a"
    assert expression(program, 13) == "((-2) ** a) ** a"
    assert expression(program, 14) == "a ** (-2) ** a"
    assert expression(program, 10).endswith("else -2, a)")
    lines = ["%0 = hyper x : real uniform", *(f"%{i} = mul %{i - 1} %{i - 1} : real uniform" for i in range(1, 60))]
    assert len(expression(parse_text("rule r\nhyper x\n" + "\n".join(lines)), 59)) < 1000


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(numbers, numbers, numbers)
def test_fma_rounds_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = fused(a, b, c)
    if math.isinf(found):
        assert abs(exact) > Fraction(sys.float_info.max)
        return
    error = abs(Fraction(found) - exact)
    for neighbour in (math.nextafter(found, math.inf), math.nextafter(found, -math.inf)):
        assert math.isinf(neighbour) or error <= abs(Fraction(neighbour) - exact)


FMA = [
    (0.0, -1.0, -0.0, -0.0),
    (0.0, -1.0, 0.0, 0.0),
    (2.0, 3.0, -6.0, 0.0),
    (1e-200, -1e-200, 0.0, -0.0),
    (1e200, 1e200, -math.inf, -math.inf),
    (math.inf, 2.0, math.inf, math.inf),
    (math.inf, 0.0, 1.0, math.nan),
    (1.0 + 2.0**-52, 1.0 - 2.0**-52, -1.0, -(2.0**-104)),
]


@pytest.mark.parametrize(("a", "b", "c", "expected"), FMA)
def test_fma_of_special_values(a, b, c, expected):
    assert repr(fused(a, b, c)) == repr(expected)


specials = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -3.0, 1e300, 5e-324, math.inf, -math.inf, math.nan])


@given(st.sampled_from([n for n in ARITHMETIC if n not in ("and", "or", "not", "where", "choose")]), *[specials] * 3)
def test_fast_and_slow_agree(name, a, b, c):
    arity = (
        3 if name == "fma" else ARITHMETIC[name].__code__.co_argcount if hasattr(ARITHMETIC[name], "__code__") else 1
    )
    kind = "bool" if name in ("lt", "le", "gt", "ge", "eq", "ne") else "real"
    for shape, sources in (("uniform", ["hyper x", "hyper y", "hyper z"]), ("tensor", ["numel", "rows", "columns"])):
        lines = [f"%{i} = {source} : real {shape}" for i, source in enumerate(sources)]
        operands = " ".join(f"%{i}" for i in range(arity))
        text = "\n".join(
            ["rule r", "hyper x", "hyper y", "hyper z", *lines, f"%3 = {name} {operands} : {kind} {shape}"]
        )
        program = verify(parse_text(text))
        hypers, known = {"x": a, "y": b, "z": c}, {0: a, 1: b, 2: c} if shape == "tensor" else {}
        assert outcome(compile_scalars(program, (3,)), hypers, known) == outcome(slow(program, (3,)), hypers, known)


def outcome(function, hypers, known) -> str:
    try:
        return repr(function(hypers, known))
    except RuleError as error:
        return str(error)


def test_adamws_scalars_take_microseconds():
    function = compile_scalars(parse_text(ADAMW), WANTED)
    best = math.inf
    for _ in range(20):
        start = time.process_time()
        for _ in range(1000):
            function(HYPERS, {})
        best = min(best, (time.process_time() - start) / 1000)
    assert best < 2e-6  # 0.4 µs on the machine that this was written on
