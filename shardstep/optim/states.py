"""States of single parameters: how they start, and how they come in from a state dict, checked in full before anything
is changed. Nothing here changes an optimizer.
"""

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
from shardstep.rules.view import state_shape


def start_of(declared: State, param: Tensor) -> Tensor:
    """A new state of ``param``."""
    if isinstance(declared.start, str):
        dtype = state_dtype(declared, param)
        return param.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
    shape = state_shape(declared.shape, tuple(param.shape))
    dtype, device = state_dtype(declared, param), state_device(declared, param)
    return torch.full(shape, declared.start, dtype=dtype, device=device)


def state_dtype(declared: State, param: Tensor) -> torch.dtype:
    """What a state of ``param`` is stored in: one number for a tensor, in float32 as torch keeps ``step``."""
    return stored_dtype(declared) or (torch.float32 if declared.shape == "tensor" else compute_dtype(param))


def state_device(declared: State, param: Tensor) -> torch.device:
    """Where it lies: one number for a tensor, on the CPU."""
    return torch.device("cpu") if declared.shape == "tensor" else param.device


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
        for key, param in zip(group["params"], own["params"], strict=True):
            owned[key] = param, compile_rule(rule).states(group, param.ndim)
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
        values, shape = state[declared.name], state_shape(declared.shape, tuple(param.shape))
        if values.shape != shape:
            raise ConfigError(
                f"expected {declared.name} of shape {shape} for parameter {key}, got "
                f"{tuple(values.shape)}; the state dict belongs to another model"
            )
        dtype, device = state_dtype(declared, param), state_device(declared, param)
        taken[declared.name] = values.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return taken
