"""Calls in a rule: which argument is whose, and what to say about a function that rules do not have."""

from collections.abc import Mapping, Sequence
from typing import Final

from shardstep.rules.arithmetic import Item, known
from shardstep.rules.diagnostics import nearest
from shardstep.rules.language import WORDS, Inline, Rule
from shardstep.rules.syntax import Call, Foreign, Function, Span

_INSTEAD: Final = {
    "min": "minimum", "max": "maximum", "amin": "minimum", "amax": "max_abs", "pow": "x ** n", "square": "x * x",
    "clamp": "clip", "absolute": "abs", "reciprocal": "1 / x", "matmul": "x @ y", "mm": "x @ y", "dot": "sum(x * y)",
    "log1p": "log(1 + x)", "expm1": "exp(x) - 1", "float": "x itself: all numbers are real", "int": "x itself",
    "add": "x + y", "sub": "x - y", "mul": "x * y", "div": "x / y", "addcmul": "fma", "addcdiv": "x + a * y / z",
}  # fmt: skip
_CHANCE: Final = frozenset(
    "rand randn random randint rand_like randn_like uniform normal gauss bernoulli dropout shuffle choice "
    "time time_ns perf_counter monotonic now getrandbits urandom seed".split()
)


def bind(tree: Function, items: Sequence[Item], keywords: Mapping[str, Item]) -> dict[str, Item] | str:
    """The value of each argument of ``tree``, or what is wrong with the call. Defaults are constants."""
    places = [parameter.name for parameter in tree.parameters if not parameter.keyword_only]
    if len(items) > len(places):
        return f"expected at most {len(places)} arguments by place in {tree.name}, got {len(items)}"
    bound = dict(zip(places, items, strict=False))
    for name, item in keywords.items():
        if name in bound:
            return f"expected one value for {name!r} of {tree.name}, got two"
        if all(parameter.name != name for parameter in tree.parameters):
            return f"{tree.name} has no argument {name!r}"
        bound[name] = item
    for parameter in tree.parameters:
        if parameter.name not in bound:
            if isinstance(parameter.default, Foreign | Rule | Inline):
                return f"expected a value for {parameter.name!r} of {tree.name}, got none"
            bound[parameter.name] = known(parameter.default, parameter.span)
    return bound


def refusal_of(node: Call, tree: Function) -> tuple[str, Span, str, str]:
    """Code, place, message and hint for a call of what cannot be called."""
    name = node.function
    if name in tree.local_names:
        return "E04", node.span, f"expected a function, got the value {name!r}", "write * to multiply"
    found, last = tree.captured.get(name), name.rpartition(".")[2]
    if last in _CHANCE and (found is None or isinstance(found, Foreign)):
        hint = "a rule gives the same bits on every rank and in every run: pass such a number as a hyper-parameter"
        return "E29", node.span, f"{name} does not give the same every time", hint
    if found is None and "." not in name and last not in _INSTEAD:
        hint = nearest(name, WORDS.keys() | _callable(tree)) or f"rules know {', '.join(sorted(WORDS))}"
        return "E04", node.span, f"the function {name!r} is not defined", hint
    return "E04", node.span, f"expected a function of the language, got {name}", _instead(last, found)


def _instead(name: str, found: object) -> str:
    if name in WORDS:
        return f"write {name}({', '.join(WORDS[name])})"
    if name in _INSTEAD:
        return f"write {_INSTEAD[name]}"
    if isinstance(found, Foreign) and found.described == "a Python function":
        return "put @inline above its definition"
    return f"rules know {', '.join(sorted(WORDS))}"


def _callable(tree: Function) -> set[str]:
    return {name for name, found in tree.captured.items() if isinstance(found, Rule | Inline)}
