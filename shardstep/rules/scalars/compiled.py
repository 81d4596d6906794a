"""All the scalars of a phase as one Python function, for speed: it runs once per step, or once per tensor.

It assumes that all goes well. Where Python raises or a uniform value is not finite, `evaluate` works everything out
again and says what is wrong, or that nothing is. Nothing from outside enters the generated text but numbers, by
repr, and names that are identifiers, as string literals.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from shardstep.errors import RuleError
from shardstep.rules.ir import Instruction, Program
from shardstep.rules.scalars import arithmetic
from shardstep.rules.scalars.evaluate import evaluate
from shardstep.rules.scalars.wording import expression, where

Scalars: TypeAlias = Callable[[Mapping[str, object], Mapping[int, float]], tuple[float, ...]]
"""(hyper-parameters by name, values of reductions and counts by number) -> the scalars."""

_TEMPLATES: Final[Mapping[str, str]] = {
    "neg": "-{}",
    "abs": "abs({})",
    "sign": "sign({})",
    "sqrt": "sqrt({})",
    "rsqrt": "1.0 / sqrt({})",
    "exp": "exp({})",
    "log": "log({})",
    "tanh": "tanh({})",
    "bfloat16": "to_bfloat16({})",
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "mod": "{} % {}",
    "pow": "pow({}, {})",
    "minimum": "smaller({}, {})",
    "maximum": "larger({}, {})",
    "fma": "fused({}, {}, {})",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "and": "{} and {}",
    "or": "{} or {}",
    "not": "not {}",
    "where": "{1} if {0} else {2}",
    "choose": "{1} if {0} else {2}",
}
_SILENT: Final = frozenset({"add", "sub", "mul", "div", "mod", "fma", "bfloat16"})  # may overflow without an exception
_KNOWN: Final = frozenset({"numel", "rows", "columns", "sum", "max"})
_EXPECTED: Final = (ArithmeticError, ValueError, TypeError, LookupError, RuntimeError)
_NAMESPACE: Final[Mapping[str, object]] = {
    "__builtins__": {"abs": abs, "float": float, "bool": bool},
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "tanh", "pow", "isfinite", "inf", "nan")},
    **{name: getattr(arithmetic, name) for name in ("sign", "smaller", "larger", "fused", "to_bfloat16")},
    "expected": _EXPECTED,
}


def compile_scalars(program: Program, wanted: Sequence[int]) -> Scalars:
    """A function that gives the uniform and tensor values with the numbers ``wanted``, in that order.

    It means `evaluate`. Raises RuleError here if one of them is not the host's to compute.
    """
    numbers = _needed(program, wanted)
    lines = [f"v{number} = {_right_side(program, number)}" for number in numbers]
    watched = [n for n in numbers if program.instructions[n].operation in _SILENT and _is_uniform(program, n)]
    lines.append(f"good = isfinite({' + '.join(f'v{n}' for n in watched)})" if watched else "good = True")
    text = "\n".join(
        [
            "def scalars(hypers, known):",
            "    try:",
            *(f"        {line}" for line in lines),
            "    except expected:",
            "        good = False",
            f"    return ({''.join(f'v{n}, ' for n in wanted)}) if good else again(hypers, known)",
        ]
    )
    return _function(text, lambda hypers, known: evaluate(program, wanted, hypers, known), program.name)


def uniform_values(program: Program) -> list[int]:
    """The uniform values that an update needs, however its sums turn out."""
    found = {value for _, value in program.stores}
    for line in program.instructions:
        lazy = line.operation == "where" and line.type.is_single
        if line.type.shape != "uniform" and not lazy:
            found.update(line.arguments)
    return sorted(number for number in found if _is_uniform(program, number))


def _function(text: str, again: Scalars, name: str) -> Scalars:
    namespace = {**_NAMESPACE, "again": again}
    exec(compile(text, f"<scalars of the rule {name}>", "exec"), namespace)
    function: Scalars = namespace["scalars"]  # type: ignore[assignment]
    return function


def _needed(program: Program, wanted: Sequence[int]) -> list[int]:
    """``wanted`` and what they are made of, in the order of the program."""
    found: set[int] = set()
    stack = list(wanted)
    while stack:
        number = stack.pop()
        if number in found:
            continue
        found.add(number)
        line = program.instructions[number]
        if line.operation not in _KNOWN:
            stack += line.arguments
    return sorted(found)


def _is_uniform(program: Program, number: int) -> bool:
    return program.instructions[number].type.shape == "uniform"


def _right_side(program: Program, number: int) -> str:
    line = program.instructions[number]
    if not line.type.is_single or line.type.kind == "word":
        raise RuleError(
            f"{where(program, line)}: expected one number for all elements of a tensor, got "
            f"{expression(program, number)} ({line.type})"
        )
    if line.operation in _KNOWN or line.operation == "load":
        return f"float(known[{number}])"
    if line.operation == "const":
        return repr(line.attributes[0])
    if line.operation == "hyper":
        return _hyper(program, number, line)
    return _TEMPLATES[line.operation].format(*(f"v{argument}" for argument in line.arguments))


def _hyper(program: Program, number: int, line: Instruction) -> str:
    name, *entry = line.attributes
    if not str(name).isidentifier():
        raise RuleError(f"{where(program, line)}: expected an identifier for a hyper-parameter, got {name!r}")
    entries = f"[{int(entry[0])}]" if entry else ""
    return f"{'bool' if line.type.kind == 'bool' else 'float'}(hypers[{str(name)!r}]{entries})"
