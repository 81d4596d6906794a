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
from shardstep.rules.backends.dynamic8 import decode, encode
from shardstep.rules.binding import CODED, compute_dtype, scale_name, stored_arrays
from shardstep.rules.compiled import compile_rule
from shardstep.rules.ir import State
from shardstep.types import SCALED_NUMEL


def shape_of(declared: State, param: Tensor) -> tuple[int, ...]:
    """The shape of a state of ``param``; its rows are its first dimension, its columns all the others."""
    shape = tuple(param.shape)
    rows, columns = shape[:1] or (1,), (math.prod(shape[1:]),)
    return {"element": shape, "row": rows, "column": columns}.get(declared.shape, ())


def start_of(declared: State, param: Tensor) -> dict[str, Tensor]:
    """The arrays of a new state of ``param``."""
    first, *scales = stored_arrays(declared)
    dtype, shape = first.dtype or compute_dtype(param), shape_of(declared, param)
    arrays = {first.name: torch.empty(shape, dtype=dtype, device=param.device)}
    for scale in scales:
        arrays[scale.name] = torch.empty(_entries(math.prod(shape)), dtype=scale.dtype, device=param.device)
    begin(declared, arrays, param)
    return arrays


def begin(declared: State, arrays: Mapping[str, Tensor], param: Tensor) -> None:
    """Let the arrays of a state begin anew."""
    values = arrays[declared.name]
    if values.dtype not in CODED:
        values.copy_(param.detach()) if isinstance(declared.start, str) else values.fill_(declared.start)
        return
    scale = arrays[scale_name(declared.name)]
    if isinstance(declared.start, str):
        codes, scales = encode(param, values.dtype)
        values.copy_(codes)
        scale.copy_(scales)
    else:
        codes, scales = encode(torch.tensor([declared.start], dtype=torch.float32), values.dtype)
        values.fill_(codes.item())
        scale.fill_(scales.item())


def _entries(numel: int) -> int:
    """Of scales."""
    return -(-numel // SCALED_NUMEL)


def check_loaded(
    state_dict: StateDict, groups: Sequence[Mapping[str, Any]], rule: Rule
) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Copies of the state in ``state_dict`` by parameter, in the declared dtype; 8 bits become numbers and back.

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
    coded = {declared.name for declared in states if getattr(state.get(declared.name), "dtype", None) in CODED}
    names = ["step"]
    for declared in states:
        names += [declared.name, scale_name(declared.name)] if declared.name in coded else [declared.name]
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
        scale = state[scale_name(declared.name)] if declared.name in coded else None
        taken |= _converted(declared, values, scale, param, key)
    return taken


def _converted(declared: State, values: Tensor, scale: Tensor | None, param: Tensor, key: object) -> dict[str, Tensor]:
    """A state as it is declared, from what it was in a state dict; ``scale``: of one in 8 bits."""
    name, dtype = declared.name, stored_arrays(declared)[0].dtype or compute_dtype(param)
    if scale is not None:
        shape = (_entries(values.numel()),)
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
    return {name: values.to(param.device, dtype, copy=True, memory_format=torch.contiguous_format)}
