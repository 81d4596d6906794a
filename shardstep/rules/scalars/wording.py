"""A value as the rule wrote it: ``sqrt(1 - betas[1] ** step)``. For messages only."""

from typing import Final

from shardstep.rules.ir import Instruction, Program

_DEPTH: Final = 6  # of nested operations; what lies deeper is shown as …
_ATOM: Final = 10
_INFIX: Final[dict[str, tuple[str, int]]] = {
    "or": ("or", 1),
    "and": ("and", 2),
    "lt": ("<", 4),
    "le": ("<=", 4),
    "gt": (">", 4),
    "ge": (">=", 4),
    "eq": ("==", 4),
    "ne": ("!=", 4),
    "add": ("+", 5),
    "sub": ("-", 5),
    "mul": ("*", 6),
    "div": ("/", 6),
    "mod": ("%", 6),
    "pow": ("**", 8),
}
_PREFIX: Final[dict[str, tuple[str, int]]] = {"not": ("not ", 3), "neg": ("-", 7)}


def expression(program: Program, number: int) -> str:
    """The text of the value with this number."""
    return _text(program, number, _DEPTH)[0]


def where(program: Program, line: Instruction) -> str:
    """``rule 'adamw', line 12``, as far as it is known."""
    return f"rule {program.name!r}" + (f", line {line.place.line}" if line.place else "")


def _text(program: Program, number: int, depth: int) -> tuple[str, int]:
    """The text and how strongly it binds."""
    line = program.instructions[number]
    if not line.arguments:
        return _source(line)
    if depth == 0:
        return "…", _ATOM
    inner = [_text(program, argument, depth - 1) for argument in line.arguments]
    if line.operation in _INFIX:
        return _infix(line.operation, inner)
    if line.operation in _PREFIX:
        symbol, level = _PREFIX[line.operation]
        return symbol + _within(inner[0], level), level
    if line.operation == "choose":
        condition, yes, no = (_within(part, 1) for part in inner)
        return f"{yes} if {condition} else {no}", 0
    return f"{line.operation}({', '.join(text for text, _ in inner)})", _ATOM


def _source(line: Instruction) -> tuple[str, int]:
    match line.operation, line.attributes:
        case "const", (bool() as value,):
            return str(value), _ATOM
        case "const", (value,):
            text = repr(value).removesuffix(".0")
            return text, _INFIX["mul"][1] if text.startswith("-") else _ATOM
        case "hyper", (name, entry):
            return f"{name}[{entry}]", _ATOM
        case (("hyper" | "load"), (name,)):
            return str(name), _ATOM
    return line.operation, _ATOM


def _infix(operation: str, inner: list[tuple[str, int]]) -> tuple[str, int]:
    symbol, level = _INFIX[operation]
    tighter_left = operation == "pow" or level == 4
    left, right = _within(inner[0], level + tighter_left), _within(inner[1], level + (operation != "pow"))
    return f"{left} {symbol} {right}", level


def _within(part: tuple[str, int], level: int) -> str:
    text, own = part
    return text if own >= level else f"({text})"
