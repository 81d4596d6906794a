"""Several optimizers of one model as one: Muon for its matrices and AdamW for the rest, say.

It has the groups of all of them, the very same dicts, so that schedulers may drive it or any of them. Alone, its step
is theirs, one after the other. With a ``FlatSource`` attached, it reads their hyper-parameters and runs their rules;
they themselves then refuse to step. It never hears of ranks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NoReturn, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from shardstep.errors import ConfigError, OwnershipError
from shardstep.optim.loading import check_keys
from shardstep.optim.optimizer import Optimizer, steps_by_rule
from shardstep.rules.compiled import compile_rule
from shardstep.rules.ir import State
from shardstep.types import Batch, FlatSource, Segment, Update


class Combined(torch.optim.Optimizer):
    """``Combined(Muon(matrices), AdamW(others))``: one optimizer to step, schedule, save and give to ``shard()``.

    ``optimizers``: at least one, of parameters of their own. State dicts are torch's, with the groups and the states of
    all in order. Raises ConfigError for what is no optimizer of shardstep's or is sharded, OwnershipError for a
    parameter that two of them have.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self._members = _checked(optimizers)
        self._source: FlatSource | None = None
        super().__init__([group for member in optimizers for group in member.param_groups], {})
        self.state = self._whole_state()

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        return self._members

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after the beginning: which of the optimizers would it be for?"""
        if not any(param_group is group for group in self._groups()):
            raise ConfigError(
                "expected parameter groups of the optimizers that were combined, got another one; add it to one of "
                "them before they are combined"
            )
        super().add_param_group(param_group)

    # - the update

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update by all of them. ``closure`` is called first, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._source is None:
            for member in self._members:
                member.step()
            self.state = self._whole_state()
        else:
            with torch.no_grad():
                self._step_at(self._source)
        return loss

    def _step_at(self, source: FlatSource) -> None:
        compiled = [compile_rule(member.rule) for member in self._members]
        hypers = self._hypers()
        whole = {index for index, rule in enumerate(compiled) if rule.locality == "matrix"}
        pairs = zip(compiled, self._members, strict=True)
        per_tensor = any(rule.is_by_tensor_with(member.hypers) for rule, member in pairs)
        for batch in source.batches(per_tensor=per_tensor, whole=whole):
            if batch.updated:
                compiled[self._member_of(batch.updated[0].group)].update(batch, hypers)

    def update(self, batch: Batch) -> None:
        """Update one batch, a part of a step, with the hyper-parameters as they are."""
        if batch.updated:
            member = self._members[self._member_of(batch.updated[0].group)]
            with torch.no_grad():
                compile_rule(member.rule).update(batch, self._hypers())

    @property
    def elementwise(self) -> dict[int, bool]:
        """See `Optimizer.elementwise`."""
        return {index: own for index, member in enumerate(self._members) for own in member.elementwise.values()}

    def _hypers(self) -> list[Mapping[str, Any]]:
        return [hypers for member in self._members for hypers in member.hypers]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; with a source attached, ``p.grad`` is None afterwards in any case."""
        if self._source is None:
            super().zero_grad(set_to_none)
        else:
            self._source.discard()
            super().zero_grad(set_to_none=True)

    # - what sharding asks; see `Optimizer`

    def check_shardable(self) -> None:
        for member in self._members:
            member.check_shardable()

    def rule_of(self, param: Tensor) -> int:
        """Which of the optimizers updates ``param``."""
        ours = (
            any(param is own for group in member.param_groups for own in group["params"]) for member in self._members
        )
        return next((index for index, found in enumerate(ours) if found), 0)

    def states_of(self, param: Tensor) -> tuple[State, ...]:
        return self._members[self.rule_of(param)].states_of(param)

    def grad_sign(self, group: int) -> float:
        member = self._member_of(group)
        return self._members[member].grad_sign(group - self._ranges()[member].start)

    @property
    def clip(self) -> Callable[[float], float] | None:
        return None

    def check_update(self, updated: Sequence[Update]) -> None:
        for index, member in enumerate(self._members):
            own = self._ranges()[index]
            compile_rule(member.rule).check([one for one in updated if one.group in own], self._hypers())

    def moved_bytes(self, param: Tensor, compute: torch.dtype) -> tuple[int, int] | None:
        return self._members[self.rule_of(param)].moved_bytes(param, compute)

    def explain(self, segment: Segment, index: int) -> str | None:
        """Which line of the rule makes the first infinity or NaN when element ``index`` of ``segment`` is updated."""
        member = self._member_of(segment.group)
        own = replace(segment, group=segment.group - self._ranges()[member].start)
        return self._members[member].explain(own, index)

    @property
    def attached(self) -> bool:
        """Whether a source holds the state."""
        return self._source is not None

    def attach(self, source: FlatSource) -> None:
        """Let ``source`` hold parameters, gradients and state from now on; it takes over the state there is."""
        if self._source is not None:
            raise ConfigError("expected an optimizer that is not sharded yet, got one that is; shard it only once")
        source.adopt_state(cast("Mapping[nn.Parameter, Mapping[str, Tensor]]", self._whole_state()))
        self._source, self.state = source, defaultdict(dict)
        for member in self._members:
            member.state = defaultdict(dict)
            member.attach(_Elsewhere())

    # - saving and loading

    def state_dict(self) -> StateDict:
        """As torch's, in whole tensors. With a source attached, every rank must call it."""
        self.state = self._whole_state()
        try:
            return super().state_dict()
        finally:
            if self._source is not None:
                self.state = defaultdict(dict)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As `Optimizer.load_state_dict`, each of the optimizers taking its groups and states. Raises ConfigError,
        before anything has changed, if anything does not fit. With a source attached, every rank must call it.
        """
        parts: list[StateDict] = []
        arrived: dict[nn.Parameter, dict[str, Tensor]] = {}

        def take(_: torch.optim.Optimizer, given: StateDict) -> StateDict:
            check_keys(given)
            if self._source is not None:
                self._source.check_adoptable()
            if len(given["param_groups"]) != len(self.param_groups):
                raise ConfigError(
                    f"expected a state dict with {len(self.param_groups)} parameter groups, got "
                    f"{len(given['param_groups'])}; combine the optimizers as when it was saved"
                )
            parts.extend(_part(given, own) for own in self._ranges())
            for member, part in zip(self._members, parts, strict=True):
                arrived.update(member.check_state_dict(part)[1])
            return {**given, "state": {}}

        def put(_: torch.optim.Optimizer) -> None:
            for member, part in zip(self._members, parts, strict=True):
                member.load_state_dict(part)
            self.param_groups = self._groups()
            if self._source is not None:
                self._source.adopt_state(arrived)
            else:
                self.state = self._whole_state()

        # Hooks, so that the user's own hooks see the whole state before and after; ours run innermost.
        handles = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _whole_state(self) -> defaultdict[Tensor, Any]:
        states: list[Mapping[Tensor, Any]] = [member.state for member in self._members]
        if self._source is not None:
            whole = self._source.whole_state()
            states = [member.own_states(whole) for member in self._members]
        return defaultdict(dict, {param: state for own in states for param, state in own.items()})

    def __getstate__(self) -> NoReturn:
        raise ConfigError(
            "expected an optimizer of one rule to copy or pickle, got a combined one; use state_dict() and "
            "load_state_dict()"
        )

    # - whose group is whose

    def _groups(self) -> list[dict[str, Any]]:
        return [group for member in self._members for group in member.param_groups]

    def _ranges(self) -> list[range]:
        """The groups of each optimizer."""
        ranges, first = [], 0
        for member in self._members:
            ranges.append(range(first, first + len(member.param_groups)))
            first += len(member.param_groups)
        return ranges

    def _member_of(self, group: int) -> int:
        return next(index for index, own in enumerate(self._ranges()) if group in own)


class _Elsewhere:
    """The source of an optimizer that was sharded as a part of a combined one, which does its work."""

    left_out = False

    def batches(self, *, per_tensor: bool, whole: Set[int]) -> Iterator[Any]:
        raise self._refusal("step()")

    def between_steps(self, call: str) -> Iterator[list[tuple[nn.Parameter, Segment]]]:
        raise self._refusal(call)

    def include(self, parameters: Sequence[nn.Parameter]) -> None:
        raise self._refusal("add_param_group()")

    def discard(self) -> None:
        raise self._refusal("zero_grad()")

    def whole_state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        raise self._refusal("state_dict()")

    def adopt_state(self, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Nothing: the combined optimizer hands it over."""

    def check_adoptable(self) -> None:
        """Nothing, as above."""

    def write_parameters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        raise self._refusal("the replacement of parameters")

    def _refusal(self, call: str) -> ConfigError:
        return ConfigError(
            f"expected {call} of the combined optimizer that was sharded, got it of one that is in it; call it on that"
        )


