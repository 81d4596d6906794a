"""Which modules are units, and which unit owns which parameter.

A parameter belongs to the innermost unit around every module that uses it: one that is tied across units
belongs to the root unit, which is whole during the entire forward. Nothing here allocates or communicates.

Of the blocks that are found by themselves, small neighbours are one unit: a message costs about as much as a million
elements on their way. Their places stay block by block what they would be apart, so the bits do, too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn

from shardstep.config import Precision, Stage, StageChoice, UnitChoice, matches, resolve_stage
from shardstep.errors import ConfigError
from shardstep.layout import Layout, joined, lay_out
from shardstep.sharding.modules import is_keras, named_children, named_modules, own_parameters, weights

SMALL_NUMEL = 1 << 21
"""Neighbours of together at most so many elements are one unit."""


class Part(NamedTuple):
    """A space that is joined with others: its number among all of a model's, were none joined, and what it has."""

    number: int
    blocks: int
    tensors: int


@dataclass(frozen=True)
class SpacePlan:
    """A flat space to be made: its layout, and its parameters in slot order. ``parts``: the spaces that it joins."""

    layout: Layout
    parameters: list[nn.Parameter]
    precision: Precision
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class UnitPlan:
    """A unit to be made. The root unit comes first and is named ''. ``modules``: one, or small ones in their order."""

    name: str
    modules: list[nn.Module]
    stage: Stage
    spaces: list[SpacePlan] = field(default_factory=list)


def plan_units(
    model: nn.Module,
    units: UnitChoice | None,
    stage: StageChoice,
    precision_of: Callable[[nn.Parameter], Precision | None],
    rule_of: Callable[[nn.Parameter], int],
) -> list[UnitPlan]:
    """Cut ``model`` into units, in the order in which its modules are registered.

    ``precision_of``: None for a parameter that is taken as it is. ``rule_of`` numbers the rules that update parameters:
    a space has one of both.
    """
    modules = {"": model, **{name: module for name, module in _chosen(model, units) if name}}
    if isinstance(stage, Mapping):
        _check_stages(stage, list(modules))
    owned = _parameters_by_unit(model, modules)
    plans, count = list[UnitPlan](), 0
    for name, module in modules.items():
        if not owned[name] and name:
            continue
        spaces = []
        for number, plan in enumerate(_spaces(owned[name], precision_of, rule_of), start=count):
            spaces.append(replace(plan, parts=(Part(number, plan.layout.blocks, len(plan.parameters)),)))
        count += len(spaces)
        plans.append(UnitPlan(name, [module], resolve_stage(stage, name, module), spaces))
    return plans if units is not None else [plans[0], *_joined(plans[1:], rule_of)]


def _check_stages(stage: Mapping[str, int], names: list[str]) -> None:
    """A pattern that matches no unit is a typing mistake, which another pattern may hide."""
    for pattern in stage:
        if not any(matches(name, pattern) for name in names):
            raise ConfigError(
                f"expected each pattern of stage to match a unit, but {pattern!r} matches none of {names[:5]}"
                f"{' …' if len(names) > 5 else ''}; patterns are the units' dotted names, with '*' for one part"
            )


def _joined(plans: list[UnitPlan], rule_of: Callable[[nn.Parameter], int]) -> Iterator[UnitPlan]:
    """The same units with small neighbours of one stage as one."""
    together: list[UnitPlan] = []
    for plan in plans:
        if together and not _may_be_one([*together, plan]):
            yield _as_one(together, rule_of)
            together = []
        together.append(plan)
    if together:
        yield _as_one(together, rule_of)


def _may_be_one(plans: list[UnitPlan]) -> bool:
    spaces = [space for plan in plans for space in plan.spaces]
    noisy = any(space.precision.rounding == "stochastic" for space in spaces)  # by the place in a space of their own
    small = sum(space.layout.numel for space in spaces) <= SMALL_NUMEL
    return small and not noisy and all(plan.stage == plans[0].stage for plan in plans)


def _as_one(plans: list[UnitPlan], rule_of: Callable[[nn.Parameter], int]) -> UnitPlan:
    if len(plans) == 1:
        return plans[0]
    kinds: dict[tuple[bool, Precision, int], list[SpacePlan]] = {}
    for space in (space for plan in plans for space in plan.spaces):
        kinds.setdefault(_kind(space.parameters[0], space.precision, rule_of), []).append(space)
    spaces = [
        SpacePlan(
            joined([space.layout for space in members]),
            [parameter for space in members for parameter in space.parameters],
            members[0].precision,
            tuple(part for space in members for part in space.parts),
        )
        for _, members in sorted(kinds.items(), key=lambda item: item[0][0])
    ]
    modules = [module for plan in plans for module in plan.modules]
    return UnitPlan(f"{plans[0].name} to {plans[-1].name}", modules, plans[0].stage, spaces)


