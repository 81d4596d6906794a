"""Parameters of models that are being built, each cut over the ranks on its own.

Units and spaces are planned by `shard`, when names and the optimizer are known. Until then a parameter's memory is cut
into runs of bytes, rank by rank, and the parameter keeps its shape and its identity. What its values are, rank 0 says:
cutting sends every rank its run of rank 0's. Everything here is collective; nothing here decides when.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from shardstep.collectives import BUILDING, Group
from shardstep.errors import ConfigError, FreedParameterError, RankMismatchError
from shardstep.sharding.freed import FreedParameter, called_name
from shardstep.types import BLOCK_NUMEL


class Builder(Protocol):
    """Who makes cut parameters whole when their values are needed."""

    def touch(self, parameters: "Sequence[CutParameter]") -> None: ...

    def keep(self, parameter: nn.Parameter) -> None: ...


@dataclass(frozen=True)
class Cut:
    """This rank's run of the bytes of one parameter, and what the parameter is while it is whole."""

    run: Tensor
    nbytes: int
    whole_class: type[nn.Parameter]
    group: Group


class CutParameter(FreedParameter):
    """A parameter whose values are whole only while a model is being built and somebody needs them."""

    shardstep_cut: Cut
    builder: ClassVar[Builder | None] = None
    """Who is building at the moment."""

    @classmethod
    def fetch(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        touched = {id(leaf): leaf for leaf in leaves if isinstance(leaf, CutParameter)}
        _builder(next(iter(touched.values())), called_name(func)).touch(list(touched.values()))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        size = self.shardstep_cut.group.size
        return f"Parameter of shape {tuple(self.shape)}, {self.dtype}, cut over {size} ranks while its model is built"

    def __deepcopy__(self, memo: Any) -> Tensor:
        builder = _builder(self, "deepcopy")
        builder.touch([self])
        copied: nn.Parameter = copy.deepcopy(self, memo)
        builder.keep(copied)
        return copied


def _builder(parameter: CutParameter, what: str) -> Builder:
    if CutParameter.builder is None:
        raise FreedParameterError(
            f"{what} needs the values of a parameter of shape {tuple(parameter.shape)} of a model that was built under "
            f"'with shardstep.partitioned():', which are spread over the ranks: call shard(model, optimizer) first, or "
            f"do it on every rank inside another 'with shardstep.partitioned():'"
        )
    return CutParameter.builder


def can_be_cut(parameter: nn.Parameter) -> bool:
    """Whether it is worth while, and its memory is its own; the same on all ranks."""
    if isinstance(parameter, FreedParameter | nn.UninitializedParameter) or parameter.is_meta:
        return False
    storage = parameter.untyped_storage()
    return (
        parameter.numel() >= BLOCK_NUMEL
        and parameter.layout == torch.strided
        and storage.resizable()
        and storage.nbytes() == parameter.nbytes
    )


def cut(parameters: Sequence[nn.Parameter], group: Group) -> list[nn.Parameter]:
    """Cut those that can be; return what must wait because somebody on any rank has another tensor of its memory."""
    parameters = [parameter for parameter in parameters if can_be_cut(parameter)]
    if not parameters or group.size == 1:
        return []
    aliased = _agreed("cuts", parameters, [_aliased(parameter) for parameter in parameters], group)
    for parameter, waits in zip(parameters, aliased, strict=True):
        if not waits:
            _cut(parameter, group)
    return [parameter for parameter, waits in zip(parameters, aliased, strict=True) if waits]


def make_whole(parameters: Sequence[CutParameter]) -> None:
    """Let them be ordinary parameters again."""
    _agreed("gathers", parameters, [False] * len(parameters), parameters[0].shardstep_cut.group)
    for parameter in parameters:
        with torch._C.DisableTorchFunctionSubclass():
            storage = parameter.untyped_storage()
            storage.resize_(parameter.shardstep_cut.nbytes)
            _gather(parameter.shardstep_cut, bytes_of(storage))
            forget(parameter)


def whole_values(parameter: nn.Parameter) -> Tensor:
    """A parameter's values; those of a cut one are gathered for the caller, and it stays cut."""
    if not isinstance(parameter, CutParameter):
        return parameter.detach()
    with torch._C.DisableTorchFunctionSubclass():
        raw = torch.empty(parameter.shardstep_cut.nbytes, dtype=torch.uint8, device=parameter.device)
        _gather(parameter.shardstep_cut, raw)
        return raw.view(parameter.dtype).as_strided(parameter.size(), parameter.stride())


def check_cut(model: nn.Module, group: Group) -> int:
    """How many parameters are cut; a ConfigError if over other ranks than those of ``group``."""
    found = [parameter for parameter in model.parameters() if isinstance(parameter, CutParameter)]
    for parameter in found:
        members = parameter.shardstep_cut.group.members
        if members != group.members:
            raise ConfigError(
                f"expected shard() over the ranks over which the model was cut while it was built, {members}, got "
                f"{group.members}; give partitioned() and shard() the same group"
            )
    return len(found)


def forget(parameter: CutParameter) -> None:
    """Let go of this rank's run; the values come from elsewhere."""
    whole_class = parameter.shardstep_cut.whole_class
    del parameter.shardstep_cut
    parameter.__class__ = whole_class  # type: ignore[assignment]


def _cut(parameter: nn.Parameter, group: Group) -> None:
    storage = parameter.untyped_storage()
    raw = bytes_of(storage)
    runs, nothing = _runs(raw, group.size), raw[:0]
    outgoing = runs if group.rank == 0 else [nothing] * group.size
    incoming = [nothing] * group.size if group.rank == 0 else [runs[group.rank]] + [nothing] * (group.size - 1)
    group.deal(outgoing, incoming, tag=BUILDING, label=f"cut of a parameter of shape {tuple(parameter.shape)}").wait()
    kept = Cut(runs[group.rank].clone(), raw.numel(), type(parameter), group)
    storage.resize_(0)
    parameter.__class__ = CutParameter
    parameter.shardstep_cut = kept  # type: ignore[attr-defined]


def _gather(cut: Cut, raw: Tensor) -> None:
    runs = _runs(raw, cut.group.size)
    runs[cut.group.rank].copy_(cut.run)
    label = "gather of a parameter while its model is built"
    cut.group.deal([cut.run] * cut.group.size, runs, tag=BUILDING, label=label).wait()


def _runs(raw: Tensor, size: int) -> list[Tensor]:
    """Each rank's run; the last ones may be shorter than the others, or empty."""
    length = -(-raw.numel() // size)
    return [raw[rank * length : (rank + 1) * length] for rank in range(size)]


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A 1-D view of all of its bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _aliased(parameter: nn.Parameter) -> bool:
    """Whether another tensor has the same memory: it must not vanish under it, nor may what it writes be lost."""
    storage = parameter.untyped_storage()
    return bool(torch._C._storage_Use_Count(storage._cdata) > 2)  # the parameter and `storage`


def _agreed(act: str, parameters: Sequence[nn.Parameter], flags: Sequence[bool], group: Group) -> list[bool]:
    """Flags that are set on any rank; a RankMismatchError where ranks build different models."""
    own = [act, [[*parameter.shape, str(parameter.dtype)] for parameter in parameters], list(flags)]
    everyone = group.exchange_json(own, label="comparison of what is built")
    for rank, other in enumerate(everyone):
        if other[:2] != everyone[0][:2]:
            raise RankMismatchError(
                f"expected every rank to build the same model in the same order, but rank {rank} {other[0]} parameters "
                f"of {other[1]} while rank 0 {everyone[0][0]} parameters of {everyone[0][1]}; under "
                f"'with shardstep.partitioned():' every rank runs the same code"
            )
    return [any(column) for column in zip(*(other[2] for other in everyone), strict=True)]
