"""Rules that look at whole tensors in some branch only, such as one that clips: whether they do with given flags."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from shardstep.errors import RuleError
from shardstep.rules.ir import Program
from shardstep.rules.locality import is_by_tensor, is_by_tensor_in
from shardstep.rules.passes import fixed_conditions, used_values
from shardstep.rules.scalars import compile_scalars

Plainness: TypeAlias = Callable[[Mapping[str, object]], bool]
"""Hyper-parameters -> whether every element is updated by itself at every step, whatever tensor it is in."""


def compile_plainness(program: Program) -> Plainness:
    """As a function fast enough to be asked at every step."""
    if not is_by_tensor(program):
        return lambda hypers: True
    fixed = fixed_conditions(program)
    by_shape = any(line.attributes == ("ndim",) for line in program.instructions)
    if not fixed or by_shape or any(state.shape != "element" for state in program.states):
        return lambda hypers: False
    flags = compile_scalars(program, fixed)
    seen: dict[tuple[float, ...], bool] = {}

    def is_plain(hypers: Mapping[str, object]) -> bool:
        try:
            raw = flags(hypers, {})
        except RuleError:  # perhaps in an untaken branch
            return False
        if raw not in seen:
            seen[raw] = not is_by_tensor_in(program, used_values(program, hypers))
        return seen[raw]

    return is_plain
