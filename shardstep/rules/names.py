"""Names and where their values go: what may be assigned, what is never used, what is returned in which place.

Looks at one syntax tree at a time, without types. Whether a name is defined where it is read is `meaning`'s to see.
"""

from collections.abc import Sequence

from shardstep.rules.diagnostics import Collector
from shardstep.rules.language import RESERVED, WORDS, Inline, Rule
from shardstep.rules.syntax import Assign, Expression, For, Function, Group, If, Name, Return, Statement, names_read


def check_names(definition: Rule | Inline, tree: Function, mistakes: Collector) -> None:
    """Tell ``mistakes`` about each name of ``tree`` that is put to a use it does not have."""
    names = _Names(definition if isinstance(definition, Rule) else None, mistakes)
    names.check(tree)
    if not len(mistakes):  # else what uses a value may have been left out of the tree
        names.check_uses(tree)


class _Names:
    def __init__(self, rule: Rule | None, mistakes: Collector) -> None:
        self._rule = rule
        self._mistakes = mistakes
        self._arrays = ("param", *rule.states) if rule else ()
        self._later: dict[str, Name] = {}

    def check(self, tree: Function) -> None:
        self._targets(tree.body)
        self._returns(tree.body, at_end=True)

    def check_uses(self, tree: Function) -> None:
        self._before(tree.body, frozenset(), told=True)

    def _targets(self, body: Sequence[Statement]) -> None:
        for statement in body:
            match statement:
                case Assign(targets=targets):
                    for name in targets:
                        self._target(name)
                case If(then=then, otherwise=otherwise):
                    self._targets(then)
                    self._targets(otherwise)
                case For(target=target, body=inside):
                    self._target(target)
                    self._targets(inside)

    def _target(self, node: Name) -> None:
        name = node.name
        if (name in WORDS and name not in self._arrays) or name in RESERVED:
            text = f"the name {name!r} is the language's own"
            self._mistakes.add("E28", node.span, text, "give the value another name")
        elif self._rule and name == "grad":
            text = "expected the gradient to stay as it is, got an assignment to it"
            self._mistakes.add("E16", node.span, text, "give the value another name: direction = -grad")
        elif self._rule and name in self._rule.hyperparameters:
            text = f"expected the hyper-parameter {name!r} to stay as it is, got an assignment to it"
            self._mistakes.add("E17", node.span, text, "give the value another name")

    def _returns(self, body: Sequence[Statement], at_end: bool) -> None:
        for position, statement in enumerate(body):
            match statement:
                case Return() if not at_end or position < len(body) - 1:
                    text = "expected one return, at the end of the function, got one before it"
                    hint = "assign the value under the if, and return it at the end"
                    self._mistakes.add("E01", statement.span, text, hint)
                case Return(value=Group(items=items)):
                    self._in_place([item.name if isinstance(item, Name) else None for item in items], items)
                case If(then=then, otherwise=otherwise):
                    self._returns(then, False)
                    self._returns(otherwise, False)
                case For(body=inside):
                    self._returns(inside, False)

    def _in_place(self, names: list[str | None], items: Sequence[object]) -> None:
        """A state that is returned twice, or states that are returned in each other's places."""
        states = self._arrays[1:]
        for position, name in enumerate(names):
            own = self._arrays[position] if position < len(self._arrays) else None
            item = items[position]
            if name not in states or name == own or not isinstance(item, Name):
                continue
            if names.count(name) > 1:
                text = f"the state {name!r} is returned twice, here in the place of {own!r}"
                self._mistakes.add("E19", item.span, text, f"return the new {own}")
            elif own in states and own in names:
                text = f"the state {name!r} is returned in the place of {own!r}"
                self._mistakes.add("E19", item.span, text, f"return {', '.join(self._arrays)} in this order")

    # Values that nobody uses: a walk from the end, with the names whose values are still wanted.

    def _before(self, body: Sequence[Statement], wanted: frozenset[str], told: bool) -> frozenset[str]:
        for statement in reversed(body):
            match statement:
                case Return(value=value):
                    wanted = _read(value)
                case Assign(targets=targets, value=value):
                    for name in targets:
                        if told and name.name not in wanted and not name.name.startswith("_"):
                            self._unused(name)
                        self._later[name.name] = name
                    wanted = (wanted - {name.name for name in targets}) | _read(value)
                case If(test=test, then=then, otherwise=otherwise):
                    later = dict(self._later)
                    inside = self._before(then, wanted, told)
                    self._later = later
                    wanted = inside | self._before(otherwise, wanted, told) | _read(test)
                case For(target=target, bounds=bounds, body=inside_loop):
                    again = wanted | self._before(inside_loop, wanted, told=False)
                    inside = self._before(inside_loop, again, told) - {target.name}
                    wanted = again | inside | frozenset(name for bound in bounds for name in _read(bound))
        return wanted

    def _unused(self, node: Name) -> None:
        name, later = node.name, self._later.get(node.name)
        if name in self._arrays and later is not None and later is not node:
            text = f"{name!r} is stored twice, here and in line {later.span.line}, and not read in between"
            self._mistakes.add("E19", node.span, text, "give the first value another name, or use it")
        elif name in self._arrays:
            self._mistakes.add("E14", node.span, f"this value of {name!r} is never used", f"return {name}")
        else:
            hint = "delete it, use it, or begin its name with _"
            self._mistakes.add("E14", node.span, f"the value of {name!r} is never used", hint)


def _read(node: Expression) -> frozenset[str]:
    return frozenset(name.name for name in names_read(node))
