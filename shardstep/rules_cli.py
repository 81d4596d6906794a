"""``shardstep rules list | docs | show | debug``: finds the rule, reads the values, prints what others make of them."""

import argparse
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardstep.errors import ConfigError
from shardstep.rules import Rule
from shardstep.rules.compiled import compile_rule
from shardstep.rules.show import STAGES, debug, show
from shardstep.rules_docs import optimizer_classes, page


def add_commands(commands: Any) -> None:
    """Add ``rules`` and its own commands to a parser's."""
    parser = commands.add_parser("rules", help="look into the compiler of update rules")
    own = parser.add_subparsers(required=True, metavar="command")
    listing = own.add_parser("list", help="the rules that come with shardstep, and how each may be sharded")
    listing.set_defaults(command=_list)
    docs = own.add_parser("docs", help="all of them as a page: equations, states, bytes (docs/optimizers.md)")
    docs.set_defaults(command=_docs)
    showing = own.add_parser("show", help="one stage of a rule on its way to a kernel")
    showing.add_argument("rule", help="the name of a rule, or path.py:name for one of yours (the file is run)")
    showing.add_argument("--stage", choices=STAGES, default="ir", help="how far (ir)")
    showing.add_argument("--flags", nargs="*", default=[], metavar="NAME=VALUE", help="hyper-parameters and step")
    showing.set_defaults(command=_show)
    debugging = own.add_parser("debug", help="run a rule on one element and print every line's values")
    debugging.add_argument("rule", help="as for show")
    debugging.add_argument(
        "values",
        nargs=argparse.REMAINDER,
        metavar="--NAME VALUE",
        help="param, grad, states, hyper-parameters, step (1, 1, 0, the defaults, 2)",
    )
    debugging.set_defaults(command=_debug)


def find_rule(name: str) -> Rule:
    """A rule of `shardstep.optim` by its name, or ``path.py:name``. Raises ConfigError if there is none."""
    path, colon, attribute = name.rpartition(":")
    if not colon:
        known = {rule.name: rule for rule in _known()}
        if name not in known:
            raise ConfigError(f"expected one of {', '.join(known)}, or path.py:name, got {name!r}; see rules list")
        return known[name]
    if not Path(path).is_file():
        raise ConfigError(
            f"expected a Python file before the colon of {name!r}, got no file {path!r}; correct the path"
        )
    found = runpy.run_path(path).get(attribute)
    if not isinstance(found, Rule):
        raise ConfigError(f"expected a function under @rule called {attribute!r} in {path}, got {found!r}")
    return found


def _known() -> list[Rule]:
    return [kind.rule for kind in optimizer_classes()]


def _list(_: argparse.Namespace) -> int:
    rows = [(r.name, compile_rule(r).locality, ", ".join(r.states) or "-", r.place) for r in _known()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _docs(_: argparse.Namespace) -> int:
    print(page(), end="")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    flags = dict(_assigned(flag) for flag in arguments.flags)
    print(show(find_rule(arguments.rule), arguments.stage, flags), end="")
    return 0


def _debug(arguments: argparse.Namespace) -> int:
    rule = find_rule(arguments.rule)
    given = _options(arguments.values)
    arrays = {"param", "grad", *rule.states}
    values = {name: _number(name, value) for name, value in given.items() if name in arrays}
    print(debug(rule, values, {name: value for name, value in given.items() if name not in arrays}), end="")
    return 0


def _options(words: Sequence[str]) -> dict[str, Any]:
    if len(words) % 2 or any(not word.startswith("--") for word in words[::2]):
        raise ConfigError(f"expected pairs of --name value, got {' '.join(words)!r}; as in --param 1.0 --grad nan")
    return {name[2:].replace("-", "_"): _value(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def _assigned(flag: str) -> tuple[str, Any]:
    name, equals, value = flag.partition("=")
    if not equals:
        raise ConfigError(f"expected NAME=VALUE in --flags, got {flag!r}; as in amsgrad=true")
    return name, _value(value)


def _value(text: str) -> bool | float | tuple[float, ...]:
    """true, false, a number, or several with commas between."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"expected a number, numbers with commas between, true or false, got {text!r}") from error
    return numbers if len(numbers) > 1 else numbers[0]


def _number(name: str, value: Any) -> float:
    if not isinstance(value, float):
        raise ConfigError(f"expected one number for {name}, got {value!r}; the debugger runs one element")
    return value
