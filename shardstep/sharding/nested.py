"""Tensors in nested values, as modules take and return them: tuples, lists, mappings and dataclasses.

Values are copied on the way to what changes and stay the same objects elsewhere. Nothing here looks into a tensor.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` of every tensor in it; of one object, always the same result."""
    found: dict[int, Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in found:
                found[id(value)] = function(value)
            return found[id(value)]
        if isinstance(value, Mapping):
            return _with_items(value, {key: visit(item) for key, item in value.items()})
        if isinstance(value, list | tuple):
            return _with_elements(value, [visit(item) for item in value])
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
            return _with_fields(value, {name: visit(getattr(value, name)) for name in names})
        return value

    return visit(value)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with its floating-point tensors in ``dtype``."""
    return mapped(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _with_items(value: Any, items: dict[Any, Any]) -> Any:
    if all(items[key] is item for key, item in value.items()):
        return value
    if type(value) is dict:
        return items
    changed = copy.copy(value)  # a class of its own: ModelOutput, BatchEncoding, OrderedDict
    for key, item in items.items():
        changed[key] = item
    return changed


def _with_elements(value: Any, elements: list[Any]) -> Any:
    if all(one is other for one, other in zip(value, elements, strict=True)):
        return value
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*elements)
    return type(value)(elements)


def _with_fields(value: Any, fields: dict[str, Any]) -> Any:
    if all(getattr(value, name) is item for name, item in fields.items()):
        return value
    changed = copy.copy(value)
    for name, item in fields.items():
        object.__setattr__(changed, name, item)  # frozen ones too
    return changed
