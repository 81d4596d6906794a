"""The syntax tree of a rule: what was written, every node with where it was written. Pure data.

``parse`` makes it from Python's own tree, ``names`` and ``meaning`` walk it. It knows no types: they are ``check``'s.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final


@dataclass(frozen=True)
class Span:
    """A stretch of a source file: lines from 1, columns in characters from 0, the end excluded."""

    file: str
    line: int
    column: int
    end_line: int
    end_column: int


@dataclass(frozen=True)
class Node:
    """What all nodes have."""

    span: Span


class Expression(Node):
    """What has a value."""


@dataclass(frozen=True)
class Wrong(Expression):
    """Where a mistake was, already told: it has no meaning and causes no second mistake."""


@dataclass(frozen=True)
class Number(Expression):
    """A literal number or truth value."""

    value: float


@dataclass(frozen=True)
class Name(Expression):
    """An argument, a local name, or a captured one (``math.pi`` too)."""

    name: str


@dataclass(frozen=True)
class Negate(Expression):
    operand: Expression


@dataclass(frozen=True)
class Binary(Expression):
    """``operator``: add, sub, mul, div, mod, pow or matmul."""

    operator: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Compare(Expression):
    """``operator``: lt, le, gt, ge, eq or ne."""

    operator: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Logic(Expression):
    """``operator``: and, or."""

    operator: str
    operands: tuple[Expression, ...]


@dataclass(frozen=True)
class Not(Expression):
    operand: Expression


@dataclass(frozen=True)
class Conditional(Expression):
    """``then if test else otherwise``."""

    test: Expression
    then: Expression
    otherwise: Expression


@dataclass(frozen=True)
class Call(Expression):
    function: str
    arguments: tuple[Expression, ...]
    keywords: tuple[tuple[str, Expression], ...]


@dataclass(frozen=True)
class Entry(Expression):
    """``operand[index]``."""

    operand: Expression
    index: Expression


@dataclass(frozen=True)
class Transpose(Expression):
    """``operand.T``."""

    operand: Expression


@dataclass(frozen=True)
class Group(Expression):
    """``a, b, c``."""

    items: tuple[Expression, ...]


class Statement(Node):
    """What a body consists of."""


@dataclass(frozen=True)
class Assign(Statement):
    """``a = value``; or, where ``unpacked``, ``a, b = value``."""

    targets: tuple[Name, ...]
    unpacked: bool
    value: Expression


@dataclass(frozen=True)
class If(Statement):
    test: Expression
    then: tuple[Statement, ...]
    otherwise: tuple[Statement, ...]


@dataclass(frozen=True)
class For(Statement):
    """``for target in range(*bounds)``."""

    target: Name
    bounds: tuple[Expression, ...]
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Return(Statement):
    value: Expression


@dataclass(frozen=True)
class Foreign:
    """A captured object that rules cannot use; ``described`` says what it is."""

    described: str


REQUIRED: Final = Foreign("an argument without a default")


@dataclass(frozen=True)
class Parameter:
    """An argument of the function. ``default``: a number, a truth value, a tuple of them, or REQUIRED."""

    name: str
    span: Span
    keyword_only: bool
    default: Any = REQUIRED

    def __str__(self) -> str:
        return self.name if isinstance(self.default, Foreign) else f"{self.name}={self.default}"


@dataclass(frozen=True)
class Function:
    """A rule or an inline function. ``local_names``: its arguments, and all that is assigned somewhere in it.

    ``captured``: what other names mean: numbers, truth values, tuples of them, rules, inline functions, or `Foreign`.
    """

    name: str
    span: Span
    parameters: tuple[Parameter, ...]
    body: tuple[Statement, ...]
    local_names: frozenset[str]
    captured: Mapping[str, Any]


def children(node: Node) -> Iterator[Node]:
    """The nodes directly inside, in the order written."""
    for name in node.__match_args__:
        yield from _nodes(getattr(node, name))


def _nodes(value: object) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from _nodes(entry)


def names_read(node: Node) -> Iterator[Name]:
    """Every name whose value an expression uses."""
    if isinstance(node, Name):
        yield node
    for child in children(node):
        yield from names_read(child)


def names_assigned(body: Iterable[Statement]) -> Iterator[str]:
    """Every name that the statements give a value, with those inside."""
    for statement in body:
        match statement:
            case Assign(targets=targets):
                yield from (target.name for target in targets)
            case If(then=then, otherwise=otherwise):
                yield from names_assigned((*then, *otherwise))
            case For(target=target, body=inside):
                yield target.name
                yield from names_assigned(inside)


def to_text(function: Function) -> str:
    """The tree, one node a line, with where each was written."""
    lines = [f"function {function.name}({', '.join(parameter.name for parameter in function.parameters)})"]
    for statement in function.body:
        lines += _lines(statement, 1)
    return "\n".join(lines) + "\n"


def _lines(node: Node, depth: int) -> list[str]:
    said = [type(node).__name__.lower()]
    said += [_shown(field.name, getattr(node, field.name)) for field in fields(node)]
    line = " ".join(word for word in said if word)
    lines = [f"{'  ' * depth}{line} @ {node.span.line}:{node.span.column}"]
    for child in children(node):
        if isinstance(node, If) and child in node.otherwise[:1]:
            lines.append(f"{'  ' * depth}else")
        lines += _lines(child, depth + 1)
    return lines


def _shown(field: str, value: object) -> str:
    if field == "unpacked":
        return "unpacked" if value else ""
    return str(value) if isinstance(value, str | int | float) else ""
