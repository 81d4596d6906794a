"""The page docs/optimizers.md: every optimizer that comes along, told by its rule. It formats, and decides nothing."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Final

import torch

from shardstep import optim
from shardstep.rules import Rule
from shardstep.rules.binding import stored_arrays
from shardstep.rules.compiled import CompiledRule, compile_rule
from shardstep.rules.ir import SQUARE, State
from shardstep.rules.meaning import EACH

HEAD: Final = """# Optimizers

Made by `shardstep rules docs` from the rules themselves. Each class has torch's name, arguments, states and numbers
where torch has it. Bytes are of state for each parameter, in float32 and with the defaults, for n × m matrices where it
depends on that; what an option adds is in brackets. Locality says how a rule may be sharded: see [rules.md](rules.md).
"""


_SIDES: Final = {"rr": "n/m", "cc": "m/n"}
"""The entries of a square state, for each element of an n × m parameter."""


def optimizer_classes() -> list[type[optim.Optimizer]]:
    """Those of `shardstep.optim` that have a rule, by name."""
    found = (getattr(optim, name) for name in sorted(optim.__all__, key=str.lower))
    return [kind for kind in found if isinstance(getattr(kind, "rule", None), Rule)]


def page() -> str:
    """The whole page, as Markdown."""
    kinds = optimizer_classes()
    rows = [f"| [{k.__name__}](#{k.__name__.lower()}) | {_locality(k.rule)} | {_bytes(k.rule)} |" for k in kinds]
    table = ["| optimizer | locality | bytes per parameter |", "|---|---|---|", *rows, ""]
    return "\n".join([HEAD, *table, *map(_section, kinds)])


def _section(kind: type[optim.Optimizer]) -> str:
    rule = kind.rule
    defaults = ", ".join(f"`{name}={value}`" for name, value in rule.hyperparameters.items())
    states = ", ".join(_state(rule, state) for state in rule.declared) or "none"
    facts = [
        f"- rule: `{rule.name}` in `{rule.function.__module__.replace('.', '/')}.py`",
        f"- hyper-parameters: {defaults}",
        f"- states: {states}",
        f"- bytes per parameter: {_bytes(rule)}",
        f"- locality: {_locality(rule)}",
    ]
    return "\n".join([f"## {kind.__name__}", "", *_markdown(rule.function.__doc__ or ""), "", *facts, ""])


def _markdown(text: str) -> Iterator[str]:
    """A docstring whose equations, indented after ``::``, become a fenced block."""
    fenced = False
    for line, following in itertools.pairwise([*inspect.cleandoc(text).splitlines(), ""]):
        if line.endswith("::"):
            yield line[:-1]
            fenced = True
            yield from ("", "```")
        elif not (fenced and not line and following.startswith("    ")):
            yield line.removeprefix("    ")
        if fenced and line.startswith("    ") and not following.startswith("    "):
            yield "```"
            fenced = False


def _locality(rule: Rule) -> str:
    return compile_rule(rule).locality


def _bytes(rule: Rule) -> str:
    compiled = compile_rule(rule)
    used = [state for state in compiled.states(rule.hyperparameters, 2) if state.shape == "element"]
    extra = [
        f"+{_size(state):.3g} with {option}"
        for state in rule.declared
        if (option := _option(compiled, rule, state)) is not None and state.shape == "element"
    ]
    squares = [(state.shape, _size(state)) for state in rule.declared if state.shape in SQUARE]
    sums = {shape: sum(size for own, size in squares if own == shape) for shape, _ in squares}
    terms = [f"{sum(map(_size, used)):.3g}"] if used or not sums else []
    terms += [f"{size:.3g} {_SIDES[shape]}" for shape, size in sums.items()]
    return " + ".join(terms) + (f" ({', '.join(extra)})" if extra else "")


def _size(state: State) -> float:
    """Bytes of an element, for float32 parameters."""
    return sum((array.dtype or torch.float32).itemsize / array.per for array in stored_arrays(state))


def _state(rule: Rule, state: State) -> str:
    start = "a copy of the parameter" if state.start == "param" else f"{state.start:g}"
    shape = "" if state.shape == "element" else f", one {EACH[state.shape]}"
    stored = f", in {state.dtype}" if state.dtype else ""
    option = _option(compile_rule(rule), rule, state)
    return f"`{state.name}` (from {start}{shape}{stored}{f', with {option}' if option else ''})"


def _option(compiled: CompiledRule, rule: Rule, state: State) -> str | None:
    """The hyper-parameter that brings a state which the defaults do not use; None for the others."""
    if state in compiled.states(rule.hyperparameters, 2):
        return None
    if state in compiled.states(rule.hyperparameters, 1):
        return "fewer than two dimensions"
    for name, default in rule.hyperparameters.items():
        changed = (not default) if isinstance(default, bool) else 0.5
        if not isinstance(default, tuple) and state in compiled.states({**rule.hyperparameters, name: changed}, 2):
            return name
    return None
