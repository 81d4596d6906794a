"""Whether the model still computes with the parameters that were sharded.

``load_state_dict(assign=True)``, ``model.double()`` and the like put other tensors in their place; the engine
would go on to update memory that no module reads. Nothing here repairs that: it raises.
"""

from torch import nn

from shardstep.errors import SequenceError
from shardstep.sharding.unit import Unit


class Attached:
    """The places in a model's modules where the engine's parameters belong, and the modules that there were."""

    def __init__(self, model: nn.Module, units: list[Unit]) -> None:
        spaces = {id(parameter): space for unit in units for space in unit.spaces for parameter in space.parameters}
        self._places = [
            (module, key, f"{name}.{key}" if name else key, parameter, spaces[id(parameter)])
            for name, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in spaces
        ]
        self._model, self._known = model, {id(parameter) for parameter in model.parameters()}
        self._remember()

    def check(self) -> None:
        """Raise a SequenceError that names the first parameter that is another one now, or is new."""
        if self._children != self._children_then or list(map(len, self._owned)) != self._owned_then:
            self._look_for_new_parameters()
        for module, key, name, parameter, space in self._places:
            if module._parameters.get(key) is not parameter:
                raise SequenceError(_sentence(name, "another object is there now"))
            if space.is_whole and parameter.untyped_storage()._cdata != space.flat.untyped_storage()._cdata:
                raise SequenceError(_sentence(name, f"its data, now {parameter.dtype}, lies in other memory"))

    def _remember(self) -> None:
        """What tells whether any module has other children or more parameters than now, compared without a loop."""
        modules = list(self._model.modules())
        self._children, self._owned = [m._modules for m in modules], [m._parameters for m in modules]
        self._children_then, self._owned_then = list(map(dict, self._children)), list(map(len, self._owned))

    def _look_for_new_parameters(self) -> None:
        for name, parameter in self._model.named_parameters():
            if id(parameter) not in self._known:
                raise SequenceError(
                    f"expected modules that are attached after shard() to have no parameters, but {name!r}, of shape "
                    f"{tuple(parameter.shape)}, is new: no rank shards or updates it; build the whole model, then call "
                    f"shard()"
                )
        self._remember()


def _sentence(name: str, what: str) -> str:
    return (
        f"expected {name!r} to be the parameter that shard() cut, but {what}: convert and replace parameters before "
        f"shard(), and write values inside 'with shardstep.gathered(model):' or by load_state_dict(assign=False)"
    )
