"""State that comes in from a state dict, ours or torch's, checked in full before anything is changed.

Nothing here changes an optimizer or the state dict that it reads.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from shardstep.errors import ConfigError, MissingKeyError
from shardstep.optim.groups import with_flags
from shardstep.optim.states import device_of, dtype_of, scales_of
from shardstep.rules import Rule
from shardstep.rules.backends.dynamic8 import decode, encode
from shardstep.rules.binding import CODED, scale_name
from shardstep.rules.compiled import compile_rule
from shardstep.rules.ir import State
from shardstep.rules.view import state_shape

States: TypeAlias = dict[nn.Parameter, dict[str, Tensor]]

StatesIn: TypeAlias = Callable[[Mapping[str, Any], int], Sequence[State]]
"""The states that a param of so many dimensions has with the flags of a group."""

_COMPARISONS: Final = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})


def check_keys(state_dict: StateDict) -> None:
    """Raise MissingKeyError for what no optimizer gave."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise MissingKeyError(
                f"expected a state dict with 'state' and 'param_groups', got one without {key!r}; "
                f"load what state_dict() of an optimizer gave"
            )


def checked_groups(state_dict: StateDict, groups: Sequence[Mapping[str, Any]], rule: Rule) -> list[dict[str, Any]]:
    """Copies of the groups in ``state_dict``, with the flags that an older version did not save.

    Raises ConfigError if they do not fit ``groups``, MissingKeyError if they lack what ``rule`` needs.
    """
    check_keys(state_dict)
    saved = state_dict["param_groups"]
    sizes, own_sizes = ([len(group["params"]) for group in side] for side in (saved, groups))
    if sizes != own_sizes:
        raise ConfigError(
            f"expected a state dict with parameter groups of {own_sizes} parameters, got {sizes}; "
            f"build the optimizer with the groups that were saved"
        )
    complete = [with_flags(group, rule, own) for group, own in zip(saved, groups, strict=True)]
    for index, group in enumerate(complete):
        missing = rule.hyperparameters.keys() - group.keys()
        if missing:
            raise MissingKeyError(
                f"expected the hyper-parameters of {rule.name!r} in the loaded parameter group {index}, got "
                f"none for {sorted(missing)}; load a state dict of the same kind of optimizer"
            )
    return complete


def checked_state(
    state: Mapping[Any, Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    rule: Rule,
    states_in: StatesIn,
) -> States:
    """Copies of ``state`` by parameter, in the declared dtype; ``saved`` are the groups that came with it.

    Parameters are matched by position, as torch does; one without an entry is left out. Raises ConfigError if state
    names or shapes do not fit.
    """
    owned: dict[Any, tuple[nn.Parameter, Sequence[State]]] = {}
    for group, own in zip(saved, groups, strict=True):
        for key, param in zip(group["params"], own["params"], strict=True):
            owned[key] = param, states_in(group, param.ndim)
    unowned = state.keys() - owned.keys()
    if unowned:
        raise ConfigError(
            f"expected state only for parameters of some group, got state for {sorted(map(str, unowned))}; "
            f"the state dict is damaged"
        )
    counts = _counts_steps(rule)
    taken = {}
    for key, entry in state.items():
        there = {name: value for name, value in entry.items() if value is not None}
        if there:
            param, states = owned[key]
            taken[param] = _taken(there if counts else {"step": 1.0, **there}, param, states, key)
    return taken


def as_step(value: object) -> Tensor:
    """A step count as torch keeps it now: a 0-d float32 tensor on the CPU. Older versions had numbers."""
    return torch.as_tensor(value).to("cpu", torch.float32, copy=True).reshape(())


def _counts_steps(rule: Rule) -> bool:
    """Whether an update depends on how many there were, beyond being the first one or not.

    Where it does not, torch's class may keep no ``step`` (SGD keeps ``momentum_buffer`` alone).
    """
    lines = compile_rule(rule).program.instructions
    step = {number for number, line in enumerate(lines) if line.operation == "hyper" and line.attributes[0] == "step"}
    return any(step & set(line.arguments) and line.operation not in _COMPARISONS for line in lines)


def _taken(state: Mapping[str, Any], param: Tensor, states: Sequence[State], key: object) -> dict[str, Tensor]:
    coded = {declared.name for declared in states if getattr(state.get(declared.name), "dtype", None) in CODED}
    names = ["step"]
    for declared in states:
        names += [declared.name, scale_name(declared.name)] if declared.name in coded else [declared.name]
    if state.keys() != set(names):
        raise MissingKeyError(
            f"expected the states {names} for parameter {key}, got {list(state)}; "
            f"load a state dict of the same kind of optimizer"
        )
    # Copies: state is updated in place, and the caller keeps the dict.
    taken = {"step": as_step(state["step"])}
    for declared in states:
        values, shape = state[declared.name], state_shape(declared.shape, tuple(param.shape))
        if values.shape != shape:
            raise ConfigError(
                f"expected {declared.name} of shape {shape} for parameter {key}, got "
                f"{tuple(values.shape)}; the state dict belongs to another model"
            )
        scale = state[scale_name(declared.name)] if declared.name in coded else None
        taken |= _converted(declared, values, scale, param, key)
    return taken


def _converted(declared: State, values: Tensor, scale: Tensor | None, param: Tensor, key: object) -> dict[str, Tensor]:
    """A state as it is declared, from what it was in a state dict; ``scale``: of one in 8 bits."""
    name, dtype = declared.name, dtype_of(declared, param)
    if scale is not None:
        shape = (scales_of(values.numel()),)
        if scale.shape != shape or scale.dtype != torch.float32:
            raise ConfigError(
                f"expected {scale_name(name)} of shape {shape} in float32 for parameter {key}, got "
                f"{tuple(scale.shape)} in {scale.dtype}; the state dict is damaged"
            )
        if values.dtype == dtype:
            copied = scale.to(param.device, copy=True)
            return {name: values.to(param.device, copy=True).contiguous(), scale_name(name): copied}
        values = decode(values, scale)
    if dtype in CODED:
        return dict(zip((name, scale_name(name)), encode(values.to(param.device), dtype), strict=True))
    device = device_of(declared, param)
    return {name: values.to(device, dtype, copy=True, memory_format=torch.contiguous_format)}