def _chosen(model: nn.Module, units: UnitChoice | None) -> Iterator[tuple[str, nn.Module]]:
    if units is None:
        yield from repeated_blocks(model)
        return
    choices = [] if callable(units) else _listed(units)
    wanted = units if callable(units) else _predicate(choices)
    found = [(name, module) for name, module in named_modules(model) if wanted(name, module)]
    if not found:
        raise ConfigError(
            f"expected units={units!r} to name at least one module of {type(model).__name__}, but none matches; "
            f"give name patterns such as 'blocks.*', module classes, or a function (name, module) -> bool"
        )
    for pattern in (choice for choice in choices if isinstance(choice, str)):
        if not any(matches(name, pattern) for name, _ in found):
            raise ConfigError(
                f"expected each pattern of units={units!r} to match a module of {type(model).__name__}, but "
                f"{pattern!r} matches none; patterns are dotted names, with '*' for one part"
            )
    yield from found


def _listed(units: object) -> list[str | type[nn.Module]]:
    """The patterns and classes that were given."""
    choices = list(units) if isinstance(units, Iterable) and not isinstance(units, str) else [units]
    known = [choice for choice in choices if isinstance(choice, str | type)]
    if len(known) != len(choices):
        raise ConfigError(f"expected units to be name patterns or module classes, got {choices!r}")
    return known


def _predicate(choices: list[str | type[nn.Module]]) -> Callable[[str, nn.Module], bool]:
    patterns = [choice for choice in choices if isinstance(choice, str)]
    classes = tuple(choice for choice in choices if isinstance(choice, type))
    return lambda name, module: isinstance(module, classes) or any(matches(name, pattern) for pattern in patterns)


def repeated_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost repeated blocks: children of one class, with modules of their own, of a list or sequence.

    In a model of Keras, whose layers are one list, others may lie between them.
    """

    def visit(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        children = [(f"{prefix}{name}", child) for name, child in named_children(module)]
        blocks = [child for _, child in children if any(True for _ in child.parameters())]
        if is_keras(module):
            blocks = [block for block in blocks if any(True for _ in named_children(block))]
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        listed = isinstance(module, nn.ModuleList | nn.Sequential) or is_keras(module)
        if listed and alike and any(True for _ in named_children(blocks[0])):
            yield from (pair for pair in children if any(pair[1] is block for block in blocks))
            return
        for name, child in children:
            yield from visit(f"{name}.", child)

    return visit("", model)


def _parameters_by_unit(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Each unit's own parameters, by their first fully qualified name."""
    names = {id(module): name for name, module in modules.items()}
    users: dict[int, set[str]] = {}

    def visit(module: nn.Module, unit: str) -> None:
        unit = names.get(id(module), unit)
        for parameter in own_parameters(module):
            users.setdefault(id(parameter), set()).add(unit)
        for _, child in named_children(module):
            visit(child, unit)

    visit(model, "")
    owned: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in modules}
    for name, parameter in weights(model):
        where = users[id(parameter)]
        owned[next(iter(where)) if len(where) == 1 else ""].append((name, parameter))
    return owned


def _spaces(
    named: list[tuple[str, nn.Parameter]],
    precision_of: Callable[[nn.Parameter], Precision | None],
    rule_of: Callable[[nn.Parameter], int],
) -> list[SpacePlan]:
    """One space for each (trained, precision, rule) among the parameters, trained ones first."""
    groups: dict[tuple[bool, Precision, int], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        if not parameter.is_floating_point():
            raise ConfigError(f"expected floating-point parameters, got {parameter.dtype} for {name!r}")
        kind = _kind(parameter, precision_of(parameter) or Precision.of(parameter.dtype), rule_of)
        groups.setdefault(kind, []).append((name, parameter))
    return [
        SpacePlan(
            lay_out(kind[1].params, [(name, tuple(parameter.shape)) for name, parameter in members]),
            [parameter for _, parameter in members],
            kind[1],
        )
        for kind, members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _kind(
    parameter: nn.Parameter, precision: Precision, rule_of: Callable[[nn.Parameter], int]
) -> tuple[bool, Precision, int]:
    """What the parameters of a space have in common: whether they are frozen, their dtypes, and their rule."""
    return not parameter.requires_grad, precision, rule_of(parameter) if parameter.requires_grad else 0
