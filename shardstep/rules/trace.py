"""From a rule to its program: run the function once on symbols and keep what they recorded.

Every error leaves with the line of the rule that caused it. This room never sees a tensor or a concrete
hyper-parameter.
"""

import inspect
import linecache
import types
from typing import Any

from shardstep.errors import RuleError
from shardstep.rules.language import FUNCTIONS, Rule
from shardstep.rules.program import Hyperparameter, Program
from shardstep.rules.symbols import Element, Recorder, Scalar


def trace(rule: Rule) -> Program:
    """The program of ``rule``, with all of its hyper-parameters symbolic.

    Raises RuleError with the line at fault.
    """
    recorder = Recorder(inputs=2 + len(rule.states))
    arrays = [Element(recorder, index) for index in range(recorder.inputs)]
    function = _with_language(rule.function)
    try:
        returned = function(*arrays, **_scalars(rule))
    except Exception as error:
        raise RuleError(f"rule {rule.name!r}: {_said(error)}\n{_place(error, rule)}") from error
    outputs = _outputs(rule, returned)
    uniforms = tuple(recorder.uniforms.values())
    return Program(rule.name, rule.states, uniforms, tuple(recorder.instructions), outputs)


def _with_language(function: types.FunctionType) -> types.FunctionType:
    """The same function, seeing the language's functions as globals."""
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, **FUNCTIONS},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _scalars(rule: Rule) -> dict[str, Any]:
    scalars: dict[str, Any] = {}
    for name, default in rule.hyperparameters.items():
        if isinstance(default, tuple):
            scalars[name] = tuple(Scalar(Hyperparameter(name, index)) for index in range(len(default)))
        else:
            scalars[name] = Scalar(Hyperparameter(name))
    if "step" in inspect.signature(rule.function).parameters:
        scalars["step"] = Scalar(Hyperparameter("step"))
    return scalars


def _outputs(rule: Rule, returned: object) -> tuple[int, ...]:
    values = returned if isinstance(returned, tuple) else (returned,)
    names = ("param", *rule.states)
    if len(values) != len(names):
        raise RuleError(
            f"rule {rule.name!r} ({rule.place}): expected it to return the new {', '.join(names)}, "
            f"got {len(values)} values; return one for param and one for each state, in order"
        )
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Element):
            raise RuleError(
                f"rule {rule.name!r} ({rule.place}): expected element values for the new {name}, got "
                f"{_described(value)}; compute it from param, grad or a state"
            )
    return tuple(value.index for value in values)


def _described(value: object) -> str:
    return Scalar.kind if isinstance(value, Scalar) else repr(value)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, RuleError) else f"{type(error).__name__}: {error}"


def _place(error: Exception, rule: Rule) -> str:
    """``file:line``, the source line and carets under the expression of the rule that was running."""
    code, traceback, found = rule.function.__code__, error.__traceback__, None
    while traceback is not None:
        if traceback.tb_frame.f_code is code:
            found = traceback
        traceback = traceback.tb_next
    if found is None:
        return f"  {rule.place}"
    line, _, start, end = list(code.co_positions())[found.tb_lasti // 2]
    text = linecache.getline(code.co_filename, found.tb_lineno).rstrip()
    place = f"  {code.co_filename}:{found.tb_lineno}\n    {text}"
    if not text or line != found.tb_lineno or start is None or end is None:
        return place
    return f"{place}\n    {' ' * start}{'^' * max(1, min(end, len(text)) - start)}"
