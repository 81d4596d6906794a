"""What a rule becomes when it is traced, and where its mistakes are shown."""

import math

import pytest

from shardstep.errors import RuleError
from shardstep.optim.adamw import adamw
from shardstep.rules import rule, zeros
from shardstep.rules.host import evaluate
from shardstep.rules.language import maximum, minimum, sign, sqrt
from shardstep.rules.trace import trace

DECAY = 0.5


def test_adamw_is_fourteen_operations_in_the_order_written():
    assert (
        str(trace(adamw))
        == """\
adamw %0=param %1=grad %2=exp_avg %3=exp_avg_sq
  $0 = sub(1.0, mul(lr, weight_decay))
  $1 = betas[0]
  $2 = sub(1.0, betas[0])
  $3 = betas[1]
  $4 = sub(1.0, betas[1])
  $5 = sqrt(sub(1.0, pow(betas[1], step)))
  $6 = eps
  $7 = div(lr, sub(1.0, pow(betas[0], step)))
  %4 = mul %0, $0
  %5 = mul $1, %2
  %6 = mul $2, %1
  %7 = add %5, %6
  %8 = mul $3, %3
  %9 = mul $4, %1
  %10 = mul %9, %1
  %11 = add %8, %10
  %12 = sqrt %11
  %13 = div %12, $5
  %14 = add %13, $6
  %15 = mul $7, %7
  %16 = div %15, %14
  %17 = sub %4, %16
  return %17, %7, %11"""
    )


def test_the_language_is_known_without_import_and_wins_over_globals():
    source = "def f(param, grad):\n    return sign(grad) * abs(param) - sqrt(minimum(param, maximum(grad, 2)))\n"
    scope: dict[str, object] = {"sqrt": None}
    exec(source, scope)
    operations = [line.operation for line in trace(rule(scope["f"])).instructions]
    assert operations == ["sign", "abs", "mul", "maximum", "minimum", "sqrt", "sub"]


def test_captured_constants_and_numbers_keep_their_sign_of_zero():
    local = -0.0

    @rule
    def captured(param, grad):
        return +param * DECAY + local + (0.0 - grad) + -grad

    program = trace(captured)
    assert [str(u) for u in program.uniforms] == ["0.5", "-0.0", "0.0"]
    assert [str(line) for line in program.instructions][-2:] == ["neg %1", "add %5, %6"]


def test_scalars_only_are_host_expressions_in_float64():
    @rule
    def schedule(param, grad, *, step, lr=0.1, betas=(0.9, 0.99)):
        b1, b2 = betas
        bias = sqrt(1 - b2**step) / (1 - b1**step)
        return param - minimum(lr, maximum(bias, sign(-lr) + abs(-2))) * grad

    uniform = trace(schedule).uniforms[0]
    got = evaluate(uniform, {"step": 3, "lr": 7.0, "betas": (0.9, 0.99)})
    assert got == min(7.0, max(math.sqrt(1 - 0.99**3) / (1 - 0.9**3), -1.0 + 2.0))


def test_numbers_alone_are_computed_at_once():
    assert (sqrt(4.0), sign(-3), minimum(1, 2), maximum(1, 2)) == (2.0, -1.0, 1, 2)


def branch(param, grad):
    if grad > 0:
        return param
    return grad


def truth(param, grad):
    return param if grad else grad


def scalar_equality(param, grad, *, lr=0.1):
    return param if lr == 0 else grad


def power(param, grad):
    return param - grad**2


def concrete(param, grad):
    return param - math.sqrt(grad)


def indexed(param, grad):
    return param - grad[0]


def foreign(param, grad):
    return param - ("x" + grad)


def text_argument(param, grad):
    return param - maximum(grad, "x")


def unknown_name(param, grad):
    return param - learning_rate * grad  # noqa: F821


@pytest.mark.parametrize(
    ("function", "said", "at"),
    [
        (branch, "comparison of element values", "grad > 0"),
        (truth, "branch on element values", "return param if grad else grad"),
        (scalar_equality, "comparison of a per-step scalar", "lr == 0"),
        (power, "write x * x for a square", "grad**2"),
        (concrete, "sqrt, abs, sign, minimum, maximum by their bare names", "math.sqrt(grad)"),
        (indexed, "index only tuples", "grad[0]"),
        (foreign, "TypeError: can only concatenate", '"x" + grad'),
        (text_argument, "in maximum()", 'maximum(grad, "x")'),
        (unknown_name, "NameError: name 'learning_rate'", "learning_rate"),
    ],
)
def test_a_mistake_is_shown_with_its_line_and_carets(function, said, at):
    with pytest.raises(RuleError) as caught:
        trace(rule(function))
    message, place, line, carets = str(caught.value).split("\n")
    assert said in message
    assert f"rule {function.__name__!r}" in message
    assert __file__ in place
    assert at in line
    if function is not truth:
        assert line[carets.index("^") : carets.rindex("^") + 1] == at


def test_a_wrong_argument_count_inside_is_shown_without_a_line_where_there_is_none():
    source = "def f(param, grad):\n    return sqrt()\n"
    scope: dict[str, object] = {}
    exec(compile(source, "<nowhere>", "exec"), scope)
    with pytest.raises(RuleError, match="<nowhere>:2"):
        trace(rule(scope["f"]))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (lambda param, grad, m: param, "got 1 values"),
        (lambda param, grad, m: (param, m, grad), "got 3 values"),
        (lambda param, grad, m: (param, 0.0), "for the new m, got 0.0"),
        (lambda param, grad, m: None, "got 1 values"),
    ],
)
def test_what_it_returns_is_checked(body, said):
    @rule
    def returns(param, grad, m=zeros):
        return body(param, grad, m)

    with pytest.raises(RuleError, match="returns") as caught:
        trace(returns)
    assert said in str(caught.value)


def test_a_scalar_without_a_value_names_the_hyperparameters():
    uniform = trace(adamw).uniforms[-1]
    with pytest.raises(RuleError, match=r"division by zero with .*step=0; change the hyper-parameters"):
        evaluate(uniform, {"lr": 1e-3, "betas": (0.9, 0.99), "step": 0})
