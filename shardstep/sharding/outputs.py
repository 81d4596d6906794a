"""The tensors that a module hands out: in its output, of whatever kind, and in attributes that it writes.

Nothing here changes an output, hooks or frees.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_WITHOUT_TENSORS = (str, bytes, int, float, complex, bool, type, Enum, type(None))


def tensors_in(value: Any) -> tuple[list[Tensor], bool]:
    """Every tensor in nested containers and objects; and whether there is something that cannot be looked into."""
    if isinstance(value, Tensor):
        return [value], False
    found: list[Tensor] = []
    return found, _collect(value, found, set())


def _collect(value: Any, found: list[Tensor], seen: set[int]) -> bool:
    if isinstance(value, Tensor):
        found.append(value)
        return False
    if isinstance(value, _WITHOUT_TENSORS) or id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, FunctionType | MethodType | nn.Module):
        return True
    inside = [item for part in _parts(value) for item in part]
    known = isinstance(value, Collection) or hasattr(value, "__dict__") or hasattr(type(value), "__slots__")
    hidden = [_collect(item, found, seen) for item in inside]
    return any(hidden) or not known


def _parts(value: Any) -> Iterator[Collection[Any]]:
    """What a container or an object holds."""
    if isinstance(value, Mapping):
        yield value.values()
    elif isinstance(value, Collection):
        yield value
    elif dataclasses.is_dataclass(value):
        yield [getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)]
    yield getattr(value, "__dict__", {}).values()
    slots = [name for base in type(value).__mro__ for name in _names(getattr(base, "__slots__", ()))]
    yield [getattr(value, name) for name in slots if hasattr(value, name)]


def _names(slots: Any) -> Collection[str]:
    return (slots,) if isinstance(slots, str) else slots


def written_attributes(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The attributes of modules in ``module`` that hold tensors which depend on others (losses of routers and such)."""
    return [
        (inner, name)
        for inner in module.modules()
        for name, value in vars(inner).items()
        if not name.startswith("_") and any(tensor.grad_fn is not None for tensor in _shallow(value))
    ]


def tensors_at(places: list[tuple[nn.Module, str]]) -> list[Tensor]:
    """The tensors that are in attributes now."""
    return [tensor for module, name in places for tensor in _shallow(getattr(module, name, None))]


def _shallow(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [item for item in items if isinstance(item, Tensor)]
