"""From a checked rule to its program: runs the tree over instructions (see `meaning`).

Every instruction keeps its place in the file of the rule; what comes from a function of another file, the place of the
call. Nothing is simplified here but arithmetic on literals: that is the passes' work.
"""

from collections.abc import Sequence

from shardstep.errors import ShardstepError
from shardstep.rules.arithmetic import Source
from shardstep.rules.check import Checked, check
from shardstep.rules.ir import Builder, Hyper, Kind, Place, Program, Type, verify
from shardstep.rules.language import GIVEN, Hyperparameters, Rule
from shardstep.rules.meaning import Meaning
from shardstep.rules.syntax import Span


def program_of(rule: Rule) -> Program:
    """The verified program of ``rule``, with all hyper-parameters open. Raises RuleErrors if the rule is wrong."""
    return lower(check(rule))


def lower(checked: Checked) -> Program:
    """The program of a checked rule. A state that stays as it is gets no store."""
    rule = checked.rule
    instructions = _Instructions(checked)
    stores = tuple(
        (name, instructions.live(item, checked.tree.span))
        for name, item in instructions.run().items()
        if item != Source("load", name)
    )
    hypers = _hypers(rule.hyperparameters, [p.name for p in checked.tree.parameters if p.name in GIVEN])
    return verify(Program(rule.name, rule.declared, hypers, tuple(instructions.builder.instructions), stores))


def _hypers(hyperparameters: Hyperparameters, given: Sequence[str]) -> tuple[Hyper, ...]:
    hypers = [Hyper(n, len(d) if isinstance(d, tuple) else None) for n, d in hyperparameters.items()]
    return (*map(Hyper, given), *hypers)


class _Instructions(Meaning[int]):
    """A run over instructions, by their numbers."""

    def __init__(self, checked: Checked) -> None:
        super().__init__(checked.rule, checked.trees.get)
        shapes = {declared.name: declared.shape for declared in checked.rule.declared}
        self.builder = Builder({"param": "element", "grad": "element", **shapes})
        self._file = checked.tree.span.file

    def constant(self, value: float, span: Span) -> int:
        return self.builder.constant(value, "bool" if isinstance(value, bool) else "real", self._place(span))

    def load(self, name: str, span: Span) -> int:
        return self.builder.load(name, self._place(span))

    def hyper(self, name: str, index: int | None, kind: Kind, span: Span) -> int:
        return self.builder.hyper(name, index, kind, self._place(span))

    def emit(self, operation: str, arguments: Sequence[int], span: Span) -> int:
        return self.builder.emit(operation, *arguments, place=self._place(span))

    def type_of(self, value: int) -> Type:
        return self.builder.type_of(value)

    def wrong(self) -> int:
        raise ShardstepError(f"rule {self.rule.name!r} was checked, but has a mistake: please report this")

    def refuse(self, code: str, span: Span, message: str, hint: str) -> int:
        raise ShardstepError(f"rule {self.rule.name!r} was checked, but has a mistake ({message}): please report this")

    def _place(self, span: Span) -> Place:
        """In the rule's file: of ``span``, or of the innermost call from there."""
        spans = [*(call for _, call in self.calls), span]
        inside = next(s for s in reversed(spans) if s.file == self._file)
        return Place(inside.line, inside.column)
