"""Every kind of mistake: its code, its place under the carets, and that one mistake is told once."""

import inspect
import linecache
import pickle
import re
import traceback
import types
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardstep
from shardstep.errors import RuleError, ShardstepError
from shardstep.optim.adam import adam
from shardstep.rules.check import check, to_text
from shardstep.rules.diagnostics import RuleErrors
from shardstep.rules.language import Rule, inline, rule, state, zeros
from shardstep.rules.lower import program_of
from shardstep.rules.parse import parse
from tests.rules import examples, mistakes

FUNCTIONS = [f for n, f in vars(mistakes).items() if inspect.isfunction(f) and f.__module__ == mistakes.__name__]
FUNCTIONS = [f for f in FUNCTIONS if f.__name__ != "helper"]


def expected(*functions):
    """(code, text under the carets) of each comment in the source."""
    lines = [line for function in functions for line in inspect.getsource(function).splitlines()]
    comments = [re.findall(r"(?:# |\| )(E\d\d): (.*?)(?= \| E|$)", line) for line in lines]
    return [pair for line in comments for pair in line]


def told(function):
    with pytest.raises(RuleErrors) as caught:
        check(rule(function))
    return caught.value


def under_carets(diagnostic):
    message, source, carets = str(diagnostic).split("\n")
    assert diagnostic.code in message
    return source[carets.index("^") : carets.rindex("^") + 1].rstrip().partition("  #")[0]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_each_mistake_is_told_once_with_its_code_and_place(function):
    called = {"recursive": [mistakes.again], "inside_a_call": [mistakes.typo]}.get(function.__name__, [])
    want = expected(function, *(c.function for c in called))
    error = told(function)
    assert sorted((d.code, under_carets(d)) for d in error.diagnostics) == sorted(want), str(error)
    assert all(d.message and d.hint and d.file == mistakes.__file__ for d in error.diagnostics)


def test_every_code_has_a_rule_with_that_mistake():
    lines = inspect.getsource(mistakes)
    shown = set(re.findall(r"(?:# |\| )(E\d\d): ", lines))
    rooms = Path(shardstep.__file__).with_name("rules").rglob("*.py")
    told = {code for room in rooms for code in re.findall(r'"(E\d\d)"', room.read_text())}
    assert told - shown == {"E00"}  # in test_parse


def test_the_text_is_code_place_sentence_fix_line_and_carets():
    assert str(told(mistakes.number_as_condition)) == (
        f"""\
rule 'number_as_condition' has one mistake:
E23 {mistakes.__file__}:{line_of(mistakes.number_as_condition) + 1}:8: expected a condition, got a number; \
compare it: if weight_decay != 0
        if weight_decay:  # E23: weight_decay
           ^^^^^^^^^^^^"""
    )


def line_of(function):
    return function.__code__.co_firstlineno


def test_mistakes_are_in_the_order_of_lines_and_travel_between_processes():
    error = told(mistakes.wrong_arguments)
    assert [d.line for d in error.diagnostics] == sorted(d.line for d in error.diagnostics)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert isinstance(copy, RuleErrors)
    assert isinstance(copy, RuleError)
    assert (str(copy), copy.diagnostics) == (str(error), error.diagnostics)


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (mistakes.undefined, "did you mean 'grad'?"),
        (mistakes.undefined, "did you mean 'exp_avg' or"),
        (mistakes.foreign_calls, "write sqrt(x)"),
        (mistakes.foreign_calls, "did you mean 'sqrt'"),
        (mistakes.foreign_calls, "write minimum"),
        (mistakes.foreign_calls, "put @inline above its definition"),
        (mistakes.wrong_arguments, "call it as inner(param, grad, m, step, lr=0.1)"),
        (mistakes.stored_twice, "m' is stored twice, here and in line "),
        (mistakes.inside_a_call, f"(in the call of line {line_of(mistakes.inside_a_call) + 1})"),
    ],
)
def test_the_text_says_what_to_do(function, hint):
    assert hint in str(told(function))


def test_what_is_stored_twice_names_the_line_that_undoes_it():
    said = {d.message for d in told(mistakes.stored_in_branches).diagnostics}
    line = line_of(mistakes.stored_in_branches) + 5
    assert said == {f"'m' is stored twice, here and in line {line}, and not read in between"}


def test_a_value_that_the_next_round_of_a_loop_uses_is_used():
    @rule
    def carried(param, grad, *, flag=False):
        velocity = grad
        for _ in range(3):
            param = param - velocity
            if flag:
                velocity = velocity / 2
        return param

    assert check(carried).tree.name == "carried"


