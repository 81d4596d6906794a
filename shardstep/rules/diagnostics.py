"""What is said about a mistake in a rule: its code, one sentence, one fix, and the source line with carets.

This room knows no rule and no syntax; it only collects what others find, and shows it.
"""

import difflib
import linecache
from collections.abc import Iterable
from dataclasses import dataclass

from shardstep.errors import RuleError
from shardstep.rules.syntax import Span


@dataclass(frozen=True)
class Diagnostic:
    """One mistake. ``line`` counts from 1; ``column`` and ``end_column`` from 0, in characters, the end excluded.

    In the text the column counts from 1, as editors do.
    """

    code: str
    message: str
    hint: str
    file: str
    line: int
    column: int
    end_column: int
    source_line: str

    def __str__(self) -> str:
        said = f"{self.code} {self.file}:{self.line}:{self.column + 1}: {self.message}; {self.hint}"
        if not self.source_line:
            return said
        carets = "^" * max(1, self.end_column - self.column)
        tabs = "".join("\t" if c == "\t" else " " for c in self.source_line[: self.column])
        return f"{said}\n    {self.source_line}\n    {tabs}{carets}"


class RuleErrors(RuleError):
    """All mistakes of one rule, in the order of its lines."""

    def __init__(self, name: str, diagnostics: Iterable[Diagnostic]) -> None:
        self.name = name
        self.diagnostics = tuple(diagnostics)
        count = len(self.diagnostics)
        mistakes = "one mistake" if count == 1 else f"{count} mistakes"
        super().__init__("\n".join([f"rule {name!r} has {mistakes}:", *map(str, self.diagnostics)]))

    def __reduce__(self) -> tuple[type["RuleErrors"], tuple[str, tuple[Diagnostic, ...]]]:
        return type(self), (self.name, self.diagnostics)


class Collector:
    """Gathers the mistakes of one rule, each place once for each code."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: dict[tuple[str, str, int, int, int], Diagnostic] = {}

    def add(self, code: str, span: Span, message: str, hint: str) -> None:
        """``message``: expected what, got what. ``hint``: what to do."""
        self._keep(diagnose(code, span, message, hint))

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        for diagnostic in diagnostics:
            self._keep(diagnostic)

    def _keep(self, found: Diagnostic) -> None:
        place = (found.code, found.file, found.line, found.column, found.end_column)
        self._found.setdefault(place, found)

    def __len__(self) -> int:
        return len(self._found)

    def raise_if_any(self) -> None:
        """Raises RuleErrors with all that was added, if anything was."""
        if self._found:
            raise RuleErrors(self.name, sorted(self._found.values(), key=lambda d: (d.file, d.line, d.column, d.code)))


def diagnose(code: str, span: Span, message: str, hint: str) -> Diagnostic:
    """One mistake with its source line, as far as the source can be had."""
    source = linecache.getline(span.file, span.line).rstrip()
    end = span.end_column if span.end_line == span.line else len(source)
    return Diagnostic(code, message, hint, span.file, span.line, span.column, end, source)


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` or nothing."""
    close = difflib.get_close_matches(name, sorted(set(known)), n=2)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""
