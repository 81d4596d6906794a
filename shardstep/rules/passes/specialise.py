"""Branches: a rule is compiled once for each way that its ``if``s go, and a ``choose`` is the branch it takes.

before, with the truth of %0 given as false
            %0 = hyper maximize : bool uniform
            %1 = load grad : real element
            %2 = neg %1 : real element
            %3 = choose %0 %2 %1 : real element
            %4 = mul %3 %3 : real element
after       %0 = hyper maximize : bool uniform
            %1 = load grad : real element
            %2 = neg %1 : real element
            %3 = mul %1 %1 : real element

The branch keeps its own shape: where it is one number for all elements, what is made of it may become so too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Final, TypeAlias

from shardstep.errors import RuleError
from shardstep.rules.ir import Builder, Instruction, Program
from shardstep.rules.passes.rewrite import rewrite
from shardstep.rules.scalars import compile_scalars, evaluate
from shardstep.rules.scalars.wording import where

TruthFunction: TypeAlias = Callable[[Mapping[str, object]], tuple[bool, ...]]
"""Hyper-parameters by name, ``step`` among them -> the truth of each condition."""


_OPEN: Final = frozenset({"step", "rows", "columns"})
"""Hyper-parameters that are known for one update only."""


def conditions(program: Program) -> tuple[int, ...]:
    """The values that decide a ``choose``, each once, in the order in which they are first used."""
    found = (line.arguments[0] for line in program.instructions if line.operation == "choose")
    return tuple(dict.fromkeys(found))


def compile_truths(program: Program) -> TruthFunction:
    """Which way each condition goes, as a function fast enough to be asked at every step.

    One that only an untaken branch asks for is not evaluated, and is False.
    """
    if not conditions(program):
        return lambda hypers: ()
    function = compile_scalars(program, conditions(program))
    seen: dict[tuple[float, ...], tuple[bool, ...]] = {}

    def fast(hypers: Mapping[str, object]) -> tuple[bool, ...]:
        try:
            raw = function(hypers, {})
        except RuleError:  # perhaps in an untaken branch
            return _truths(program, hypers)
        if raw not in seen:
            seen[raw] = _truths(program, hypers)
        return seen[raw]

    return fast


def _truths(program: Program, hypers: Mapping[str, object]) -> tuple[bool, ...]:
    """The meaning of `compile_truths`."""
    found: dict[int, bool] = {}
    seen: set[int] = set()
    stack = [value for _, value in program.stores]
    while stack:
        number = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        line = program.instructions[number]
        if line.operation != "choose":
            stack += line.arguments
            continue
        condition, yes, no = line.arguments
        if condition not in found:
            found[condition] = bool(evaluate(program, (condition,), hypers, {})[0])
        stack.append(yes if found[condition] else no)
    return tuple(found.get(condition, False) for condition in conditions(program))


def used_arrays(program: Program, hypers: Mapping[str, object]) -> set[str]:
    """The arrays that are read or written at some step, of a matrix of some shape: branches on those
    go both ways.
    """
    return _used(program, hypers)[0]


def used_values(program: Program, hypers: Mapping[str, object]) -> set[int]:
    """The values that stores are made of, at some step and for some shape, without those that decide a ``choose``."""
    return _used(program, hypers)[1]


def fixed_conditions(program: Program) -> tuple[int, ...]:
    """Those `conditions` that are the same for every step and shape."""
    open_ = _made_of(program, _OPEN)
    return tuple(condition for condition in conditions(program) if condition not in open_)


def _used(program: Program, hypers: Mapping[str, object]) -> tuple[set[str], set[int]]:
    open_ = _made_of(program, _OPEN)

    def outcomes(values: Sequence[int]) -> Iterator[int]:
        """What the values may be: themselves, or what their branches give."""
        stack, seen = list(values), set[int]()
        while stack:
            number = stack.pop()
            line = program.instructions[number]
            if line.operation != "choose":
                yield number
            elif number not in seen:
                seen.add(number)
                condition, yes, no = line.arguments
                both = condition in open_
                stack += (yes, no) if both else (yes if evaluate(program, (condition,), hypers, {})[0] else no,)

    used, stack, seen = set[str](), list[int](), set[int]()
    for name, value in program.stores:
        changed = [n for n in outcomes([value]) if program.instructions[n].attributes != (name,)]
        used.update([name] if changed or name == "param" else [])
        stack += changed
    while stack:
        number = stack.pop()
        if number not in seen:
            seen.add(number)
            line = program.instructions[number]
            used.update([str(line.attributes[0])] if line.operation == "load" else [])
            stack += outcomes(line.arguments)
    return used, seen


def _made_of(program: Program, names: Set[str]) -> set[int]:
    """The values that depend on one of these hyper-parameters."""
    found: set[int] = set()
    for number, line in enumerate(program.instructions):
        if (line.operation == "hyper" and line.attributes[0] in names) or not found.isdisjoint(line.arguments):
            found.add(number)
    return found


def specialise(program: Program, truths: Sequence[bool]) -> Program:
    """The program for these truths of its `conditions`: it has no ``choose``.

    Raises RuleError where a reduction is left with one number for all elements.
    """
    decided = dict(zip(conditions(program), truths, strict=True))

    def change(builder: Builder, line: Instruction, arguments: tuple[int, ...]) -> int:
        if line.operation == "choose":
            return arguments[1] if decided[line.arguments[0]] else arguments[2]
        try:
            return builder.copy(line, arguments)
        except TypeError as error:
            raise RuleError(
                f"{where(program, line)}: expected element values in {line.operation} "
                f"whichever way the branches go, but {error}; compute it inside the branch"
            ) from error

    return rewrite(program, change)