def test_a_rule_cannot_call_itself():
    @rule
    def itself(param, grad):
        return itself(param, grad)

    assert [d.code for d in failure(itself).diagnostics] == ["E25"]


def failure(wrong):
    with pytest.raises(RuleErrors) as caught:
        check(wrong)
    return caught.value


def from_text(source, name, **captured):
    """A rule whose source is known as a notebook's is."""
    file = f"<{name}>"
    lines = source.splitlines(keepends=True)
    linecache.cache[file] = (len(source), None, lines, file)
    scope = {"rule": rule, "inline": inline, "zeros": zeros, "state": state, **captured}
    exec(compile(source, file, "exec"), scope)
    return scope[name]


def test_a_rule_too_long_or_too_deep_is_told_and_not_run_out():
    doubling = "".join(
        f"@inline\ndef f{n}(x):\n    return f{n - 1}(x) + f{n - 1}(x)\n" if n else "@inline\ndef f0(x):\n    return x\n"
        for n in range(40)
    )
    calls = from_text(doubling + "@rule\ndef long(param, grad):\n    return param + f39(grad)\n", "long")
    assert [d.code for d in failure(calls).diagnostics] == ["E08"]
    sums = from_text("@rule\ndef deep(param, grad):\n    return param" + " + grad" * 700 + "\n", "deep")
    assert [d.code for d in failure(sums).diagnostics] == ["E08"]
    with pytest.raises(RuleErrors, match="E08"):
        parse(sums)


def test_types_are_told_for_each_name():
    assert to_text(check(adam)).splitlines()[3:6] == [
        f"{line_of(adam.function) + n}:4 {name}: real element"
        for n, name in ((34, "exp_avg"), (35, "exp_avg_sq"), (36, "second"))
    ]


# Whatever is written, the compiler says something, or compiles; it never breaks.

SOURCES = [Path(module.__file__).read_text(encoding="utf-8") for module in (examples, mistakes)]
FUNCTION = re.compile(r"(?:^@\w+\n)?^def .*?(?=^@|^def |\Z)", re.MULTILINE | re.DOTALL)
PIECES = [found.group() for source in SOURCES for found in FUNCTION.finditer(source)]
TOKENS = sorted({token for piece in PIECES for token in re.findall(r"\w+|[^\w\s]+|\s+", piece)})


@st.composite
def mutated(draw):
    """The source of a function with a few tokens changed."""
    tokens = re.findall(r"\w+|[^\w\s]+|\s+", draw(st.sampled_from(PIECES)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(tokens) - 1))
        tokens[place] = draw(st.sampled_from(["", tokens[place] * 2, *TOKENS]) | st.sampled_from(tokens))
    return "".join(tokens)


def is_ours_by_accident(error):
    """Whether code of the package raised another error than its own; the mutated text itself may raise any."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    return not isinstance(error, ShardstepError) and Path(shardstep.__file__).parent in Path(where).parents


@settings(max_examples=400)
@given(mutated())
def test_mutated_rules_raise_nothing_but_our_errors(source):
    scope = {**vars(mistakes), **vars(examples)}
    linecache.cache["<mutated>"] = (len(source), None, source.splitlines(keepends=True), "<mutated>")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile(source, "<mutated>", "exec"), scope)
        except Exception as error:
            if is_ours_by_accident(error):
                raise
            return
        for found in scope.values():
            function = found.function if isinstance(found, Rule) else found
            if isinstance(function, types.FunctionType) and function.__code__.co_filename == "<mutated>":
                compiles_or_tells(found)


def compiles_or_tells(found):
    try:
        program_of(found if isinstance(found, Rule) else rule(found))
        told = ()
    except RuleErrors as error:
        told = error.diagnostics
        assert told, "an error without a mistake"
    assert all(re.fullmatch(r"E\d\d", d.code) and d.message and d.hint for d in told)


@settings(max_examples=100)
@given(st.text(), st.integers(1, 3))
def test_random_text_raises_nothing_but_our_errors(text, line):
    source = "\n" * line + "def random(param, grad):\n    return param - grad\n"
    scope = {}
    exec(compile(source, "<random>", "exec"), scope)
    linecache.cache["<random>"] = (len(text), None, text.splitlines(keepends=True), "<random>")
    with pytest.raises(RuleErrors, match="E00"):
        check(rule(scope["random"]))
