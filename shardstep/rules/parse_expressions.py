"""From Python's expressions to the rule's: the half of `parse` that has values.

All that rules do not have becomes a ``Wrong`` node and a mistake. Types and shapes are `check`'s.
"""

import ast
import types
from collections.abc import Callable
from typing import Any, Final

from shardstep.rules import syntax
from shardstep.rules.captured import resolve
from shardstep.rules.diagnostics import Collector
from shardstep.rules.language import WORDS
from shardstep.rules.source import Source
from shardstep.rules.syntax import Expression, Name, Wrong

_BINARY: Final = {
    "Add": "add", "Sub": "sub", "Mult": "mul", "Div": "div", "Mod": "mod", "Pow": "pow", "MatMult": "matmul",
}  # fmt: skip
_COMPARE: Final = {"Lt": "lt", "LtE": "le", "Gt": "gt", "GtE": "ge", "Eq": "eq", "NotEq": "ne"}
_EXPRESSIONS: Final = "rules have arithmetic, comparisons, and / or / not, a if c else b, calls and entries of tuples"


class ExpressionParser:
    """Reads the expressions of one function and gathers what its captured names stand for."""

    def __init__(self, source: Source, function: types.FunctionType, mistakes: Collector) -> None:
        self.source = source
        self.from_function = function
        self._mistakes = mistakes
        self.captured: dict[str, Any] = {}
        self.local_names = set(function.__code__.co_varnames) | set(function.__code__.co_cellvars)

    def refuse(self, code: str, node: ast.AST, message: str, hint: str) -> Wrong:
        span = self.source.span(node)
        self._mistakes.add(code, span, message, hint)
        return Wrong(span)

    def expression(self, node: ast.expr) -> Expression:
        read: Callable[[Any, syntax.Span], Expression] | None = getattr(self, f"_{type(node).__name__.lower()}", None)
        if read is None:
            return self.refuse("E01", node, f"expected an equation, got {word_for(node)}", _EXPRESSIONS)
        return read(node, self.source.span(node))

    def _constant(self, node: ast.Constant, span: syntax.Span) -> Expression:
        if isinstance(node.value, bool | int | float):
            return syntax.Number(span, node.value)
        if isinstance(node.value, str | bytes):
            hint = "choose between variants by flags: True or False"
            return self.refuse("E22", node, "expected a number, got text", hint)
        return self.refuse("E01", node, f"expected a real number, got {node.value!r}", "write a number")

    def _name(self, node: ast.Name, span: syntax.Span) -> Expression:
        return self._reference(node.id, span)

    def _reference(self, dotted: str, span: syntax.Span) -> Name:
        if dotted not in WORDS and dotted.partition(".")[0] not in self.local_names:
            found = resolve(self.from_function, dotted)
            if found is not None:
                self.captured[dotted] = found
        return Name(span, dotted)

    def _attribute(self, node: ast.Attribute, span: syntax.Span) -> Expression:
        dotted = dotted_name(node)
        if dotted is not None and dotted.partition(".")[0] not in self.local_names:
            return self._reference(dotted, span)
        if node.attr == "T":
            return syntax.Transpose(span, self.expression(node.value))
        hint = (
            f"write {node.attr}(x)" if node.attr in WORDS else "values have .T only; functions go by their bare names"
        )
        return self.refuse("E04", node, f"expected an equation, got the attribute {node.attr!r}", hint)

    def _call(self, node: ast.Call, span: syntax.Span) -> Expression:
        starred = [a for a in node.args if isinstance(a, ast.Starred)] + [k for k in node.keywords if k.arg is None]
        if starred:
            return self.refuse("E24", starred[0], "expected each argument by itself, got * or **", "write them out")
        function = self.expression(node.func)
        arguments = tuple(map(self.expression, node.args))
        keywords = tuple((k.arg, self.expression(k.value)) for k in node.keywords if k.arg is not None)
        if isinstance(function, Wrong):
            return function
        if not isinstance(function, Name):
            return self.refuse("E04", node.func, "expected the name of a function before (", _EXPRESSIONS)
        return syntax.Call(span, function.name, arguments, keywords)

    def _binop(self, node: ast.BinOp, span: syntax.Span) -> Expression:
        return self.operation(node, node.op, self.expression(node.left), self.expression(node.right))

    def operation(self, node: ast.AST, operator: ast.operator, left: Expression, right: Expression) -> Expression:
        name = type(operator).__name__
        if name in _BINARY:
            return syntax.Binary(self.source.span(node), _BINARY[name], left, right)
        if name == "FloorDiv":
            return self.refuse("E10", node, "expected real arithmetic, got integer division", "write x / y")
        return self.refuse("E10", node, "expected real arithmetic, got a bit operation", "write and, or")

    def _unaryop(self, node: ast.UnaryOp, span: syntax.Span) -> Expression:
        operand = self.expression(node.operand)
        match node.op:
            case ast.USub():
                return syntax.Negate(span, operand)
            case ast.UAdd():
                return operand
            case ast.Not():
                return syntax.Not(span, operand)
            case _:
                return self.refuse("E10", node, "expected real arithmetic, got a bit operation", "write not")

    def _compare(self, node: ast.Compare, span: syntax.Span) -> Expression:
        left, right = self.expression(node.left), self.expression(node.comparators[0])
        if len(node.ops) > 1:
            return self.refuse("E22", node, "expected one comparison, got a chain", "write a < b and b < c")
        name = type(node.ops[0]).__name__
        if name not in _COMPARE:
            hint = "compare with < <= > >= == !="
            return self.refuse("E22", node, f"expected a comparison of numbers, got {word_for(node.ops[0])}", hint)
        return syntax.Compare(span, _COMPARE[name], left, right)

    def _boolop(self, node: ast.BoolOp, span: syntax.Span) -> Expression:
        name = "and" if isinstance(node.op, ast.And) else "or"
        return syntax.Logic(span, name, tuple(map(self.expression, node.values)))

    def _ifexp(self, node: ast.IfExp, span: syntax.Span) -> Expression:
        then, otherwise = self.expression(node.body), self.expression(node.orelse)
        return syntax.Conditional(span, self.expression(node.test), then, otherwise)

    def _subscript(self, node: ast.Subscript, span: syntax.Span) -> Expression:
        if isinstance(node.slice, ast.Slice | ast.Tuple):
            hint = "use sum, mean, row_mean or col_mean, or where(condition, x, y)"
            return self.refuse("E05", node, "expected an entry of a tuple, got a slice", hint)
        return syntax.Entry(span, self.expression(node.value), self.expression(node.slice))

    def _tuple(self, node: ast.Tuple, span: syntax.Span) -> Expression:
        return syntax.Group(span, tuple(map(self.expression, node.elts)))


def dotted_name(node: ast.expr) -> str | None:
    """``a.b.c`` as it is written, if it is nothing but names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted_name(node.value)) is not None:
        return f"{left}.{node.attr}"
    return None


def word_for(node: ast.AST) -> str:
    words = {
        "AsyncFor": "async", "AsyncWith": "async", "FunctionDef": "def", "ClassDef": "class", "NamedExpr": ":=",
        "ListComp": "a comprehension", "JoinedStr": "text", "ImportFrom": "import", "Is": "is", "IsNot": "is not",
        "In": "in", "NotIn": "not in", "Lambda": "lambda", "List": "a list", "Dict": "a dict", "Set": "a set",
        "Starred": "*",
    }  # fmt: skip
    return words.get(type(node).__name__, type(node).__name__.lower())
