"""Scalars worked out one by one, on demand: the meaning, and the place where their errors come from.

Only what is needed is computed: of ``where`` and ``choose`` on scalars, the condition and the branch it takes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shardstep.errors import RuleError
from shardstep.rules.ir import Instruction, Program
from shardstep.rules.scalars.arithmetic import ARITHMETIC, fault
from shardstep.rules.scalars.wording import expression, where


def evaluate(
    program: Program, numbers: Sequence[int], hypers: Mapping[str, object], known: Mapping[int, float]
) -> tuple[float, ...]:
    """The uniform and tensor values with these numbers; a truth value is a bool.

    ``hypers``: numbers, one-element tensors, or tuples of them, by name. ``known``: values by number, at least those
    of reductions and of the tensor's counts that are needed. Raises RuleError where a uniform value is not a number
    or too large; tensor values follow IEEE's rules.
    """
    values: dict[int, float] = dict(known)
    for number in numbers:
        _demand(program, number, hypers, values)
    return tuple(values[number] for number in numbers)


def _demand(program: Program, wanted: int, hypers: Mapping[str, object], values: dict[int, float]) -> None:
    stack = [wanted]  # no recursion: an unrolled loop makes long chains
    while stack:
        number = stack[-1]
        if number in values:
            stack.pop()
            continue
        needed = _needed(program.instructions[number], values)
        if missing := [argument for argument in needed if argument not in values]:
            stack += missing
        else:
            values[number] = _value(program, number, hypers, values)


def _needed(line: Instruction, values: Mapping[int, float]) -> tuple[int, ...]:
    if line.operation not in ARITHMETIC:
        return ()
    if line.operation not in ("where", "choose"):
        return line.arguments
    condition, yes, no = line.arguments
    if condition not in values:
        return (condition,)
    return (yes if values[condition] else no,)


def _value(program: Program, number: int, hypers: Mapping[str, object], values: Mapping[int, float]) -> float:
    line = program.instructions[number]
    if line.operation == "const":
        return line.attributes[0]  # type: ignore[return-value]  # verified: a float or a bool
    if line.operation == "hyper":
        return _hyper(program, number, hypers)
    if line.operation not in ARITHMETIC:
        raise RuleError(f"{where(program, line)}: expected the host to know the value of {line.operation}, got none")
    if line.operation in ("where", "choose"):
        condition, yes, no = line.arguments
        return values[yes if values[condition] else no]
    arguments = [values[argument] for argument in line.arguments]
    value = ARITHMETIC[line.operation](*arguments)
    if line.type.shape == "uniform" and (wrong := fault(line.operation, arguments, value)) is not None:
        raise no_value(program, number, wrong, hypers)
    return value


def no_value(program: Program, number: int, wrong: str, hypers: Mapping[str, object]) -> RuleError:
    """What to raise for a uniform value that is at `fault`."""
    given = ", ".join(f"{name}={value}" for name, value in hypers.items())
    return RuleError(
        f"{where(program, program.instructions[number])}: expected the per-step scalar "
        f"{expression(program, number)} to have a value, got {wrong} with {given or 'no hyper-parameters'}; "
        f"change the hyper-parameters"
    )


def _hyper(program: Program, number: int, hypers: Mapping[str, object]) -> float:
    line = program.instructions[number]
    name, *entry = line.attributes
    given: Any = hypers.get(str(name))
    try:
        value = given[entry[0]] if entry else given
        return bool(value) if line.type.kind == "bool" else float(value)
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise RuleError(
            f"{where(program, line)}: expected a number for the hyper-parameter {expression(program, number)}, "
            f"got {name}={given}; pass a number, or a tensor of one element"
        ) from error
