"""What a syntax tree means, written once: ``check`` runs it over types, ``lower`` over instructions.

Both branches of an ``if`` are run and merged by ``choose``; loops are unrolled; calls are run in place; everything in
Python's order. Who runs it says what an operation gives and what happens with a mistake; this room decides neither
types nor bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, TypeAlias, TypeVar

from shardstep.rules import syntax
from shardstep.rules.arithmetic import Arithmetic, Item, Known, Partial, Source, known
from shardstep.rules.calls import bind, refusal_of
from shardstep.rules.diagnostics import nearest
from shardstep.rules.ir import Shape
from shardstep.rules.language import GIVEN, WORDS, Inline, Rule
from shardstep.rules.syntax import Expression, Foreign, Function, Span, names_assigned

V = TypeVar("V")
Trees: TypeAlias = Callable[[Rule | Inline], Function | None]
Scope: TypeAlias = dict[str, Item]

MOST_ITERATIONS: Final = 64
MOST_EXPRESSIONS: Final = 20_000

EACH: Final[dict[Shape, str]] = {
    "uniform": "a step",
    "tensor": "for each tensor",
    "row": "for each row",
    "column": "for each column",
    "element": "for each element",
    "rr": "for each pair of rows",
    "cc": "for each pair of columns",
    "cr": "for each element of the transpose",
}
"""What there is one number of, for people."""


class TooLong(Exception):
    """The rule has more than MOST_EXPRESSIONS expressions when it is written out; ``span`` is where it passed them."""

    def __init__(self, span: Span) -> None:
        super().__init__(span)
        self.span = span


class Meaning(Arithmetic[V]):
    """One run of a rule. ``trees`` gives the syntax tree of it and of what it calls, None where there is none."""

    def __init__(self, rule: Rule, trees: Trees) -> None:
        super().__init__()
        self.rule = rule
        self.calls: list[tuple[Rule | Inline, Span]] = []
        self._trees = trees
        self._iterations = 1
        self._expressions = 0

    def noted(self, name: syntax.Name, item: Item) -> None:
        """A name got a value: for those who show them."""
        return

    def run(self) -> dict[str, Item]:
        """The new value of the param and of each state: the `Source` itself where it stays as it was."""
        tree = self._trees(self.rule)
        if tree is None:
            return {}
        names = ("param", *self.rule.states)
        returned = self._function(tree, self._inputs(tree))
        items = returned if isinstance(returned, tuple) else (returned,)
        if len(items) == len(names):
            return dict(zip(names, items, strict=True))
        if all(map(self.is_right, items)):
            text = f"expected the rule to return the new {', '.join(names)}, got {_count(len(items))}"
            self.refuse("E26", tree.body[-1].span, text, "return one for param and one for each state, in order")
        return {}

    def _inputs(self, tree: Function) -> Scope:
        scope: Scope = {name: Source("load", name) for name in ("param", "grad", *self.rule.states)}
        for name, default in self.rule.hyperparameters.items():
            if isinstance(default, tuple):
                scope[name] = tuple(Source("hyper", name, index) for index in range(len(default)))
            else:
                scope[name] = Source("hyper", name, kind="bool" if isinstance(default, bool) else "real")
        scope.update((p.name, Source("hyper", p.name)) for p in tree.parameters if p.name in GIVEN)
        return scope

    def _function(self, tree: Function, scope: Scope) -> Item:
        """What ``tree`` returns, its arguments being in ``scope``."""
        self._block(tree, tree.body, scope)
        if "return" not in scope:
            text = f"expected {tree.name} to return its values at its end, got no return there"
            return self.refuse("E26", tree.span, text, "end it with return")
        return self.wrong() if isinstance(scope["return"], Partial) else scope["return"]

    # Statements

    def _block(self, tree: Function, body: Sequence[syntax.Statement], scope: Scope) -> None:
        for statement in body:
            match statement:
                case syntax.Assign(targets=targets, value=value):
                    item = self._expression(tree, value, scope)
                    items = self._unpacked(item, statement) if statement.unpacked else (item,)
                    for name, entry in zip(targets, items, strict=True):
                        scope[name.name] = entry
                        self.noted(name, entry)
                case syntax.If():
                    self._if(tree, statement, scope)
                case syntax.For():
                    self._for(tree, statement, scope)
                case syntax.Return(value=value):
                    scope["return"] = self._expression(tree, value, scope)

    def _unpacked(self, item: Item, statement: syntax.Assign) -> tuple[Item, ...]:
        count = len(statement.targets)
        if isinstance(item, tuple) and len(item) == count:
            return item
        if self.is_right(item):
            got = _count(len(item)) if isinstance(item, tuple) else "one number"
            text = f"expected {_count(count)} to unpack, got {got}"
            self.refuse("E26", statement.span, text, "write one name for each value")
        return (self.wrong(),) * count

    def _if(self, tree: Function, statement: syntax.If, scope: Scope) -> None:
        condition = self._condition(tree, statement.test, scope)
        then, otherwise = dict(scope), dict(scope)
        self._block(tree, statement.then, then)
        self._block(tree, statement.otherwise, otherwise)
        for name in {**then, **otherwise}:
            values = then.get(name, Partial()), otherwise.get(name, Partial())
            if any(value is not scope.get(name) for value in values):
                scope[name] = self.choose(condition, *values, statement.test.span)

    def _for(self, tree: Function, statement: syntax.For, scope: Scope) -> None:
        rounds = self._rounds(tree, statement, scope)
        if rounds is None:
            scope.update((name, self.wrong()) for name in names_assigned(statement.body))
            return
        around, self._iterations = self._iterations, self._iterations * max(1, len(rounds))
        for number in rounds:
            scope[statement.target.name] = Known(number, statement.target.span)
            self._block(tree, statement.body, scope)
        self._iterations = around

    def _rounds(self, tree: Function, statement: syntax.For, scope: Scope) -> range | None:
        """The numbers that a loop runs over, None if it cannot be written out."""
        bounds = [self._expression(tree, bound, scope) for bound in statement.bounds]
        span = statement.bounds[0].span
        numbers = [b.value for b in bounds if isinstance(b, Known) and type(b.value) is int]
        if len(numbers) < len(bounds) or 0 in numbers[2:]:
            if all(map(self.is_right, bounds)):
                text = "expected bounds that are whole numbers known when the rule is compiled"
                self.refuse("E07", span, text, "write a literal or a captured number: for _ in range(5)")
            return None
        rounds = range(*numbers)
        if len(rounds[: MOST_ITERATIONS + 1]) * self._iterations > MOST_ITERATIONS:
            text = f"expected at most {MOST_ITERATIONS} iterations in all, with the loops around it"
            self.refuse("E08", span, text, "a loop is written out: let it run less often")
            return None
        return rounds

    def _condition(self, tree: Function, test: Expression, scope: Scope) -> V:
        """The value that decides a branch: the same for all elements."""
        value = self.live(self._expression(tree, test, scope), test.span)
        type_ = self.type_of(value)
        if type_ is None or (type_.kind == "bool" and type_.shape == "uniform"):
            return value
        if type_.shape == "uniform":
            text = "expected a condition, got a number"
            return self.refuse("E23", test.span, text, "compare it: if weight_decay != 0")
        text = f"expected a condition that is one for the whole step, got one {EACH[type_.shape]}"
        return self.refuse("E06", test.span, text, "write where(condition, x, y)")

    # Expressions

    def _expression(self, tree: Function, node: Expression, scope: Scope) -> Item:
        self._expressions += 1
        if self._expressions > MOST_EXPRESSIONS:
            raise TooLong(node.span)
        if isinstance(node, syntax.Conditional):
            condition = self._condition(tree, node.test, scope)
            then, otherwise = (self._expression(tree, branch, scope) for branch in (node.then, node.otherwise))
            return self.choose(condition, then, otherwise, node.span)
        inside = [self._expression(tree, e, scope) for e in syntax.children(node) if isinstance(e, Expression)]
        match node:
            case syntax.Number(span=span, value=value):
                return Known(value, span)
            case syntax.Name():
                return self._name(tree, node, scope)
            case syntax.Negate(span=span):
                return self.negative(inside[0], span)
            case syntax.Binary(span=span, operator="pow"):
                return self.power(inside[0], inside[1], span)
            case syntax.Binary(span=span, operator=operation):
                return self.binary(operation, inside[0], inside[1], span)
            case syntax.Compare(span=span, operator=operation):
                return self.apply(operation, inside, span)
            case syntax.Logic(span=span, operator=operation):
                result = inside[0]
                for other in inside[1:]:
                    result = self.apply(operation, [result, other], span)
                return result
            case syntax.Not(span=span):
                return self.apply("not", inside, span)
            case syntax.Call():
                return self._call(tree, node, inside, scope)
            case syntax.Entry(span=span):
                return self._entry(inside[0], inside[1], span)
            case syntax.Transpose(span=span):
                return self.apply("transpose", inside, span)
            case syntax.Group():
                return tuple(inside)
        return self.wrong()

    def _name(self, tree: Function, node: syntax.Name, scope: Scope) -> Item:
        name, span = node.name, node.span
        if isinstance(scope.get(name), Partial):
            text = f"{name!r} is defined in one branch of an if only"
            return self.refuse("E03", span, text, "define it before the if, or in both branches")
        if name in scope:
            return _read_at(scope[name], span)
        if name in tree.local_names:
            text = f"{name!r} is read before it is defined"
            return self.refuse("E13", span, text, "define it above; a state is an argument: exp_avg=zeros")
        found = tree.captured.get(name)
        if name in WORDS or isinstance(found, Rule | Inline):
            text = f"expected a value, got the function {name}"
            return self.refuse("E04", span, text, "call it: write its arguments behind it in ( )")
        if isinstance(found, Foreign):
            text = f"{name!r} stands for nothing that rules can use, it is {found.described}"
            return self.refuse("E02", span, text, "capture a number, True or False, or a tuple of numbers")
        if found is None:
            hint = nearest(name, scope.keys() | WORDS.keys()) or "define it above, or make it an argument"
            return self.refuse("E02", span, f"the name {name!r} is not defined", hint)
        return known(found, span)

    def _entry(self, item: Item, index: Item, span: Span) -> Item:
        if not self.is_right(item) or not self.is_right(index):
            return self.wrong()
        if not isinstance(item, tuple):
            text = "expected a tuple before [, got what has no entries"
            return self.refuse("E05", span, text, "rules treat all elements alike: use sum, mean or where")
        if not isinstance(index, Known) or type(index.value) is not int:
            text = "expected an index that is a whole number known when the rule is compiled"
            return self.refuse("E07", span, text, "write a literal: betas[0]")
        if not -len(item) <= index.value < len(item):
            text = f"expected an index into {_count(len(item))}, got {index.value}"
            return self.refuse("E26", span, text, "count from 0")
        return _read_at(item[index.value], span)

    def _call(self, tree: Function, node: syntax.Call, inside: list[Item], scope: Scope) -> Item:
        name, count = node.function, len(node.arguments)
        if name in WORDS:
            if count == len(WORDS[name]) and not node.keywords:
                return self.word(name, inside, node.span)
            text = f"expected {name}({', '.join(WORDS[name])}), got {_count(len(inside))}"
            return self.refuse("E24", node.span, text, "give each by its place, without its name")
        called = tree.captured.get(name)
        if name in scope and not self.is_right(scope[name]):
            return self.wrong()
        if name in tree.local_names or not isinstance(called, Rule | Inline):
            return self.refuse(*refusal_of(node, tree))
        if called is self.rule or any(called is around for around, _ in self.calls):
            return self.refuse("E25", node.span, f"{name} calls itself", "write a loop: for _ in range(5)")
        keywords = {word: item for (word, _), item in zip(node.keywords, inside[count:], strict=True)}
        return self._run_in_place(called, inside[:count], keywords, node.span)

    def _run_in_place(self, called: Rule | Inline, items: list[Item], keywords: dict[str, Item], span: Span) -> Item:
        tree = self._trees(called)
        if tree is None:
            return self.wrong()
        bound = bind(tree, items, keywords)
        if isinstance(bound, str):
            return self.refuse("E24", span, bound, f"call it as {tree.name}({', '.join(map(str, tree.parameters))})")
        self.calls.append((called, span))
        result = self._function(tree, bound)
        self.calls.pop()
        return result


def _read_at(item: Item, span: Span) -> Item:
    return replace(item, span=span) if isinstance(item, Source) else item


def _count(number: int) -> str:
    return "one value" if number == 1 else f"{number} values"
