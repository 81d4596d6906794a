"""Which hyper-parameters and parameters there may be: the checks that optimizers share. NaN passes none of them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shardstep.errors import ConfigError
from shardstep.optim.groups import number


def check_at_least_zero(group: Mapping[str, Any], where: str, *names: str) -> None:
    """Raise ConfigError unless each of these numbers is 0 or more."""
    for name in names:
        if not number(group[name], name, where) >= 0.0:
            raise refusal(f"{name} ≥ 0", where, group[name])


def check_fractions(group: Mapping[str, Any], where: str, name: str, count: int = 2) -> None:
    """Raise ConfigError unless the tuple has ``count`` numbers in [0, 1)."""
    for index, value in enumerate(check_tuple(group, where, name, count)):
        if not 0.0 <= value < 1.0:
            raise refusal(f"0 ≤ {name}[{index}] < 1", where, group[name][index])


def check_tuple(group: Mapping[str, Any], where: str, name: str, count: int = 2) -> tuple[float, ...]:
    """The numbers of a tuple. Raises ConfigError unless there are ``count``."""
    given = group[name]
    if not isinstance(given, tuple | list) or len(given) != count:
        words = {2: "two", 3: "three"}[count]
        places = ", ".join(f"{name.removesuffix('s')}{place}" for place in range(1, count + 1))
        raise ConfigError(f"expected {name} to be {words} numbers in {where}, got {given!r}; give ({places})")
    return tuple(number(value, f"{name}[{index}]", where) for index, value in enumerate(given))


def check_matrix(param: Tensor, where: str, kind: str) -> None:
    """Raise ConfigError unless it is a matrix; ``kind``: the optimizer that asks."""
    if param.ndim != 2:
        raise ConfigError(
            f"expected parameters of two dimensions for {kind}, got one of shape {tuple(param.shape)} at {where}; give "
            f"it to AdamW, and both to Combined({kind}(...), AdamW(...))"
        )


def refusal(expected: str, where: str, got: object) -> ConfigError:
    """The error for a number out of its range."""
    return ConfigError(f"expected {expected} in {where}, got {got}; give a value in that range")
