"""Models that were built on the meta device get their tensors module by module, and are cut as they do.

A module's own parameters and buffers come to be on a real device, its `reset_parameters()` fills them, and they are cut
before the next module's are made; children come before parents, as when the model is built. With a file of weights only
those buffers are made that a file does not have. What is left unfilled is found, and named.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardstep.collectives import Group
from shardstep.errors import ConfigError
from shardstep.sharding.construction import Construction
from shardstep.sharding.cut import bytes_of
from shardstep.sharding.first_values import put

_UNFILLED = 0xA5
"""The byte that new memory is filled with."""


def real_device() -> torch.device:
    """Where a model on meta is going to be: where torch makes tensors by default."""
    default = torch.get_default_device()
    return torch.device("cpu") if default.type == "meta" else default


def check(model: nn.Module, has_file: bool) -> None:
    """Raise a ConfigError for a module on meta that cannot be given values."""
    for name, module in model.named_modules():
        missing = sorted({*_meta_buffers(module, has_file), *(() if has_file else _meta_parameters(module))})
        if missing and not callable(getattr(module, "reset_parameters", None)):
            raise ConfigError(
                f"expected {type(module).__name__} {name!r} to have reset_parameters(), which fills what it has on the "
                f"meta device ({', '.join(missing)}), but it has none; write it, or build the model under "
                f"'with shardstep.partitioned():' instead of 'with torch.device(\"meta\"):'"
            )
        for key, parameter in _meta_parameters(module).items():
            if weakref.getweakrefcount(parameter) or parameter._backward_hooks or _accumulate_hooks(parameter):
                raise ConfigError(
                    f"expected nothing to refer weakly to {key!r} of {name!r} and no hooks on it while it is on the "
                    f"meta device, since it becomes another tensor; build {type(module).__name__} under "
                    f"'with shardstep.partitioned():'"
                )


def materialise(model: nn.Module, device: torch.device, group: Group) -> None:
    """Give every parameter and buffer on meta its first values, and cut the parameters. Collective."""
    construction = Construction(group)
    with construction.touchable():
        for name, module in _children_first("", model, set()):
            parameters = _meta_parameters(module)
            for parameter in parameters.values():
                put(parameter, _unfilled(parameter, device))
            _fill(name, module, has_file=False, device=device, parameters=parameters)
            construction.cut(parameters.values())
        construction.cut(())


def materialise_buffers(model: nn.Module, device: torch.device) -> None:
    """Give those buffers on meta that a file of weights does not have their values."""
    for name, module in model.named_modules():
        _fill(name, module, has_file=True, device=device, parameters={})


def _fill(
    name: str, module: nn.Module, *, has_file: bool, device: torch.device, parameters: dict[str, nn.Parameter]
) -> None:
    """Have the module fill its parameters and buffers."""
    buffers = _meta_buffers(module, has_file)
    for key, buffer in buffers.items():
        module._buffers[key] = _unfilled(buffer, device)
    if not parameters and not buffers:
        return
    reset: Any = module.reset_parameters
    with torch.no_grad():
        reset()
    now = {**parameters, **{key: module._buffers[key] for key in buffers}}
    left = [key for key, tensor in now.items() if tensor is not None and _is_unfilled(tensor)]
    if left:
        raise ConfigError(
            f"expected reset_parameters() of {type(module).__name__} {name!r} to fill all that it has on the meta "
            f"device, but it left {', '.join(map(repr, left))} as it was; fill it there, or build the model under "
            f"'with shardstep.partitioned():' instead of 'with torch.device(\"meta\"):'"
        )


def _children_first(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) not in seen:
        seen.add(id(module))
        for key, child in module.named_children():
            yield from _children_first(f"{name}.{key}" if name else key, child, seen)
        yield name, module


def _meta_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        key: parameter for key, parameter in module._parameters.items() if parameter is not None and parameter.is_meta
    }


def _meta_buffers(module: nn.Module, has_file: bool) -> dict[str, Tensor]:
    """Its buffers on meta, but for those that a file has."""
    return {
        key: buffer
        for key, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and not (has_file and key not in module._non_persistent_buffers_set)
    }


def _accumulate_hooks(parameter: nn.Parameter) -> Any:
    return getattr(parameter, "_post_accumulate_grad_hooks", None)


def _unfilled(tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_like(tensor, device=device, requires_grad=False)
    bytes_of(made.untyped_storage()).fill_(_UNFILLED)
    return made.detach()


def _is_unfilled(tensor: Tensor) -> bool:
    """Whether its first and its last element are as they were made."""
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor.is_meta
    ends = tensor.detach().flatten()[:: max(1, tensor.numel() - 1)]
    return bool((ends.contiguous().view(torch.uint8) == _UNFILLED).all())
