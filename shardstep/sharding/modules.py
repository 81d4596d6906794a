"""The modules of a model and the parameters that are their own; the same as torch's, except where Keras is.

A Keras layer on torch is an nn.Module, but layers in it need not be registered as its children; every container lists
all variables inside it once more; and what layers write in their forward (BatchNorm's statistics, the states of
Dropout's seeds) are Parameters, not buffers. Nothing here imports Keras, changes a model, or reads a value.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from shardstep.errors import ConfigError


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by its first name, the model itself first; layers of Keras by their Keras names."""
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for key, child in named_children(module):
            yield from visit(f"{name}.{key}" if name else key, child)

    return visit("", model)


def named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules directly in ``module``."""
    if not is_keras(module):
        yield from module.named_children()
        return
    layer: Any = module
    yield from ((inner.name, inner) for inner in layer._layers)
    yield from ((name, child) for name, child in module.named_children() if name != "_torch_params")


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``module`` without those of its children."""
    if not is_keras(module):
        return list(module.parameters(recurse=False))
    layer: Any = module
    return [variable.value for variable in (*layer._trainable_variables, *layer._non_trainable_variables)]


def weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters by name, but for those that layers of Keras write in their forward."""
    written = {id(parameter) for parameter in (*statistics(model).values(), *seeds(model))}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in written]


def statistics(model: nn.Module) -> dict[str, nn.Parameter]:
    """What layers of Keras keep besides weights and seeds, as BatchNorm its moving averages, by layer and name."""
    return {
        f"{name}.{variable.name}": variable.value
        for name, layer in _layers_of_keras(model)
        for variable in layer._non_trainable_variables
    }


def seeds(model: nn.Module) -> list[nn.Parameter]:
    """The states of the random generators of layers of Keras."""
    return [generator.state.value for _, layer in _layers_of_keras(model) for generator in layer._seed_generators]


def check_built(model: nn.Module) -> None:
    """Raise ConfigError for a layer of Keras that has no variables yet."""
    for name, layer in _layers_of_keras(model):
        if not layer.built:
            raise ConfigError(
                f"expected every layer to be built before shard(), got {name or 'the model'!r} without its variables; "
                f"call the model once on a batch, or give it an Input"
            )


def is_keras(module: nn.Module) -> bool:
    """Whether it is a layer (or model) of Keras 3 on torch."""
    return any(base.__name__ == "TorchLayer" for base in type(module).__mro__)


def _layers_of_keras(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in named_modules(model) if is_keras(module))
