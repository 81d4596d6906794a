"""The optimizer of any rule: a ``torch.optim.Optimizer`` that steps alone, or on flat runs handed to it.

Alone, it updates each parameter on its device and keeps whole state in ``self.state``. With a ``FlatSource``
attached, parameters, gradients and state lie with the source; this class then only reads hyper-parameters and
calls the kernel. It never hears of ranks.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import ParamsT, StateDict

from shardstep.errors import ConfigError, OwnershipError
from shardstep.optim.states import check_loaded, start_of
from shardstep.rules import Rule
from shardstep.rules.binding import compute_dtype
from shardstep.rules.compiled import compile_rule
from shardstep.rules.ir import State
from shardstep.rules.show import explain
from shardstep.types import Batch, FlatSource, Segment, Update


class Optimizer(torch.optim.Optimizer):
    """Base class: a subclass names its ``rule`` and may check its groups in :meth:`check_group`.

    State has torch's names and the parameters' shapes, in float32 (float64 for float64 parameters), plus
    ``step`` as a 0-d float32 tensor on the CPU, so that state dicts go to and come from torch's own
    optimizer.

    ``params``: as for any torch optimizer. Keyword arguments: hyper-parameters of the rule, for all groups
    that do not give their own. Raises ConfigError for one that is missing, unknown or refused, OwnershipError
    for a parameter given twice.
    """

    rule: ClassVar[Rule]
    _source: FlatSource | None = None

    def __init__(self, params: ParamsT, **hyperparameters: Any) -> None:
        if not isinstance(params, Tensor):
            params = cast(ParamsT, list(params))
            if not params:
                raise ConfigError("expected parameters to optimize, got none; does the model have any?")
        super().__init__(params, _complete(self.rule, hyperparameters))

    def states_of(self, ndim: int) -> tuple[State, ...]:
        """The states that a param of so many dimensions has with the flags of any group, in order."""
        compiled = compile_rule(self.rule)
        used = {state.name for group in self.param_groups for state in compiled.states(group, ndim)}
        return tuple(state for state in self.rule.declared if state.name in used)

    @property
    def states(self) -> tuple[State, ...]:
        """The states that any param has, in order."""
        params = (param for group in self.param_groups for param in group["params"])
        used = {state.name for ndim in {param.ndim for param in params} for state in self.states_of(ndim)}
        return tuple(state for state in self.rule.declared if state.name in used)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(state.name for state in self.states)

    def check_shardable(self) -> None:
        """Raise ConfigError for a rule that looks at whole matrices."""
        compiled = compile_rule(self.rule)
        if compiled.locality == "matrix":
            raise ConfigError(
                f"expected a rule over elements or with sums over tensors, rows or columns to shard, got "
                f"{self.rule.name!r}, which is {compiled.locality} ({compiled.reason}); such rules run unsharded so far"
            )

    def hypers_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """The hyper-parameters of the rule, for a group; those of the same names unless a class knows better."""
        return group

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        """Raise ConfigError if a hyper-parameter of ``group`` is out of range; ``where`` names the group."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; also checks ranges, dtypes, and that no parameter is given twice."""
        where = f"parameter group {len(self.param_groups)}"
        if self._source is not None:
            raise ConfigError(
                f"expected all parameters before the optimizer was sharded, got {where} after; add it before"
            )
        if isinstance(param_group, dict):
            given = param_group["params"]
            if not isinstance(given, Tensor | set):
                param_group["params"] = given = list(given)
            self._check_parameters([given] if isinstance(given, Tensor) else list(given), where)
            self.check_group({**self.defaults, **param_group}, where)
        super().add_param_group(param_group)

    def _check_parameters(self, given: list[Any], where: str) -> None:
        places = {
            id(p): f"parameter group {g}, position {i}"
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
        }
        for position, entry in enumerate(given):
            name, param = entry if isinstance(entry, tuple) else (None, entry)
            place = f"{where}, position {position}" + (f" ({name!r})" if name is not None else "")
            if id(param) in places:
                raise OwnershipError(
                    f"expected every parameter once, got the one at {place} also at {places[id(param)]}; "
                    f"remove one of the two"
                )
            places[id(param)] = place
            if isinstance(param, Tensor) and param.dtype not in _DTYPES:
                raise ConfigError(
                    f"expected a parameter of float32, float64, bfloat16 or float16 at {place}, got "
                    f"{param.dtype}; convert it or leave it out"
                )

    @property
    def attached(self) -> bool:
        """Whether a source holds the state."""
        return self._source is not None

    def attach(self, source: FlatSource) -> None:
        """Let ``source`` hold parameters, gradients and state from now on; it takes over the state there is.

        Raises ConfigError if there is a source already.
        """
        if self._source is not None:
            raise ConfigError("expected an optimizer that is not sharded yet, got one that is; shard it only once")
        source.adopt_state(cast("Mapping[nn.Parameter, Mapping[str, Tensor]]", self.state))
        self._source = source
        self.state = defaultdict(dict)

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
        with torch.no_grad():
            if self._source is None:
                self._step_alone()
            else:
                compiled = compile_rule(self.rule)
                groups = [self.hypers_of(group) for group in self.param_groups]
                for batch in self._source.batches(per_tensor=compiled.is_by_tensor):
                    compiled.update(batch, groups)
        return loss

    def _step_alone(self) -> None:
        segments, converted = list[Segment](), list[tuple[Tensor, Tensor]]()
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout is not torch.strided:
                    raise ConfigError(
                        f"expected a dense gradient at parameter group {index}, position {position}, got "
                        f"{param.grad.layout}; build the layer with sparse=False"
                    )
                segments.append(self._segment(param, index, converted))
        updated = [Update(segment.group, segment.step, segment.shape or ()) for segment in segments]
        groups = [self.hypers_of(group) for group in self.param_groups]
        compile_rule(self.rule).update(Batch(segments, updated, lambda sums, _: sums), groups)
        for param, master in converted:
            param.copy_(master)
        increment_version([segment.param for segment in segments])  # autograd cannot see what a kernel writes

    def _segment(self, param: Tensor, index: int, converted: list[tuple[Tensor, Tensor]]) -> Segment:
        """One whole tensor; ``converted`` gains (param, master) if its new values must be copied back."""
        data, dtype, elements = param.detach(), compute_dtype(param), self.rule.element_states
        state = self.state[param] or self._start(param, self.param_groups[index])
        state["step"] += 1
        master = data
        if data.dtype != dtype or not data.is_contiguous():
            master = data.to(dtype, memory_format=torch.contiguous_format, copy=True)
            converted.append((data, master))
        return Segment(
            group=index,
            step=int(state["step"]),
            param=master.view(-1),
            grad=cast(Tensor, param.grad).detach().reshape(-1),
            state={name: values.view(-1) for name, values in state.items() if name in elements},
            low=None,
            grad_scale=1.0,
            shape=tuple(param.shape),
            tensor_state={name: values for name, values in state.items() if name != "step" and name not in elements},
        )

    def explain(self, segment: Segment, index: int) -> str:
        """Which line of the rule makes the first infinity or NaN when element ``index`` of ``segment`` is updated."""
        if compile_rule(self.rule).is_by_tensor:
            return "which line made it is known for elementwise rules only"
        compute = compute_dtype(segment.param)
        grad = segment.grad[index].to(compute) * segment.grad_scale
        arrays = {"param": segment.param[index], "grad": grad, **{n: s[index] for n, s in segment.state.items()}}
        hypers = {**self.hypers_of(self.param_groups[segment.group]), "step": segment.step}
        values = {**dict.fromkeys(self.rule.states, 0.0), **{name: value.item() for name, value in arrays.items()}}
        return explain(self.rule, values, hypers, compute)

    def _start(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The first state of ``param``, which is kept from now on."""
        state: dict[str, Tensor] = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float32)
        for declared in compile_rule(self.rule).states(group, param.ndim):
            state[declared.name] = start_of(declared, param)
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; with a source attached, ``p.grad`` is None afterwards in any case."""
        if self._source is None:
            super().zero_grad(set_to_none)
        else:
            super().zero_grad(set_to_none=True)
            self._source.discard()

    def state_dict(self) -> StateDict:
        """As torch's, in whole tensors. With a source attached, every rank must call it."""
        if self._source is None:
            return super().state_dict()
        self.state = defaultdict(dict, cast("dict[Tensor, Any]", self._source.whole_state()))
        try:
            return super().state_dict()
        finally:
            self.state = defaultdict(dict)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As torch's, but state keeps the dtype that it is declared with (torch casts it to the parameter's).

        Takes state dicts of torch's optimizer of the same name too. Raises ConfigError, before anything has
        changed, if groups, hyper-parameters, state names or shapes do not fit. With a source attached, every
        rank must call it with the same content.
        """
        arrived: dict[nn.Parameter, dict[str, Tensor]] = {}

        def take(_: torch.optim.Optimizer, given: StateDict) -> StateDict:
            arrived.update(check_loaded(given, self.param_groups, self.rule))
            for index, group in enumerate(given["param_groups"]):
                self.check_group(group, f"loaded parameter group {index}")
            return {**given, "state": {}}

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


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def number(value: object, name: str, where: str) -> float:
    """``value`` (a number or a one-element tensor) as a float. Raises ConfigError if it is neither."""
    try:
        return float(cast(float, value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"expected {name} to be a number in {where}, got {value!r}; give a number") from error


def _complete(rule: Rule, given: Mapping[str, Any]) -> dict[str, Any]:
    """The rule's defaults with the ones given in their place."""
    unknown = given.keys() - rule.hyperparameters.keys()
    if unknown:
        raise ConfigError(
            f"expected hyper-parameters among {sorted(rule.hyperparameters)} for the rule {rule.name!r}, got "
            f"{sorted(unknown)}; correct the names"
        )
    complete = {**rule.hyperparameters, **given}
    missing = [name for name, value in complete.items() if value is None]
    if missing:
        raise ConfigError(
            f"expected values for {missing} of the rule {rule.name!r}, got none; they have no default, so give them"
        )
    return complete
