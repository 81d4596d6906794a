"""State dicts on their way in: checked in full before anything is changed, and sorted by parameter.

Nothing here changes an optimizer.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from shardstep.errors import ConfigError
from shardstep.rules import Rule


def compute_dtype(param: Tensor) -> torch.dtype:
    """What a parameter is updated in, and its state kept in: float64 for float64, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


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
    saved_ids = chain.from_iterable(group["params"] for group in saved)
    owned = dict(zip(saved_ids, chain.from_iterable(group["params"] for group in groups), strict=True))
    unowned = state_dict["state"].keys() - owned.keys()
    if unowned:
        raise ConfigError(
            f"expected state only for parameters of some group, got state for {sorted(map(str, unowned))}; "
            f"the state dict is damaged"
        )
    return {owned[key]: _taken(state, owned[key], key, rule) for key, state in state_dict["state"].items() if state}


def _taken(state: Mapping[str, Any], param: Tensor, key: object, rule: Rule) -> dict[str, Tensor]:
    if state.keys() != {"step", *rule.states}:
        raise ConfigError(
            f"expected the states {['step', *rule.states]} for parameter {key}, got {list(state)}; "
            f"load a state dict of the same kind of optimizer"
        )
    # Copies: state is updated in place, and the caller keeps the dict.
    taken = {"step": torch.as_tensor(state["step"]).to("cpu", torch.float32, copy=True).reshape(())}
    for name in rule.states:
        if state[name].shape != param.shape:
            raise ConfigError(
                f"expected {name} of shape {tuple(param.shape)} for parameter {key}, got "
                f"{tuple(state[name].shape)}; the state dict belongs to another model"
            )
        taken[name] = state[name].to(
            param.device, compute_dtype(param), copy=True, memory_format=torch.contiguous_format
        )
    return taken
