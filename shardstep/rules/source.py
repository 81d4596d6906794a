"""From a function to the text it was written in: its definition as Python's tree, in the lines of the original file.

What is found is compared with the function itself, so that a file edited after it was imported is never compiled.
This room knows nothing of rules.
"""

import __future__

import ast
import dis
import inspect
import linecache
import re
import tokenize
import types
from dataclasses import dataclass
from typing import NoReturn, cast

from shardstep.rules.diagnostics import RuleErrors, diagnose
from shardstep.rules.syntax import Span

_FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
_ENCODING = frozenset("PUSH_NULL PRECALL CACHE NOP RESUME EXTENDED_ARG CALL CALL_FUNCTION CALL_METHOD".split())


@dataclass(frozen=True)
class Source:
    """``definition``: its lines count from ``before`` lines below the beginning of the file."""

    file: str
    lines: list[str]
    """Those of the file."""
    definition: ast.FunctionDef
    before: int

    def span(self, node: ast.AST) -> Span:
        """Where ``node``, an expression or a statement of the definition, is in the original file."""
        first, last = node.lineno + self.before, node.end_lineno + self.before  # type: ignore[attr-defined]
        start, end = node.col_offset, node.end_col_offset  # type: ignore[attr-defined]
        return Span(self.file, first, self._characters(first, start), last, self._characters(last, end))

    def _characters(self, line: int, offset: int) -> int:
        """Python counts columns in bytes of UTF-8."""
        text = self.lines[line - 1]
        return offset if text.isascii() else len(text.encode()[:offset].decode(errors="replace"))


def source_of(function: types.FunctionType) -> Source:
    """The definition of ``function``. Raises RuleErrors (E00) where it cannot be had, or is another one."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not 0 < code.co_firstlineno <= len(lines):
        _refuse(function, "the source text cannot be had", "define the function in a file or in a notebook")
    file, lines = lines, lines[code.co_firstlineno - 1 :]
    last = max(line for _, _, line in code.co_lines() if line is not None) - code.co_firstlineno
    definition = _definition(_indented(lines, last)) or _definition(_block(lines))
    if definition is None or not _is_that(definition, code):
        hint = "it may have been edited since it was imported, or rewritten by another decorator or tool: start again"
        _refuse(function, "the source text is not that of the function", hint)
    return Source(code.co_filename, file, definition, code.co_firstlineno - 2)


def argument_span(function: types.FunctionType, name: str) -> Span:
    """About where the argument ``name`` of ``function`` is written; the line of its definition if it is not found."""
    file, first = function.__code__.co_filename, function.__code__.co_firstlineno
    lines = linecache.getlines(file, function.__globals__)[first - 1 : first + 60]
    begin = next((i for i, line in enumerate(lines) if re.match(r"\s*(async\s+)?def\b|.*\blambda\b", line)), None)
    if begin is None:
        return Span(file, first, 0, first, 0)
    for i, line in enumerate(lines[begin:], begin):
        after = line.find("(") + 1 if i == begin else 0
        if name and (found := re.compile(rf"(?<![\w*])\*{{0,2}}{re.escape(name)}\b").search(line, after)):
            return Span(file, first + i, found.start(), first + i, found.end())
    line = lines[begin].rstrip()
    return Span(file, first + begin, len(line) - len(line.lstrip()), first + begin, len(line))


def _indented(lines: list[str], last: int) -> str:
    """The lines of the definition, as far as they are indented after the ``last`` that has code: nearly always all."""
    margin, end = len(lines[0]) - len(lines[0].lstrip()), last + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][: margin + 1].isspace()):
        end += 1
    return _alone(lines[:end])


def _block(lines: list[str]) -> str:
    """The lines of the definition, found by their tokens: that is slow."""
    try:
        return _alone(inspect.getblock(lines))
    except (SyntaxError, tokenize.TokenError):
        return _alone(lines)


def _alone(block: list[str]) -> str:
    """Below ``if``, so that they may be indented and keep their columns."""
    return "if 1:\n" + "".join(block) if block[0][:1].isspace() else "\n" + "".join(block)


def _definition(text: str) -> ast.FunctionDef | None:
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if body and isinstance(body[0], ast.If):
        body = body[0].body
    return body[0] if len(body) == 1 and isinstance(body[0], ast.FunctionDef) else None


def _is_that(definition: ast.FunctionDef, code: types.CodeType) -> bool:
    """Whether ``definition`` compiles to ``code``: the same instructions, names and constants."""
    bare = cast(ast.FunctionDef, ast.parse("def around(): pass").body[0])
    inner = ast.FunctionDef(**{**vars(definition), "decorator_list": [], "returns": None})
    bare.args.args = [ast.arg(name, lineno=1, col_offset=0) for name in code.co_freevars]
    outside = ast.Global([definition.name], lineno=1, col_offset=0)
    bare.body = [inner] if definition.name in code.co_freevars else [outside, inner]
    flags = code.co_flags & _FUTURES
    try:
        compiled = compile(ast.Module([bare], []), code.co_filename, "exec", flags=flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(_bytes(found) == _bytes(code) or _facts(found) == _facts(code) for found in _codes(compiled))


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """The functions defined in the function that is defined in ``code``."""
    outer = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [inner for found in outer for inner in found.co_consts if isinstance(inner, types.CodeType)]


def _bytes(code: types.CodeType) -> tuple[object, ...]:
    """What a function does, as it is encoded: the usual case, and the cheap one."""
    names = code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return *names, code.co_code, repr(code.co_consts)


def _facts(code: types.CodeType) -> list[object]:
    """What a function does, apart from how calls and jumps are encoded, which depends on the module around it."""
    facts: list[object] = [code.co_name, code.co_varnames, code.co_freevars]
    for line in dis.get_instructions(code):
        if line.opname not in _ENCODING:
            jump = line.opcode in dis.hasjrel or line.opcode in dis.hasjabs or isinstance(line.argval, types.CodeType)
            facts.append((line.opname.replace("METHOD", "ATTR"), "" if jump else repr(line.argval)))
    return facts


def _refuse(function: types.FunctionType, message: str, hint: str) -> NoReturn:
    where = Span(function.__code__.co_filename, function.__code__.co_firstlineno, 0, 0, 0)
    raise RuleErrors(function.__name__, [diagnose("E00", where, message, hint)])
