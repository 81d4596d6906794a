"""Every stage of a rule as text, like a compiler explorer; and a rule run on one element, line by line.

For people: `shardstep rules show` and `shardstep rules debug` print what is made here. Nothing here decides anything.
"""

import linecache
from collections.abc import Mapping
from typing import Final

import torch

from shardstep.errors import ConfigError
from shardstep.rules import syntax
from shardstep.rules.backends import llvm, triton
from shardstep.rules.binding import Binding, stored_dtype
from shardstep.rules.check import check
from shardstep.rules.check import to_text as types_to_text
from shardstep.rules.ir import Program, to_text
from shardstep.rules.language import Rule
from shardstep.rules.locality import locality, needs_whole_tensors
from shardstep.rules.lower import lower, program_of
from shardstep.rules.parse import parse
from shardstep.rules.passes import compile_phases, compile_truths, cut, drop_dead, specialise, stages, truths
from shardstep.rules.scalars import expression
from shardstep.rules.trace_values import Line, first_non_finite, trace_values

STAGES: Final = ("parse", "check", "ir", "passes", "llvm", "asm", "triton")
COMPUTE: Final = torch.float32


def show(rule: Rule, stage: str, hypers: Mapping[str, object]) -> str:
    """One stage of ``rule``, computing in float32; ``hypers`` replace its defaults, and ``step``, which is 2 else.

    Raises RuleErrors if the rule is wrong, ConfigError for an unknown stage or hyper-parameter.
    """
    match stage:
        case "parse":
            return syntax.to_text(parse(rule))
        case "check":
            checked = check(rule)
            return types_to_text(checked) + "{}: {}\n".format(*locality(lower(checked)))
        case "ir":
            return to_text(program_of(rule), places=True)
        case "passes":
            return _passes(rule, hypers)
        case "llvm" | "asm" | "triton":
            return _code(rule, stage, hypers)
    raise ConfigError(f"expected a stage among {', '.join(STAGES)}, got {stage!r}; choose one of them")


def debug(rule: Rule, values: Mapping[str, float], hypers: Mapping[str, object]) -> str:
    """Each line of ``rule`` with the values that it gives for one element, and which made the first infinity or NaN.

    ``values``: param, grad and states; those left out are 1 for param, 1 for grad, and 0. Raises as `show` does.
    """
    program = _taken(rule, complete(rule, hypers))
    given = {"param": 1.0, "grad": 1.0, **dict.fromkeys(rule.states, 0.0), **values}
    if unknown := values.keys() - program.shapes.keys():
        raise ConfigError(f"expected values for {', '.join(program.shapes)}, got one for {', '.join(sorted(unknown))}")
    lines = trace_values(program, given, complete(rule, hypers), COMPUTE)
    source = rule.function.__code__.co_filename
    told, last = [f"{rule.name} in {source}"], None
    for line in lines:
        if line.operation in ("load", "hyper"):
            told.append(f"  {line.name} = {line.value!r}")
            continue
        at = line.place.line if line.place else None
        if at != last and at is not None:
            told.append(f"{at:5}  {linecache.getline(source, at).strip()}")
        last = at
        told.append(f"         {_instruction(line, lines)} = {line.value!r}")
    return "\n".join([*told, _culprit(lines, source)]) + "\n"


def explain(rule: Rule, values: Mapping[str, float], hypers: Mapping[str, object], compute: torch.dtype) -> str:
    """Which line of ``rule`` makes the first infinity or NaN of one element; all values are given."""
    return _culprit(trace_values(_taken(rule, hypers), values, hypers, compute), rule.function.__code__.co_filename)


def _taken(rule: Rule, hypers: Mapping[str, object]) -> Program:
    """What ``rule`` does with these hyper-parameters: an infinity in a branch that is not taken is nobody's fault."""
    program = program_of(rule)
    return drop_dead(specialise(program, compile_truths(program)(hypers)))


def complete(rule: Rule, given: Mapping[str, object]) -> dict[str, object]:
    """All hyper-parameters: those given, then the defaults. Raises ConfigError for unknown and missing ones."""
    if unknown := given.keys() - rule.hyperparameters.keys() - {"step"}:
        names = ", ".join([*rule.hyperparameters, "step"])
        raise ConfigError(
            f"expected hyper-parameters of {rule.name!r} ({names}), got {', '.join(sorted(unknown))}; correct the name"
        )
    hypers = {"step": 2, **rule.hyperparameters, **given}
    if missing := [name for name, value in hypers.items() if value is None]:
        raise ConfigError(
            f"expected values for {', '.join(missing)} of {rule.name!r}, which have no default; give them"
        )
    return hypers


def _passes(rule: Rule, hypers: Mapping[str, object]) -> str:
    program = program_of(rule)
    after = stages(program, truths(program, complete(rule, hypers)), COMPUTE)
    told = [f"--- after {name}\n{to_text(made)}" for name, made in after]
    if needs_whole_tensors(program):
        return "\n".join(told)
    phases = cut(after[-1][1])
    for number, phase in enumerate(phases.phases):
        scalars = [f"s{i} = {expression(phases.program, n)}\n" for i, n in enumerate(phase.scalars)]
        told.append(f"--- phase {number}\n{''.join(scalars)}{to_text(phase.body)}")
    return "\n".join(told)


def _code(rule: Rule, stage: str, hypers: Mapping[str, object]) -> str:
    program = program_of(rule)
    phases = compile_phases(program, truths(program, complete(rule, hypers)), COMPUTE)
    declared = ((state.name, stored_dtype(state) or COMPUTE) for state in program.states)
    stored = (("param", COMPUTE), ("grad", COMPUTE), *declared)
    make = {"llvm": llvm.to_llvm, "asm": llvm.to_assembly, "triton": triton.source}[stage]
    return "\n".join(make(phase, Binding(COMPUTE, stored)) for phase in phases.phases)


def _instruction(line: Line, lines: list[Line]) -> str:
    """The operation on its arguments' values."""
    arguments = ", ".join(f"{lines[argument].value!r}" for argument in line.arguments)
    return f"{line.operation} {line.name}" if line.name else f"{line.operation}({arguments})"


def _culprit(lines: list[Line], source: str) -> str:
    bad = first_non_finite(lines)
    if bad is None:
        return "every value is finite"
    if bad.operation in ("load", "hyper"):
        return f"the first value that is not finite is given: {bad.name} = {bad.value!r}"
    where = f"line {bad.place.line}: {linecache.getline(source, bad.place.line).strip()}" if bad.place else "the rule"
    return f"the first value that is not finite, {_instruction(bad, lines)} = {bad.value!r}, is made in {where}"