def _checked(optimizers: Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    if not optimizers:
        raise ConfigError("expected optimizers to combine, got none; give at least one")
    seen: dict[int, int] = {}
    for index, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"expected optimizers of shardstep.optim to combine, got {type(optimizer).__module__}."
                f"{type(optimizer).__name__} at position {index}; give one whose rule shardstep knows"
            )
        if not steps_by_rule(optimizer):
            raise ConfigError(
                f"expected optimizers whose step is their rule and nothing more, got {type(optimizer).__name__} at "
                f"position {index}; step it by itself"
            )
        if optimizer.attached:
            raise ConfigError(f"expected optimizers that are not sharded, got one at position {index}; combine first")
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            if seen.setdefault(id(param), index) != index:
                raise OwnershipError(
                    f"expected every parameter in one optimizer, got one of shape {tuple(param.shape)} in those at "
                    f"positions {seen[id(param)]} and {index}; remove one of the two"
                )
    return tuple(optimizers)


def _part(state_dict: StateDict, groups: range) -> StateDict:
    """What belongs to these groups, its parameters numbered anew."""
    taken = [dict(state_dict["param_groups"][index]) for index in groups]
    keys = {key: position for position, key in enumerate(key for group in taken for key in group["params"])}
    for group in taken:
        group["params"] = [keys[key] for key in group["params"]]
    return {"state": {keys[k]: v for k, v in state_dict["state"].items() if k in keys}, "param_groups": taken}
