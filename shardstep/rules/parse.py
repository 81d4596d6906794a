"""From Python's syntax to the rule's: every node keeps its place, and all that rules do not have is told at once.

Names that are neither arguments nor locals are resolved here, once, through the function's closure and globals. This
room knows no types and no shapes.
"""

import ast
from typing import Final

from shardstep.rules import syntax
from shardstep.rules.captured import usable
from shardstep.rules.diagnostics import Collector, Diagnostic, RuleErrors, diagnose
from shardstep.rules.language import Inline, Rule
from shardstep.rules.parse_expressions import ExpressionParser, dotted_name, word_for
from shardstep.rules.source import argument_span, source_of
from shardstep.rules.syntax import Expression, Function, Name, Statement, Wrong

_STATEMENTS: Final = "rules have assignments, if, for _ in range(n), and one return at the end"


def parse(rule: Rule | Inline) -> Function:
    """The syntax tree of ``rule``. Raises RuleErrors with every place that has no meaning in a rule."""
    mistakes = Collector(rule.name)
    function = read(rule, mistakes)
    mistakes.raise_if_any()
    return function


def read(definition: Rule | Inline, mistakes: Collector) -> Function:
    """The same, with ``Wrong`` nodes where it was wrong. Raises RuleErrors only where there is no tree to be had."""
    try:
        return _Parser(source_of(definition.function), definition.function, mistakes).function(definition.name)
    except RecursionError:
        raise RuleErrors(definition.name, [too_deep(definition)]) from None


def too_deep(definition: Rule | Inline) -> Diagnostic:
    """The mistake of an expression that even this compiler cannot take apart."""
    span = argument_span(definition.function, "")
    return diagnose("E08", span, "an expression of this function is nested too deeply", "give its parts names")


class _Parser(ExpressionParser):
    def function(self, name: str) -> Function:
        definition = self.source.definition
        if len(definition.decorator_list) > 1:
            text = f"expected one decorator, got {len(definition.decorator_list)}"
            self.refuse("E27", definition.decorator_list[1], text, "keep @rule or @inline only")
        parameters = tuple(self._parameters(definition.args))
        body = self._block(_without_docstring(definition.body))
        span = self.source.span(definition)
        return Function(name, span, parameters, body, frozenset(self.local_names), self.captured)

    def _parameters(self, arguments: ast.arguments) -> list[syntax.Parameter]:
        nodes = {a.arg: a for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        given = self.from_function.__defaults__ or ()
        defaults = dict(zip(reversed(positional), reversed(given), strict=False))
        defaults |= self.from_function.__kwdefaults__ or {}
        return [
            syntax.Parameter(
                name,
                self.source.span(node),
                name not in positional,
                usable(defaults[name]) if name in defaults else syntax.REQUIRED,
            )
            for name, node in nodes.items()
        ]

    # Statements

    def _block(self, body: list[ast.stmt]) -> tuple[Statement, ...]:
        return tuple(statement for node in body if (statement := self._statement(node)) is not None)

    def _statement(self, node: ast.stmt) -> Statement | None:
        span = self.source.span(node)
        match node:
            case ast.Pass():
                return None
            case ast.Assign(targets=[target]):
                return self._assign(span, target, self.expression(node.value))
            case ast.Assign():
                self.refuse("E01", node, "expected one name before =, got several", "write one assignment a line")
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                return self._assign(span, target, self.expression(value))
            case ast.AugAssign(target=ast.Name() as target):
                left = Name(self.source.span(target), target.id)
                result = self.operation(node, node.op, left, self.expression(node.value))
                return syntax.Assign(span, (left,), False, result)
            case ast.AugAssign(target=target):
                return self._assign(span, target, Wrong(span))
            case ast.If():
                test = self.expression(node.test)
                return syntax.If(span, test, self._block(node.body), self._block(node.orelse))
            case ast.For():
                return self._for(span, node)
            case ast.Return(value=ast.expr() as value):
                return syntax.Return(span, self.expression(value))
            case ast.Return():
                self.refuse("E26", node, "expected a value after return, got none", "return the new param and states")
                return syntax.Return(span, Wrong(span))
            case ast.Expr(value=ast.Call(func=function)):
                self._call_alone(function)
            case ast.Expr():
                text = "expected this value to be kept, got it thrown away: nothing in a rule changes anything in place"
                self.refuse("E01", node, text, "assign it to a name, or delete it")
            case _:
                self.refuse("E01", node, f"expected equations, got {word_for(node)}", _STATEMENTS)
        return self._nothing(node)

    def _nothing(self, node: ast.AST) -> Statement | None:
        """In the place of a statement that is wrong: the names that it would have defined, as wrong values."""
        span, found = self.source.span(node), list[Name]()
        for inside in ast.walk(node):
            if isinstance(inside, ast.Name) and isinstance(inside.ctx, ast.Store):
                found.append(Name(self.source.span(inside), inside.id))
            elif isinstance(inside, ast.FunctionDef | ast.ClassDef):
                found.append(Name(span, inside.name))
        return syntax.Assign(span, tuple(found), True, Wrong(span)) if found else None

    def _call_alone(self, function: ast.expr) -> None:
        code = "E16" if (dotted_name(function) or "").startswith("grad.") else "E04"
        text = f"expected equations, got a call of {ast.unparse(function)} whose result is not used"
        self.refuse(code, function, text, "a rule changes nothing in place and prints nothing: assign the result")

    def _assign(self, span: syntax.Span, target: ast.expr, value: Expression) -> Statement | None:
        unpacked = isinstance(target, ast.Tuple | ast.List)
        nodes = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
        if all(isinstance(node, ast.Name) for node in nodes) and nodes:
            names = tuple(Name(self.source.span(node), node.id) for node in nodes if isinstance(node, ast.Name))
            return syntax.Assign(span, names, unpacked, value)
        root = target
        while isinstance(root, ast.Subscript | ast.Attribute):
            root = root.value
        code = "E16" if isinstance(root, ast.Name) and root.id == "grad" else "E05"
        if isinstance(target, ast.Subscript | ast.Attribute):
            hint = "make a new value of all elements: new = where(condition, x, y)"
            self.refuse(code, target, "expected a name to assign to, got a part of an array", hint)
        else:
            text = f"expected names to assign to, got {word_for(target)}"
            self.refuse("E01", target, text, "write one name for each value")
        return self._nothing(target)

    def _for(self, span: syntax.Span, node: ast.For) -> Statement | None:
        call = node.iter
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "range":
            self.refuse("E07", call, "expected a loop over range(n), got another one", "write: for i in range(5):")
            return self._nothing(node)
        if call.keywords or not 1 <= len(call.args) <= 3:
            self.refuse("E24", call, "expected one to three bounds in range", "write: for i in range(5):")
            return self._nothing(node)
        if not isinstance(node.target, ast.Name) or node.orelse:
            self.refuse("E01", node.target, "expected a loop over one name, without else", "write: for i in range(5):")
            return self._nothing(node)
        target = Name(self.source.span(node.target), node.target.id)
        return syntax.For(span, target, tuple(map(self.expression, call.args)), self._block(node.body))


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return body[1:] if text else body
