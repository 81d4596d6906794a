"""What a rule's signature may be. What is said about one that may not, is in test_check."""

import inspect

import pytest

from shardstep.errors import RuleError
from shardstep.rules import Rule, functions, rule, zeros
from shardstep.rules.diagnostics import RuleErrors
from shardstep.rules.ir import State
from shardstep.rules.language import WORDS, Inline, inline, state
from tests.rules import mistakes


def test_a_rule_knows_its_states_and_hyperparameters():
    @rule
    def example(param, grad, first=zeros, second=zeros, *, step, lr, betas=(0.5, 0.25), eps=1, amsgrad=False):
        return param, first, second

    assert isinstance(example, Rule)
    assert example.name == "example"
    assert example.states == ("first", "second")
    assert dict(example.hyperparameters) == {"lr": None, "betas": (0.5, 0.25), "eps": 1, "amsgrad": False}
    assert "test_language.py:" in example.place


def test_states_say_how_they_start_and_what_they_are_stored_in():
    @rule
    def example(
        param,
        grad,
        m=zeros,
        ones=state(1),
        anchor=state("param", dtype="bfloat16"),
        of_rows=state(-0.5, shape="row", dtype="float32"),
        total=state(float("inf"), shape="tensor"),
    ):
        return param, m, ones, anchor, of_rows, total

    assert example.declared == (
        State("m", "element", 0.0),
        State("ones", "element", 1.0),
        State("anchor", "element", "param", "bfloat16"),
        State("of_rows", "row", -0.5, "float32"),
        State("total", "tensor", float("inf")),
    )


def test_the_body_is_not_read_before_it_is_needed():
    scope = {}
    exec("def no_source(param, grad):\n    return anything_at_all\n", scope)
    assert rule(scope["no_source"]).name == "no_source"
    assert inline(scope["no_source"]).name == "no_source"


def test_an_inline_function_takes_any_arguments():
    @inline
    def helper(x, y=2, *, scale=(1.0, 2.0)):
        return x

    assert isinstance(helper, Inline)
    assert "test_language.py:" in helper.place
    with pytest.raises(RuleErrors, match=r"E27 .* got \*xs"):
        inline(mistakes_of_inline)


def mistakes_of_inline(*xs):
    return xs


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (mistakes.wrong_inputs, "first two arguments to be param and grad"),
        (mistakes.state_as_number, "write m=zeros, or put it after *"),
        (mistakes.reserved, "expected 'step' after *"),
        (mistakes.starred, "got *states"),
        (mistakes.given_step, "'step' without a default"),
        (mistakes.text_default, "'mode' to default to a number"),
        (mistakes.starts_from_grad, "'m' to start from a number"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_signature_is_refused_at_once_where_it_stands(function, said):
    with pytest.raises(RuleErrors) as caught:
        rule(function)
    assert said in str(caught.value)
    assert f"{mistakes.__file__}:{function.__code__.co_firstlineno}:" in str(caught.value)


def input_default(param, grad=0.0): ...


def only_param(param): ...


def keywords(param, grad, **hyper): ...


def empty_tuple(param, grad, *, betas=()): ...


def flags_in_a_tuple(param, grad, *, betas=(True, 0.5)): ...


def huge(param, grad, m=state(10**400)): ...


def own_scale(param, grad, *, grad_scale=1.0): ...


def step_without_place(param, grad, step): ...


async def asynchronous(param, grad): ...


def unhashable(param, grad, m=state([], dtype=[], shape={})): ...


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (input_default, "E27"),
        (only_param, "E27"),
        (keywords, "E27"),
        (empty_tuple, "E30"),
        (flags_in_a_tuple, "E30"),
        (huge, "E15"),
        (own_scale, "E28"),
        (step_without_place, "E28"),
        (asynchronous, "E27"),
        (unhashable, "E20"),
        (lambda param, grad: param, "E27"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_whatever_is_no_rule_is_refused(function, code):
    with pytest.raises(RuleErrors) as caught:
        rule(function)
    assert [d.code for d in caught.value.diagnostics] == [code]


def test_an_argument_is_underlined_where_it_is_written():
    def far_below(
        param,
        grad,
        second_moment=0.0,
    ): ...

    with pytest.raises(RuleErrors) as caught:
        rule(far_below)
    (mistake,) = caught.value.diagnostics
    assert mistake.source_line[mistake.column : mistake.end_column] == "second_moment"
    assert mistake.line == far_below.__code__.co_firstlineno + 3


@pytest.mark.parametrize("other", [print, None, 3, property(), type])
def test_only_plain_functions_are_rules(other):
    with pytest.raises(RuleError, match=r"E27 .*plain function"):
        rule(other)


def test_the_functions_can_be_imported_but_mean_nothing_outside_rules():
    for name in WORDS.keys() - {"abs", "sum"}:
        assert list(inspect.signature(getattr(functions, name)).parameters) == list(WORDS[name])
    with pytest.raises(RuleError, match=r"where\(\) inside a function under @rule"):
        functions.where(True, 1.0, 2.0)
