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
from shardstep.rules.binding import Binding, stored_arrays
from shardstep.rules.check import check
from shardstep.rules.check import to_text as types_to_text
from shardstep.rules.ir import Product, Program, Steps, Sweep, Turn, Unit, to_text
from shardstep.rules.language import GIVEN, Rule
from shardstep.rules.locality import locality, runs_in_steps
from shardstep.rules.lower import lower, program_of
from shardstep.rules.parse import parse
from shardstep.rules.passes import compile_phases, compile_truths, cut, cut_steps, drop_dead, specialise, stages
from shardstep.rules.scalars import expression
from shardstep.rules.trace_values import Line, first_non_finite, trace_values

STAGES: Final = ("parse", "check", "ir", "passes", "llvm", "asm", "triton")
COMPUTE: Final = torch.float32


def show(rule: Rule, stage: str, hypers: Mapping[str, object]) -> str:
    """One stage of ``rule``, computing in float32. ``hypers`` replace its defaults, and ``step`` and ``ndim``, which
    are 2 else.

    Raises RuleErrors if the rule is wrong, ConfigError for an unknown stage or hyper-parameter.
    """
    if hypers:
        complete(rule, hypers)  # the first stages do not need them, but a wrong name is wrong there too
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
    return "\n".join([*told, _culprit(lines, source) or "every value is finite"]) + "\n"


def explain(rule: Rule, values: Mapping[str, float], hypers: Mapping[str, object], compute: torch.dtype) -> str | None:
    """Which line of ``rule`` makes the first infinity or NaN of one element, if any does; all values are given."""
    return _culprit(trace_values(_taken(rule, hypers), values, hypers, compute), rule.function.__code__.co_filename)


def _taken(rule: Rule, hypers: Mapping[str, object]) -> Program:
    """What ``rule`` does with these hyper-parameters: an infinity in a branch that is not taken is nobody's fault."""
    program = program_of(rule)
    return drop_dead(specialise(program, compile_truths(program)(hypers)))


def complete(rule: Rule, given: Mapping[str, object]) -> dict[str, object]:
    """All hyper-parameters: those given, then the defaults. Raises ConfigError for unknown and missing ones.

    Those that are there by themselves are of the second step of a 1 × 1 matrix of float32.
    """
    if unknown := given.keys() - rule.hyperparameters.keys() - set(GIVEN):
        names = ", ".join([*rule.hyperparameters, *GIVEN])
        raise ConfigError(
            f"expected hyper-parameters of {rule.name!r} ({names}), got {', '.join(sorted(unknown))}; correct the name"
        )
    by_itself = {"step": 2, "ndim": 2, "machine_eps": torch.finfo(COMPUTE).eps, "rows": 1, "columns": 1}
    hypers = {**by_itself, **rule.hyperparameters, **given}
    if missing := [name for name, value in hypers.items() if value is None]:
        raise ConfigError(
            f"expected values for {', '.join(missing)} of {rule.name!r}, which have no default; give them"
        )
    return hypers


def _passes(rule: Rule, hypers: Mapping[str, object]) -> str:
    program = program_of(rule)
    after = stages(program, compile_truths(program)(complete(rule, hypers)), COMPUTE)
    told = [f"--- after {name}\n{to_text(made)}" for name, made in after]
    if runs_in_steps(program):
        return "\n".join([*told, _steps(cut_steps(after[-1][1]))])
    if locality(program)[0] == "matrix":
        return "\n".join(told)
    phases = cut(after[-1][1])
    for number, phase in enumerate(phases.phases):
        given = [f"s{i} = {expression(phases.program, n)}\n" for i, n in enumerate(phase.scalars)]
        for i, vector in enumerate(phase.vectors):
            what = f"anchors of {expression(phases.program, vector.number)}"
            given.append(f"v{i} = {what if vector.anchors else expression(phases.program, vector.number)}\n")
        told.append(f"--- phase {number}\n{''.join(given)}{to_text(phase.body)}")
    return "\n".join(told)


def _steps(steps: Steps) -> str:
    told = []
    for part, inside in (("head", steps.head), ("middle", steps.middle), ("tail", steps.tail)):
        for step in inside:
            if isinstance(step, Sweep):
                scalars = [f"s{i} = {expression(steps.program, n)}\n" for i, n in enumerate(step.phase.scalars)]
                told.append(f"--- {part}: a pass\n{''.join(scalars)}{to_text(step.phase.body)}")
            else:
                told.append(f"--- {part}: {_whole(steps, step)}\n")
    return "\n".join(told)


def _whole(steps: Steps, step: Product | Turn | Unit) -> str:
    def name(buffer: int, turned: bool = False) -> str:
        return steps.buffers[buffer].name + (".T" if turned else "")

    if isinstance(step, Unit):
        return f"{name(step.result)} = identity"
    if isinstance(step, Turn):
        return f"{name(step.result)} = {name(step.source, True)}"

    def scaled(text: str, scale: int | None) -> str:
        return text if scale is None else f"({expression(steps.program, scale)}) * {text}"

    how = ", in bfloat16" if steps.buffers[step.result].narrow else ""
    product = f"{name(step.left, step.left_turned)} @ {name(step.right, step.right_turned)}"
    if step.addend is not None:
        product = f"{scaled(f'({product})', step.alpha)} + {scaled(name(step.addend), step.beta)}"
    return f"{name(step.result)} = {product}{how}"


def _code(rule: Rule, stage: str, hypers: Mapping[str, object]) -> str:
    """Of every pass over memory; products are torch's."""
    program = program_of(rule)
    truths = compile_truths(program)(complete(rule, hypers))
    declared = [(array.name, array.dtype or COMPUTE) for state in program.states for array in stored_arrays(state)]
    stored = [("param", COMPUTE), ("grad", COMPUTE), *declared]
    if runs_in_steps(program):
        steps = cut_steps(stages(program, truths, COMPUTE)[-1][1])
        stored += [(b.name, torch.bfloat16 if b.narrow else COMPUTE) for b in steps.buffers.values()]
        phases = [step.phase for step in steps.all if isinstance(step, Sweep)]
    else:
        phases = list(compile_phases(program, truths, COMPUTE).phases)
    return "\n".join(_MAKE[stage](phase, Binding(COMPUTE, tuple(stored))) for phase in phases)


_MAKE: Final = {"llvm": llvm.to_llvm, "asm": llvm.to_assembly, "triton": triton.source}


def _instruction(line: Line, lines: list[Line]) -> str:
    """The operation on its arguments' values."""
    arguments = ", ".join(f"{lines[argument].value!r}" for argument in line.arguments)
    return f"{line.operation} {line.name}" if line.name else f"{line.operation}({arguments})"


def _culprit(lines: list[Line], source: str) -> str | None:
    bad = first_non_finite(lines)
    if bad is None:
        return None
    if bad.operation in ("load", "hyper"):
        return f"the first value that is not finite is given: {bad.name} = {bad.value!r}"
    where = f"line {bad.place.line}: {linecache.getline(source, bad.place.line).strip()}" if bad.place else "the rule"
    return f"the first value that is not finite, {_instruction(bad, lines)} = {bad.value!r}, is made in {where}"
