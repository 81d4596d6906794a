"""Is a rule right: its names, kinds, shapes and outputs. Collects all mistakes and raises them together.

Runs the tree over types (see `meaning`). This room makes no instructions; it tells what type each name has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shardstep.rules import syntax
from shardstep.rules.arithmetic import Item, Source
from shardstep.rules.diagnostics import Collector, RuleErrors
from shardstep.rules.ir import OPERATIONS, Kind, State, Type
from shardstep.rules.ir.operations import join, result_type
from shardstep.rules.language import Inline, Rule
from shardstep.rules.meaning import EACH, MOST_EXPRESSIONS, Meaning, TooLong
from shardstep.rules.names import check_names
from shardstep.rules.parse import read, too_deep
from shardstep.rules.syntax import Function, Group, Return, Span, children

_SYMBOLS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "mod": "%", "pow": "**", "matmul": "@", "transpose": ".T",
    "neg": "-", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "row_sum": "row_mean",
    "column_sum": "col_mean", "max": "max_abs", "choose": "if",
}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """A rule without mistakes. ``trees``: its own syntax tree and those of all that it calls.

    ``types``: each name that gets a value, where, and what of.
    """

    rule: Rule
    trees: dict[Rule | Inline, Function]
    types: tuple[tuple[syntax.Name, Type], ...]

    @property
    def tree(self) -> Function:
        return self.trees[self.rule]


def check(rule: Rule) -> Checked:
    """The rule with its syntax trees and types. Raises RuleErrors with all of its mistakes."""
    mistakes = Collector(rule.name)
    trees = _Trees(mistakes)
    types = _Types(rule, trees, mistakes)
    try:
        types.check_outputs()
    except TooLong as error:
        text = f"the rule has more than {MOST_EXPRESSIONS} operations when its loops and calls are written out"
        mistakes.add("E08", error.span, text, "let loops run less often, or call less")
    except RecursionError:
        mistakes.extend([too_deep(rule)])
    mistakes.raise_if_any()
    return Checked(rule, trees.found, tuple(types.notes))


def to_text(checked: Checked) -> str:
    """One line for each name that gets a value, with its type."""
    return "".join(f"{n.span.line}:{n.span.column} {n.name}: {type_}\n" for n, type_ in checked.types)


class _Trees:
    """Reads each function once, and its names with it."""

    def __init__(self, mistakes: Collector) -> None:
        self.found: dict[Rule | Inline, Function] = {}
        self._missing: set[Rule | Inline] = set()
        self._mistakes = mistakes

    def __call__(self, definition: Rule | Inline) -> Function | None:
        if definition not in self.found and definition not in self._missing:
            self._read(definition)
        return self.found.get(definition)

    def _read(self, definition: Rule | Inline) -> None:
        try:
            tree = read(definition, self._mistakes)
        except RuleErrors as error:
            self._mistakes.extend(error.diagnostics)
            self._missing.add(definition)
            return
        self.found[definition] = tree
        check_names(definition, tree, self._mistakes)


class _Types(Meaning[Type | None]):
    """A run over types; None stands for what is wrong already."""

    def __init__(self, rule: Rule, trees: _Trees, mistakes: Collector) -> None:
        super().__init__(rule, trees)
        self.notes: list[tuple[syntax.Name, Type]] = []
        self._mistakes = mistakes
        arrays = (State("param"), State("grad"), *rule.declared)
        self._declared = {declared.name: declared for declared in arrays}

    def constant(self, value: float, span: Span) -> Type:
        return Type("bool" if isinstance(value, bool) else "real", "uniform")

    def load(self, name: str, span: Span) -> Type:
        return Type("real", self._declared[name].shape)

    def hyper(self, name: str, index: int | None, kind: Kind, span: Span) -> Type:
        return Type(kind, "uniform")

    def type_of(self, value: Type | None) -> Type | None:
        return value

    def wrong(self) -> None:
        return None

    def refuse(self, code: str, span: Span, message: str, hint: str) -> None:
        if self.calls:
            message += f" (in the call of line {self.calls[0][1].line})"
        self._mistakes.add(code, span, message, hint)

    def noted(self, name: syntax.Name, item: Item) -> None:
        if not isinstance(item, tuple) and not self.calls and (type_ := self.live(item, name.span)) is not None:
            self.notes.append((name, type_))

    def emit(self, operation: str, arguments: Sequence[Type | None], span: Span) -> Type | None:
        types = tuple(argument for argument in arguments if argument is not None)
        if len(types) < len(arguments):
            return None
        type_ = result_type(operation, types)
        if type_ is None:
            code = _code(operation, types)
            self.refuse(code, span, *_explained(code, operation, types))
            return None
        return Type(type_.kind, type_.shape)  # another object: `choose` knows a value by its identity

    def check_outputs(self) -> None:
        """Run the rule, and see whether each array can be stored what is returned for it."""
        outputs, tree = self.run(), self._trees(self.rule)
        for position, (name, item) in enumerate(outputs.items()):
            if tree is not None and tree.body and isinstance(end := tree.body[-1], Return):
                each = isinstance(end.value, Group) and len(end.value.items) == len(outputs)
                self._check_output(name, item, list(children(end.value))[position].span if each else end.value.span)

    def _check_output(self, name: str, item: Item, span: Span) -> None:
        if item == Source("load", name):
            self._check_unchanged(name, span)
            return
        type_, shape = self.live(item, span), self._declared[name].shape
        if type_ is None:
            return
        if type_.kind != "real":
            text = f"expected numbers for the new {name}, got truth values"
            self.refuse("E10", span, text, "write where(condition, 1.0, 0.0)")
        elif join([type_.shape, shape]) != shape:
            text = f"expected one number {EACH[shape]} for the new {name}, got one {EACH[type_.shape]}"
            self.refuse("E20", span, text, f"reduce it, or declare another shape: {name}=state(shape=...)")

    def _check_unchanged(self, name: str, span: Span) -> None:
        if name == "param":
            text = "expected a new value of param, got it as it came"
            self.refuse("E18", span, text, "assign it: param = param - lr * update")
        elif self._declared[name].start != "param":
            text = f"the state {name!r} never changes"
            self.refuse("E14", span, text, f"assign it, or leave {name} out of the arguments")


def _code(operation: str, types: Sequence[Type]) -> str:
    if tuple(type_.kind for type_ in types) != OPERATIONS[operation].takes:
        return "E10"
    on_host = OPERATIONS[operation].family == "reduction" and types[0].is_single
    return "E21" if on_host else "E20"


def _explained(code: str, operation: str, types: Sequence[Type]) -> tuple[str, str]:
    """Message and hint for an operation that cannot take ``types``."""
    name = _SYMBOLS.get(operation, operation)
    if code == "E10" and operation in ("and", "or", "not"):
        return f"expected truth values around {name!r}, got a number", "compare it: x != 0"
    if code == "E10" and operation == "where" and types[0].kind != "bool":
        return "expected a condition as the first argument of where, got a number", "compare it: x != 0"
    if code == "E10":
        return f"expected numbers for {name!r}, got a truth value", "write where(condition, 1.0, 0.0)"
    got = " and ".join(f"one number {EACH[type_.shape]}" for type_ in types if type_.kind == "real")
    if code == "E21":
        return f"expected values to reduce in {name!r}, got {got}", "use the number as it is"
    if operation == "mod":
        return f"expected numbers that are the same for all elements around '%', got {got}", "use where and comparisons"
    if operation == "identity":
        return f"expected a square matrix in {name!r}, got {got}", "give it what is like x @ x.T or x.T @ x"
    if operation in ("matmul", "transpose", "row_sum", "column_sum"):
        return f"expected matrices that fit in {name!r}, got {got}", "write it for param, grad or what has their shape"
    return f"expected values that fit together in {name!r}, got {got}", "reduce one of them, or transpose it"
