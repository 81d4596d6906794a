"""The optimizer of any rule: a ``torch.optim.Optimizer`` that steps alone, or on flat runs handed to it.

Alone, it updates each parameter on its device and keeps whole state in ``self.state``. With a ``FlatSource``
attached, parameters, gradients and state lie with the source; this class then only reads hyper-parameters and
calls the kernel. It never hears of ranks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import unwrap
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT, StateDict

from shardstep.errors import ArgumentTypeError, ConfigError, UnsupportedError
from shardstep.optim import alone
from shardstep.optim.groups import check_options, check_parameters, defaults_of, parameters_of, with_flags
from shardstep.optim.loading import States, as_step, checked_groups, checked_state
from shardstep.rules import Rule
from shardstep.rules.backends.dynamic8 import decoded_states
from shardstep.rules.binding import compute_dtype, cut_states, stored_arrays
from shardstep.rules.compiled import CompiledRule, compile_rule
from shardstep.rules.ir import State
from shardstep.rules.show import explain
from shardstep.types import Batch, FlatSource, Segment, Update


class Optimizer(torch.optim.Optimizer):
    """Base class: a subclass names its ``rule`` and may check its groups in :meth:`check_group`.

    State has torch's names and the parameters' shapes, in float32 (float64 for float64 parameters), plus
    ``step`` as a 0-d float32 tensor on the CPU, so that state dicts go to and come from torch's own
    optimizer. Complex parameters are updated as pairs of real ones, with complex state. A state that the rule stores in
    8 bits is two tensors: its codes, and under its name with ``_scale`` behind it the scales.

    ``params``: as for any torch optimizer. Keyword arguments: hyper-parameters of the rule, for all groups that do
    not give their own, as numbers or tensors of one element; and torch's options. Of these, ``maximize`` negates the
    gradient, ``foreach`` and ``fused`` are kept and change nothing (there is one implementation), ``capturable`` and
    ``differentiable`` must be False. Raises ConfigError for one that is missing, unknown or refused, OwnershipError
    for a parameter given twice.
    """

    rule: ClassVar[Rule]
    _source: FlatSource | None = None

    def __init__(self, params: ParamsT, **hyperparameters: Any) -> None:
        if isinstance(params, Tensor):
            raise ArgumentTypeError("expected parameters or groups of them, got a single tensor; put it into a list")
        params = cast(ParamsT, list(params))
        if not params:
            raise ConfigError("expected parameters to optimize, got none; does the model have any?")
        super().__init__(params, defaults_of(self.rule, hyperparameters))

    # - what a subclass, a user and whoever shards look at

    def states_in(self, group: Mapping[str, Any], ndim: int) -> tuple[State, ...]:
        """The states that a param of so many dimensions has with the flags of ``group``, in order."""
        return compile_rule(self.rule).states(self.hypers_of(group), ndim)

    def states_of(self, param: Tensor) -> tuple[State, ...]:
        """The states that ``param`` would have with the flags of any group, in order."""
        used = {state.name for group in self.param_groups for state in self.states_in(group, param.ndim)}
        return tuple(state for state in self.rule.declared if state.name in used)

    @property
    def states(self) -> tuple[State, ...]:
        """The states that any param has, in order."""
        params = (param for group in self.param_groups for param in group["params"])
        by_ndim = {param.ndim: param for param in params}
        used = {state.name for param in by_ndim.values() for state in self.states_of(param)}
        return tuple(state for state in self.rule.declared if state.name in used)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(state.name for state in self.states)

    def check_shardable(self) -> None:
        """Raise ConfigError for a rule with matrix products beside values or states of rows, columns or tensors."""
        compiled = compile_rule(self.rule)
        if not compiled.is_shardable:
            raise ConfigError(
                f"expected a rule with matrix products to have values and states of elements and of square matrices, "
                f"and no others, to shard, got {self.rule.name!r}, which is {compiled.locality} ({compiled.reason}); "
                f"it runs unsharded"
            )

    def rule_of(self, param: Tensor) -> int:
        """Which of the optimizer's rules updates ``param``: there is one."""
        return 0

    def moved_bytes(self, param: Tensor, compute: torch.dtype) -> tuple[int, int] | None:
        """How many bytes of each element of ``param`` go to its owner in a step, and how many come back; None for a
        rule without matrix products.
        """
        compiled = compile_rule(self.rule)
        if compiled.locality != "matrix":
            return None
        group = next(group for group in self.param_groups if any(param is own for own in group["params"]))
        return compiled.moved_bytes(tuple(param.shape), self.hypers_of(group), compute)

    def grad_sign(self, group: int) -> float:
        """What the gradients of a group are multiplied by; a rule with a flag ``maximize`` sees to it itself."""
        negated = "maximize" not in self.rule.hyperparameters and self.param_groups[group].get("maximize")
        return -1.0 if negated else 1.0

    def hypers_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """The hyper-parameters of the rule, for a group; those of the same names unless a class knows better."""
        return group

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        """Raise ConfigError if a hyper-parameter of ``group`` is out of range; ``where`` names the group."""

    def check_parameter(self, param: Tensor, where: str) -> None:
        """Raise ConfigError if the rule is not for parameters such as ``param``; ``where`` names it."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; also checks ranges, dtypes, and that no parameter is given twice.

        With a source attached, its parameters must be ones that the source knows, and every rank must call it.
        """
        where = f"parameter group {len(self.param_groups)}"
        param_group["params"] = given = parameters_of(param_group, where)
        check_parameters(given, self.param_groups, where)
        self._check_hyperparameters({**self.defaults, **param_group}, where)
        self._check_params(given, where)
        super().add_param_group(param_group)
        if self._source is not None:
            try:
                self._source.include(param_group["params"])
            except BaseException:
                self.param_groups.pop()
                raise

    def _check_hyperparameters(self, group: Mapping[str, Any], where: str) -> None:
        check_options(group, where)
        self.check_group(group, where)

    def _check_params(self, given: list[Any], where: str) -> None:
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        for position, param in enumerate(params):
            self.check_parameter(param, f"position {position} of {where}")
        if any(param.is_complex() for param in params) and compile_rule(self.rule).locality in ("factored", "matrix"):
            raise UnsupportedError(
                f"expected real parameters for {self.rule.name!r}, whose rule looks at rows or whole matrices, got "
                f"complex ones in {where}; optimize them by another rule"
            )

    # - the update

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from the gradients there are. ``closure`` is called first, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiled = compile_rule(self.rule)
        with torch.no_grad():
            groups = self.hypers
            for batch in self._batches(compiled):
                compiled.update(batch, groups)
        return loss

    @property
    def hypers(self) -> list[Mapping[str, Any]]:
        """The hyper-parameters of the rule, for each group."""
        return [self.hypers_of(group) for group in self.param_groups]

    def _batches(self, compiled: CompiledRule) -> Iterator[Batch]:
        if self._source is not None:
            whole = {0} if compiled.locality == "matrix" else set()
            return self._source.batches(per_tensor=compiled.is_by_tensor_with(self.hypers), whole=whole)
        signs = [self.grad_sign(index) for index in range(len(self.param_groups))]
        step = alone.Step(self.state, self.states_in, self.rule.tensor_states)
        return step.batches(self.param_groups, signs, compiled.is_plain_with(self.hypers))

    def update(self, batch: Batch) -> None:
        """Update one batch, a part of a step, with the hyper-parameters as they are."""
        with torch.no_grad():
            compile_rule(self.rule).update(batch, self.hypers)

    @property
    def elementwise(self) -> dict[int, bool]:
        """The numbers of the rules that see single elements only, with the hyper-parameters as they are, so that a
        part of the parameters may be updated at any time; and whether segments must be parts of one tensor for them.

        None of an optimizer whose :meth:`step` does more than run its rule.
        """
        compiled = compile_rule(self.rule)
        if not (steps_by_rule(self) and compiled.is_plain_with(self.hypers)):
            return {}
        return {0: compiled.is_by_tensor_with(self.hypers)}

    def check_update(self, updated: Iterable[Update]) -> None:
        """Raise RuleError, before anything is changed, if hyper-parameters of an update have no value in the rule."""
        compile_rule(self.rule).check(updated, self.hypers)

    def explain(self, segment: Segment, index: int) -> str | None:
        """Which line of the rule makes the first infinity or NaN when element ``index`` of ``segment`` is updated; None
        if none does.
        """
        if not compile_rule(self.rule).is_plain_with([self.hypers_of(self.param_groups[segment.group])]):
            return "which line made it is known for elementwise rules only"
        compute = compute_dtype(segment.param)
        grad = segment.grad[index].to(compute) * segment.grad_scale
        states = decoded_states(cut_states(segment.state, index, index + 1))
        arrays = {"param": segment.param[index], "grad": grad, **states}
        hypers = {**self.hypers_of(self.param_groups[segment.group]), "step": segment.step}
        values = {**dict.fromkeys(self.rule.states, 0.0), **{name: value.item() for name, value in arrays.items()}}
        return explain(self.rule, values, hypers, compute)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; with a source attached, ``p.grad`` is None afterwards in any case."""
        if self._source is None:
            super().zero_grad(set_to_none)
        else:
            self._source.discard()
            super().zero_grad(set_to_none=True)

    # - the seam to sharding

    @property
    def clip(self) -> Callable[[float], float] | None:
        """What all gradients are to be multiplied by, given the 2-norm over all of them; None: it asks for no norm.

        A source asks; an optimizer that works alone clips in its own :meth:`step`.
        """
        return None

    @property
    def attached(self) -> bool:
        """Whether a source holds the state."""
        return self._source is not None

    @property
    def left_out(self) -> bool:
        """Whether the source has left the last step out, so that nothing is to be counted."""
        return self._source is not None and self._source.left_out

    def attach(self, source: FlatSource) -> None:
        """Let ``source`` hold parameters, gradients and state from now on; it takes over the state there is.

        Raises ConfigError if there is a source already.
        """
        if self._source is not None:
            raise ConfigError("expected an optimizer that is not sharded yet, got one that is; shard it only once")
        source.adopt_state(cast("Mapping[nn.Parameter, Mapping[str, Tensor]]", self.state))
        self._source = source
        self.state = defaultdict(dict)

    # - saving, loading, copying

    def state_dict(self) -> StateDict:
        """As torch's, in whole tensors. With a source attached, every rank must call it."""
        if self._source is None:
            return super().state_dict()
        self.state = defaultdict(dict, self.own_states(self._source.whole_state()))
        try:
            return super().state_dict()
        finally:
            self.state = defaultdict(dict)

    def own_states(self, whole: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> dict[Tensor, dict[str, Tensor]]:
        """What a source has, for each parameter the states of its own group: others may have more."""
        state: dict[Tensor, dict[str, Tensor]] = {}
        for group in self.param_groups:
            for param in (param for param in group["params"] if param in whole):
                states = self.states_in(group, param.ndim)
                names = ["step", *(array.name for declared in states for array in stored_arrays(declared))]
                state[param] = {name: whole[param][name] for name in names}
        return state

    def check_state_dict(self, state_dict: StateDict) -> tuple[list[dict[str, Any]], States]:
        """The groups and the state of each parameter as they would be loaded. Raises ConfigError if they do not fit."""
        groups = checked_groups(state_dict, self.param_groups, self.rule)
        for index, group in enumerate(groups):
            self._check_hyperparameters(group, f"loaded parameter group {index}")
        return groups, checked_state(state_dict["state"], groups, self.param_groups, self.rule, self.states_in)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As torch's, but state keeps the dtype that it is declared with (torch casts it to the parameter's).

        Takes state dicts of torch's optimizer of the same name too, also older ones without some flags, with step
        counts that are no tensors, or without step counts where the rule needs none. Raises ConfigError, before
        anything has changed, if groups, hyper-parameters, state names or shapes do not fit. With a source attached,
        every rank must call it with the same content.
        """
        arrived: States = {}

        def take(_: torch.optim.Optimizer, given: StateDict) -> StateDict:
            groups, states = self.check_state_dict(given)
            if self._source is not None:
                self._source.check_adoptable()
            arrived.update(states)
            return {**given, "state": {}, "param_groups": groups}

        def put(_: torch.optim.Optimizer) -> None:
            if self._source is None:
                self.state.update(cast("dict[Tensor, Any]", arrived))
            else:
                self._source.adopt_state(arrived)

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

    def __getstate__(self) -> dict[str, Any]:
        if self._source is not None:
            raise ConfigError(
                "expected an optimizer that holds its own state, got a sharded one to copy or pickle; "
                "use state_dict() and load_state_dict()"
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's; what an older version has pickled gains the flags and the form of step counts of this one."""
        defaults = dict({**vars(self), **state}["defaults"])  # torch adds to it
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(with_flags(group, self.rule, defaults))
        for values in self.state.values():
            if "step" in values and not isinstance(values["step"], Tensor):
                values["step"] = as_step(values["step"])


def steps_by_rule(optimizer: Optimizer) -> bool:
    """Whether a step of ``optimizer`` is its rule and nothing more."""
    return unwrap(type(optimizer).step) is unwrap(Optimizer.step)  # torch wraps it
