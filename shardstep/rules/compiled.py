"""A rule as optimizers see it: it updates segments, and says what it needs for that.

The last room that a rule flows through. It chooses the way that a rule goes, by its locality: `elementwise`, `jobs`,
`matrices` or `whole`. It never looks into a phase, and never knows where the parts of a tensor lie.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from shardstep.rules import noise
from shardstep.rules.backends.choice import back_end
from shardstep.rules.binding import stored_arrays
from shardstep.rules.elementwise import update_elements
from shardstep.rules.flags import compile_plainness
from shardstep.rules.hypers import Hypers, hypers_of
from shardstep.rules.ir import State
from shardstep.rules.jobs import update_by_tensor
from shardstep.rules.language import Rule
from shardstep.rules.locality import is_by_tensor, locality, runs_in_steps
from shardstep.rules.lower import program_of
from shardstep.rules.matrices import MatrixUpdate
from shardstep.rules.scalars import Scalars, compile_scalars, uniform_values
from shardstep.rules.variants import Variants
from shardstep.rules.whole import update_whole
from shardstep.types import Batch, Update


class CompiledRule:
    """Updates segments by one rule. Raises RuleErrors here if the rule is wrong."""

    def __init__(self, rule: Rule) -> None:
        self.program = program_of(rule)
        self.locality, self.reason = locality(self.program)
        self.is_plain = not is_by_tensor(self.program)
        """Whether every element is updated by itself, whatever tensor it is in."""
        self._is_plain_with = compile_plainness(self.program)
        self._scaled = any(len(stored_arrays(state)) > 1 for state in self.program.states)
        self._variants = Variants(self.program, back_end)
        in_steps = runs_in_steps(self.program)
        self._matrices = MatrixUpdate(self._variants.program_for, back_end) if in_steps else None
        self.is_shardable = self.locality != "matrix" or in_steps
        """Whether segments may be parts of tensors."""
        self._checks: dict[tuple[bool, ...], Scalars] = {}

    def is_plain_with(self, groups: Iterable[Hypers]) -> bool:
        """Whether every element is updated by itself with the flags of all these groups."""
        return all(map(self._is_plain_with, groups))

    def is_by_tensor_with(self, groups: Iterable[Hypers]) -> bool:
        """Whether each segment must be a part of one tensor, with these flags."""
        return self._scaled or not self.is_plain_with(groups)

    def states(self, hypers: Hypers, ndim: int) -> tuple[State, ...]:
        """The states that a param has with these flags, in order; the others are neither read nor written."""
        return self._variants.states(hypers, ndim)

    def update(self, batch: Batch, groups: Sequence[Hypers]) -> None:
        """Update every segment in place, by the hyper-parameters of its group.

        Collective where the rule makes sums over tensors, rows or columns. Raises ConfigError for arrays that are not
        as `Segment` says, RuleError if a per-step scalar has no value.
        """
        if self.is_plain or self.is_plain_with([groups[index] for index in {update.group for update in batch.updated}]):
            update_elements(self._variants, batch.segments, batch.stacks, groups)
            return
        if self.locality != "matrix":
            if self.locality == "factored":  # an empty tensor has no rows and columns
                batch = replace(batch, segments=[segment for segment in batch.segments if segment.param.numel()])
            update_by_tensor(self._variants, batch, groups)
            return
        self.check(batch.updated, groups)
        if self._matrices is not None:
            self._matrices.update(batch, groups)
            return
        for segment in batch.segments:
            update_whole(self._variants, segment, groups[segment.group])

    def check(self, updated: Iterable[Update], groups: Sequence[Hypers]) -> None:
        """Raise RuleError if a per-step scalar has no value in one of these updates."""
        key_of_noise = (0.0,) * noise.PIECES
        alike = {
            (one.group, one.step, one.shape if self.locality == "matrix" else len(one.shape)): one for one in updated
        }
        for group, step, shape in alike.values():
            hypers = {**hypers_of(groups[group], step, 1.0, shape, torch.float32), noise.KEY: key_of_noise}
            truths = self._variants.truths(hypers)
            if truths not in self._checks:
                program = self._variants.program_for(hypers, torch.float32)
                self._checks[truths] = compile_scalars(program, uniform_values(program))
            self._checks[truths](hypers, {})

    def moved_bytes(self, shape: tuple[int, ...], group: Hypers, compute: torch.dtype) -> tuple[int, int]:
        """Of a rule with matrix products: the bytes of an element that go to a tensor's owner, and that come back."""
        return (0, 0) if self._matrices is None else self._matrices.moved_bytes(shape, group, compute)


_COMPILED: "WeakKeyDictionary[Rule, CompiledRule]" = WeakKeyDictionary()


def compile_rule(rule: Rule) -> CompiledRule:
    """The compiled form of ``rule``, kept for as long as the rule lives."""
    compiled = _COMPILED.get(rule)
    if compiled is None:
        compiled = _COMPILED[rule] = CompiledRule(rule)
    return compiled
