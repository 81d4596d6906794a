"""What the names of a rule stand for that are neither its arguments nor its locals.

They are looked up once, when the rule is compiled: in the function's closure, then in its globals; never anywhere else.
"""

import builtins
import types
from typing import Any

from shardstep.rules.language import Inline, Rule
from shardstep.rules.syntax import Foreign


def resolve(function: types.FunctionType, dotted: str) -> Any:
    """What ``dotted`` (``decay`` or ``math.pi``) stands for, None if nothing.

    A number, a truth value, a tuple of them, a rule, an inline function, or Foreign for anything else.
    """
    first, *attributes = dotted.split(".")
    names = {**function.__globals__, **_closure(function)}
    if first not in names:
        return Foreign(f"Python's own {first}") if hasattr(builtins, first) else None
    found = names[first]
    for attribute in attributes:
        if not isinstance(found, types.ModuleType) or not hasattr(found, attribute):
            return Foreign(f"{attribute!r} of {_described(found)}")
        found = getattr(found, attribute)
    return usable(found)


def usable(found: object) -> Any:
    """The object itself if rules can use it, or Foreign."""
    if isinstance(found, bool | int | float | Rule | Inline):
        return found
    if isinstance(found, tuple | list):
        entries = tuple(map(usable, found))
        if not any(isinstance(entry, Foreign) for entry in entries):
            return entries
    return Foreign(_described(found))


def _closure(function: types.FunctionType) -> dict[str, object]:
    """The variables of the functions around it, those that have a value by now."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _described(found: object) -> str:
    if isinstance(found, types.ModuleType):
        return f"the module {found.__name__}"
    if isinstance(found, types.FunctionType):
        return "a Python function"
    return f"of type {type(found).__name__}"
