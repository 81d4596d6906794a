"""partitioned(): models that no rank could hold whole are cut while they are built.

[Note: when a parameter is cut] A module that is registered in another is complete, by custom: its parameters are cut
then, and those that are no module's child at the end of the block. What a constructor does with them later (it ties
them, applies an initialiser to all modules, loads values) makes them whole again for as long as nothing else is
touched, and what was written is kept. So random numbers are drawn for whole tensors in the ordinary order, and each
rank holds its runs, what is touched, and the modules that are not registered yet.

torch's own hooks for registrations tell of modules; no class or function is patched or replaced.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from shardstep.collectives import Group, ProcessGroup
from shardstep.config import Stage
from shardstep.errors import SequenceError
from shardstep.sharding.cut import CutParameter, cut, make_whole
from shardstep.sharding.memory import laying_out


class Construction:
    """Knows which parameters are whole at the moment, and cuts them again."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._whole: list[nn.Parameter] = []
        self._owners: list[weakref.ref[nn.Module]] = []
        """Every module that got a parameter of its own; weakly, since a constructor may throw modules away."""

    @contextmanager
    def touchable(self) -> Iterator[None]:
        """Inside, the values of cut parameters may be read and written."""
        outer, CutParameter.builder = CutParameter.builder, self
        try:
            yield
        finally:
            CutParameter.builder = outer

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, modules are cut when they are registered."""
        hooks = [
            register_module_parameter_registration_hook(lambda owner, *_: self._note(owner)),
            register_module_module_registration_hook(lambda _, __, module: self._cut_module(module)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def touch(self, parameters: Sequence[CutParameter]) -> None:
        """Make these whole, and cut what was whole before."""
        self.cut(())
        make_whole(parameters)
        self._whole += parameters

    def keep(self, parameter: nn.Parameter) -> None:
        """Cut a whole parameter when the next one is touched."""
        self._whole.append(parameter)

    def cut(self, parameters: Iterable[nn.Parameter]) -> None:
        """Cut these and whatever else is whole, but for what has to wait."""
        chosen = {id(parameter): parameter for parameter in (*self._whole, *parameters)}
        self._whole = cut(list(chosen.values()), self._group)

    def finish(self) -> None:
        """Cut what no module has been registered with; ranks agree on which modules there still are."""
        alive = [owner() is not None for owner in self._owners]
        everyone = self._group.exchange_json(alive, label="comparison of what has been built")
        on_all = [all(column) for column in zip(*everyone, strict=False)]
        owners = [owner() for owner, kept in zip(self._owners, on_all, strict=False) if kept]
        self.cut(p for owner in owners if owner is not None for p in owner.parameters(recurse=False))

    def _note(self, owner: nn.Module) -> None:
        if not self._owners or self._owners[-1]() is not owner:
            self._owners.append(weakref.ref(owner))

    def _cut_module(self, module: nn.Module | None) -> None:
        if module is not None:
            self.cut(module.parameters())


@contextmanager
def partitioned(*, stage: int = 3, group: ProcessGroup | None = None) -> Iterator[None]:
    """Models built inside the ``with`` block are cut over the ranks of ``group`` as their modules are made.

    Every rank runs the same code inside; it may read and write parameters, which are gathered for it. Tensors are
    initialised as without the block, from the same random numbers, as rank 0 draws them. Call ``shard(model,
    optimizer)`` afterwards, with any options. ``stage``: below 3, where ranks keep whole parameters anyway, nothing
    is cut.
    """
    ranks = Group(group)
    if not Stage.numbered(stage, "partitioned()").shard_params or ranks.size == 1:
        yield
        return
    if CutParameter.builder is not None:
        raise SequenceError("expected one 'with shardstep.partitioned():' at a time, got one inside another")
    construction = Construction(ranks)
    with laying_out(), construction.touchable():
        with construction.watching():
            yield
        construction.finish()
