"""What a rule's signature may be, and what is said about one that may not."""

import pytest

from shardstep.errors import RuleError
from shardstep.rules import Rule, rule, zeros


def test_a_rule_knows_its_states_and_hyperparameters():
    @rule
    def example(param, grad, first=zeros, second=zeros, *, step, lr, betas=(0.5, 0.25), eps=1):
        return param, first, second

    assert isinstance(example, Rule)
    assert example.name == "example"
    assert example.states == ("first", "second")
    assert dict(example.hyperparameters) == {"lr": None, "betas": (0.5, 0.25), "eps": 1}
    assert "test_language.py:" in example.place


def wrong_inputs(weights, grad): ...


def input_default(param, grad=0.0): ...


def only_param(param): ...


def state_number(param, grad, exp_avg=0.0): ...


def state_without_start(param, grad, exp_avg): ...


def state_called_step(param, grad, step=zeros): ...


def starred(param, grad, *states): ...


def keywords(param, grad, **hyper): ...


def step_default(param, grad, *, step=1): ...


def flag(param, grad, *, nesterov=False): ...


def text(param, grad, *, mode="l2"): ...


def empty_tuple(param, grad, *, betas=()): ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (wrong_inputs, "first two arguments to be param and grad"),
        (input_default, "first two arguments to be param and grad"),
        (only_param, "first two arguments to be param and grad"),
        (state_number, "write exp_avg=zeros, or put it after *"),
        (state_without_start, "state 'exp_avg' to start from zeros"),
        (state_called_step, "expected 'step' after"),
        (starred, "got *args or **kwargs"),
        (keywords, "got *args or **kwargs"),
        (step_default, "'step' without a default"),
        (flag, "'nesterov' to default to a number"),
        (text, "'mode' to default to a number"),
        (empty_tuple, "'betas' to default to a number"),
    ],
)
def test_another_signature_is_refused_where_it_stands(function, said):
    with pytest.raises(RuleError) as caught:
        rule(function)
    assert said in str(caught.value)
    assert f"{function.__name__!r} ({__file__}:" in str(caught.value)


def test_only_plain_functions_are_rules():
    with pytest.raises(RuleError, match="plain function"):
        rule(print)
