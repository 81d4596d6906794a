"""States of single parameters: how they start, and how they come in from a state dict, checked in full before anything
is changed. Nothing here changes an optimizer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from shardstep.errors import ConfigError
from shardstep.rules import Rule
from shardstep.rules.binding import compute_dtype, stored_dtype
from shardstep.rules.compiled import compile_rule
from shardstep.rules.ir import State


def shape_of(declared: State, param: Tensor) -> tuple[int, ...]:
    """The shape of a state of ``param``; its rows are its first dimension, its columns all the others."""
    shape = tuple(param.shape)
    rows, columns = shape[:1] or (1,), (math.prod(shape[1:]),)
    return {"element": shape, "row": rows, "column": columns}.get(declared.shape, ())


def start_of(declared: State, param: Tensor) -> Tensor:
    """A new state of ``param``."""
    dtype = stored_dtype(declared) or compute_dtype(param)
    if isinstance(declared.start, str):
        return param.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
    return torch.full(shape_of(declared, param), declared.start, dtype=dtype, device=param.device)


def check_loaded(
    state_dict: StateDict, groups: Sequence[Mapping[str, Any]], rule: Rule
) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Copies of the state in ``state_dict`` by parameter, in the declared dtype.

    Parameters are matched by position, as torch does; one without an entry is left out. Raises ConfigError if
    groups, hyper-parameters, state names or shapes do not fit.
    """
    saved = state_dict["param_groups"]
    sizes, own_sizes = ([len(group["params"]) for group in side] for side in (saved, groups))
    if sizes != own_sizes:
        raise ConfigError(
            f"expected a state dict with parameter groups of {own_sizes} parameters, got {sizes}; "
            f"build the optimizer with the groups that were saved"
        )
    for index, group in enumerate(saved):
        missing = rule.hyperparameters.keys() - group.keys()
        if missing:
            raise ConfigError(
                f"expected the hyper-parameters of {rule.name!r} in the loaded parameter group {index}, got "
                f"none for {sorted(missing)}; load a state dict of the same kind of optimizer"
            )
    owned: dict[Any, tuple[nn.Parameter, Sequence[State]]] = {}
    for group, own in zip(saved, groups, strict=True):
        states = compile_rule(rule).states(group)
        owned.update(zip(group["params"], ((param, states) for param in own["params"]), strict=True))
    unowned = state_dict["state"].keys() - owned.keys()
    if unowned:
        raise ConfigError(
            f"expected state only for parameters of some group, got state for {sorted(map(str, unowned))}; "
            f"the state dict is damaged"
        )
    return {owned[key][0]: _taken(state, *owned[key], key) for key, state in state_dict["state"].items() if state}


def _taken(state: Mapping[str, Any], param: Tensor, states: Sequence[State], key: object) -> dict[str, Tensor]:
    names = ["step", *(declared.name for declared in states)]
    if state.keys() != set(names):
        raise ConfigError(
            f"expected the states {names} for parameter {key}, got {list(state)}; "
            f"load a state dict of the same kind of optimizer"
        )
    # Copies: state is updated in place, and the caller keeps the dict.
    taken = {"step": torch.as_tensor(state["step"]).to("cpu", torch.float32, copy=True).reshape(())}
    for declared in states:
        values, shape = state[declared.name], shape_of(declared, param)
        if values.shape != shape:
            raise ConfigError(
                f"expected {declared.name} of shape {shape} for parameter {key}, got "
                f"{tuple(values.shape)}; the state dict belongs to another model"
            )
        dtype = stored_dtype(declared) or compute_dtype(param)
        taken[declared.name] = values.to(param.device, dtype, copy=True, memory_format=torch.contiguous_format)
    return taken
