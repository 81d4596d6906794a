"""What a parameter group may hold: parameters, hyper-parameters of the rule, and torch's options, all checked.

Everything here looks and raises, or gives a new mapping; nothing changes an optimizer.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, cast

import torch
from torch import Tensor

from shardstep.errors import ArgumentTypeError, ConfigError, MissingKeyError, OwnershipError, UnsupportedError
from shardstep.rules import Rule

OPTIONS: Final[Mapping[str, bool | None]] = MappingProxyType(
    {"maximize": False, "foreach": None, "fused": None, "capturable": False, "differentiable": False}
)
"""Options of torch's optimizers that no rule has, and what they are where a state dict does not tell.

``maximize`` negates the gradient. ``foreach`` and ``fused`` choose among torch's implementations; here there is one.
"""

_DTYPES: Final = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


def defaults_of(rule: Rule, given: Mapping[str, Any]) -> dict[str, Any]:
    """The rule's defaults with the ones ``given`` in their place, and the options that are given."""
    unknown = given.keys() - rule.hyperparameters.keys() - OPTIONS.keys()
    if unknown:
        raise ConfigError(
            f"expected hyper-parameters among {sorted(rule.hyperparameters)} for the rule {rule.name!r}, got "
            f"{sorted(unknown)}; correct the names"
        )
    complete = {**rule.hyperparameters, **given}
    missing = [name for name in rule.hyperparameters if complete[name] is None]
    if missing:
        raise ConfigError(
            f"expected values for {missing} of the rule {rule.name!r}, got none; they have no default, so give them"
        )
    return complete


def with_flags(group: Mapping[str, Any], rule: Rule, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``group`` with the flags that it lacks, because it was saved before there was such a flag."""
    flags = {name: value for name, value in rule.hyperparameters.items() if isinstance(value, bool)}
    options = {name: value for name, value in OPTIONS.items() if name in defaults}
    return {**options, **flags, **group}


def number(value: object, name: str, where: str) -> float:
    """``value`` (a number or a one-element tensor) as a float. Raises ConfigError if it is neither."""
    try:
        return float(cast(float, value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"expected {name} to be a number in {where}, got {value!r}; give a number") from error


def check_options(group: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedError for an option, or a pair of them, that cannot be honoured."""
    if group.get("fused") and (other := next((o for o in ("foreach", "differentiable") if group.get(o)), None)):
        raise UnsupportedError(
            f"expected at most one of fused and {other} in {where}, got both; fused and foreach choose nothing here, "
            f"so leave them out"
        )
    reasons = {
        "differentiable": "the update is one kernel that writes in place, and autograd cannot see into it",
        "capturable": "what depends on the step count is computed on the host, which a CUDA graph would not repeat",
    }
    for name, reason in reasons.items():
        if group.get(name):
            raise UnsupportedError(f"expected {name}=False in {where}, got True: {reason}; leave it out")


def parameters_of(group: object, where: str) -> list[Any]:
    """The entries of ``group["params"]``: parameters, or pairs of name and parameter."""
    if not isinstance(group, dict):
        raise ArgumentTypeError(f"expected {where} to be a dict with 'params', got {type(group).__name__}; give a dict")
    if "params" not in group:
        raise MissingKeyError(f"expected 'params' in {where}, got only {sorted(map(str, group))}; give its parameters")
    given = group["params"]
    if isinstance(given, set | frozenset):
        raise ArgumentTypeError(
            f"expected the parameters of {where} in a fixed order, got a set, whose order changes between runs; "
            f"give a list"
        )
    return [given] if isinstance(given, Tensor) else list(given)


def check_parameters(given: Sequence[Any], groups: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise a ConfigError unless ``given`` are parameters that can be optimized, and are in none of ``groups``."""
    named = [isinstance(entry, tuple) for entry in given]
    if (any(named) and not all(named)) or (groups and given and named[0] != ("param_names" in groups[0])):
        raise ConfigError(
            f"expected all parameters with their names or all without, got both kinds in {where} and before; "
            f"give them all as named_parameters() does, or none"
        )
    places = {
        id(param): f"parameter group {g}, position {i}"
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    }
    for position, entry in enumerate(given):
        name, param = entry if isinstance(entry, tuple) else (None, entry)
        place = f"{where}, position {position}" + (f" ({name!r})" if name is not None else "")
        _check_parameter(param, place)
        if id(param) in places:
            raise OwnershipError(
                f"expected every parameter once, got the one at {place} also at {places[id(param)]}; "
                f"remove one of the two"
            )
        places[id(param)] = place


def _check_parameter(param: object, place: str) -> None:
    if not isinstance(param, Tensor):
        raise ArgumentTypeError(
            f"expected a tensor at {place}, got {type(param).__name__}; give parameters, or pairs of name and parameter"
        )
    if param.dtype not in _DTYPES:
        raise ConfigError(
            f"expected a parameter of float32, float64, bfloat16, float16, complex64 or complex128 at {place}, got "
            f"{param.dtype}; convert it or leave it out"
        )
    if not (param.is_leaf or param.retains_grad):
        raise ConfigError(
            f"expected a parameter that is a leaf at {place}, got the result of an operation, which has no gradient "
            f"of its own; give the tensor that it was computed from"
        )
