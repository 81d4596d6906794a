"""Where the source comes from, where its nodes are, and what its names stand for."""
# ruff: noqa: F821

import importlib.util
import linecache
import math
import sys

import pytest

from shardstep.optim.adam import adam
from shardstep.rules.diagnostics import RuleErrors
from shardstep.rules.language import inline, rule, zeros
from shardstep.rules.parse import parse
from shardstep.rules.syntax import Assign, Foreign, names_read, to_text
from tests.rules import elsewhere, mistakes

LIST = [1.0, (2, 3)]


def failure(wrong):
    with pytest.raises(RuleErrors) as caught:
        parse(wrong)
    return caught.value


def in_notebook(source, name="cell", file="<ipython-input-1>", **scope):
    """As a notebook defines functions: the source is in linecache only."""
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {"rule": rule, "inline": inline, "zeros": zeros, **scope}
    exec(compile(source, file, "exec"), scope)
    return scope[name]


def text_at(span):
    assert span.line == span.end_line
    return linecache.getline(span.file, span.line)[span.column : span.end_column]


def test_the_tree_of_a_small_rule():
    source = """\
@rule
def cell(param, grad, m=zeros, *, lr=0.1, fast=False):
    \"\"\"A docstring is not part of it.\"\"\"
    for i in range(3):
        m += lr ** 2
    if fast and not lr < 1:
        x, y = -m, f(grad, k=m.T)[0]
    else:
        pass
    return (param if fast else True), m
"""
    assert (
        to_text(parse(in_notebook(source)))
        == """\
function cell(param, grad, m, lr, fast)
  for @ 4:4
    name i @ 4:8
    number 3 @ 4:19
    assign @ 5:8
      name m @ 5:8
      binary add @ 5:8
        name m @ 5:8
        binary pow @ 5:13
          name lr @ 5:13
          number 2 @ 5:19
  if @ 6:4
    logic and @ 6:7
      name fast @ 6:7
      not @ 6:16
        compare lt @ 6:20
          name lr @ 6:20
          number 1 @ 6:25
    assign unpacked @ 7:8
      name x @ 7:8
      name y @ 7:11
      group @ 7:15
        negate @ 7:15
          name m @ 7:16
        entry @ 7:19
          call f @ 7:19
            name grad @ 7:21
            transpose @ 7:29
              name m @ 7:29
          number 0 @ 7:34
  return @ 10:4
    group @ 10:11
      conditional @ 10:12
        name fast @ 10:21
        name param @ 10:12
        number True @ 10:31
      name m @ 10:38
"""
    )


def test_columns_are_those_of_the_file_however_far_in_and_in_characters():
    class Inside:
        @staticmethod
        def make():
            @rule
            def nested(param, grad, μ=zeros):
                """Less indented
                than the code."""
                μ = μ + grad  # å
                långt = μ * grad
                return param - långt, μ  # fmt: skip

            return nested

    function = parse(Inside.make())
    names = [name for statement in function.body for name in names_read(statement)]
    assert [text_at(name.span) for name in names] == [name.name for name in names]
    assert {name.name for name in names} == {"param", "grad", "μ", "långt"}
    assert names[0].span.file == __file__


def test_tabs_and_semicolons_keep_their_columns():
    function = parse(in_notebook("if True:\n\t@rule\n\tdef cell(param, grad):\n\t\tx = grad; return param - x\n"))
    assert [text_at(name.span) for statement in function.body for name in names_read(statement)][-2:] == ["param", "x"]


def test_adam_spans_cover_what_was_written():
    first = parse(adam).body[1].then[0]
    assert isinstance(first, Assign)
    assert text_at(first.value.span) == "param * (1 - lr * weight_decay)"


def module_from(path, source):
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = "from shardstep.rules import rule\n\n@rule\ndef imported(param, grad):\n    return param - 0.5 * grad\n"


def test_a_file_edited_after_its_import_is_never_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "rules_of_a_user.py"
    module = module_from(path, SOURCE)
    assert parse(module.imported).name == "imported"
    for edited in ("0.25", "1.0", "grad"):
        path.write_text(SOURCE.replace("0.5", edited) + "\n" * len(edited), encoding="utf-8")
        (mistake,) = failure(module.imported).diagnostics
        assert mistake.code == "E00"
        assert "is not that of the function" in mistake.message
    for moved in ("# a line more\n" + SOURCE, "", "def imported(", '"""', SOURCE.replace("def", "if")):
        path.write_text(moved, encoding="utf-8")
        assert [d.code for d in failure(module.imported).diagnostics] == ["E00"]
    path.write_text(SOURCE + "\n\n\nother = 1\n", encoding="utf-8")
    assert parse(module.imported).name == "imported"


def test_without_source_it_says_so():
    scope = {"rule": rule}
    exec(compile("@rule\ndef lost(param, grad):\n    return param - grad\n", "<nowhere>", "exec"), scope)
    (mistake,) = failure(scope["lost"]).diagnostics
    assert str(mistake) == (
        "E00 <nowhere>:1:1: the source text cannot be had; define the function in a file or in a notebook"
    )


def test_another_decorator_is_refused():
    def harmless(function):
        return function

    @rule
    @harmless
    def decorated(param, grad):
        return param - grad

    (mistake,) = failure(decorated).diagnostics
    assert (mistake.code, mistake.source_line.strip()) == ("E27", "@harmless")


def test_names_are_resolved_through_closure_and_globals():
    local, pair = 2.5, (1, (True, 3.0))

    @inline
    def helper(x):
        return x * local

    @rule
    def captures(param, grad):
        a = helper(grad) * local + pair[0] + LIST[0] + math.pi + elsewhere.halved(grad) + elsewhere.HALF
        b = sqrt(grad) + mistakes.TABLE + math.nothing + nobody + math + unset + len
        return param - a - b

    captured = parse(captures).captured
    unset = 1.0
    del unset
    assert {name: captured[name] for name in ("local", "pair", "LIST", "math.pi", "elsewhere.HALF")} == {
        "local": 2.5,
        "pair": (1, (True, 3.0)),
        "LIST": (1.0, (2, 3)),
        "math.pi": math.pi,
        "elsewhere.HALF": 0.5,
    }
    assert captured["helper"] is helper
    assert captured["elsewhere.halved"] is elsewhere.halved
    assert {name: found.described for name, found in captured.items() if isinstance(found, Foreign)} == {
        "mistakes.TABLE": "of type dict",
        "math.nothing": "'nothing' of the module math",
        "math": "the module math",
        "len": "Python's own len",
    }
    assert not {"sqrt", "nobody", "unset", "param"} & captured.keys()


def test_the_nearest_name_is_meant():
    LIST = 7.0

    @rule
    def hides(param, grad):
        return param - LIST * grad

    assert parse(hides).captured == {"LIST": 7.0}


def test_the_languages_functions_win_over_captured_names():
    sqrt = 3.0
    assert "sqrt" not in parse(rule(with_root(sqrt))).captured


def with_root(sqrt):
    def rooted(param, grad):
        return param - sqrt(grad)

    return rooted
