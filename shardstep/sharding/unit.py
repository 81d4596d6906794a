"""A unit at run time: a module, or several small ones, and the flat spaces that are gathered and freed with them."""

from torch import nn

from shardstep.config import Stage
from shardstep.sharding.space import Space


class Unit:
    """The root unit is named '' and comes first in the declared order of a model's units."""

    def __init__(self, name: str, modules: list[nn.Module], stage: Stage, spaces: list[Space]) -> None:
        self.name, self.modules, self.stage, self.spaces = name, modules, stage, spaces
        self._modules, self._done = set(modules), set[nn.Module]()

    @property
    def is_whole(self) -> bool:
        """Whether the parameters are whole that ``free`` would free."""
        return any(space.communicates and space.is_whole for space in self.spaces)

    @property
    def is_freed(self) -> bool:
        """Whether some of the parameters are not whole, or still on their way."""
        return any(space.communicates and not space.is_whole for space in self.spaces)

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"unit {self.name!r}" if self.name else "the root unit"

    def start_gather(self, phase: str, *, ahead: bool = False) -> None:
        for space in self.spaces:
            space.start_gather(phase, ahead=ahead)

    def finish_gather(self) -> None:
        for space in self.spaces:
            space.finish_gather()

    def has(self, module: nn.Module) -> bool:
        """Whether it is one of the modules; not a part of one."""
        return module in self._modules

    def complete(self, module: nn.Module) -> bool:
        """Whether all of its modules have run, in any order, now that ``module`` has."""
        self._done.add(module)
        return self._modules <= self._done

    def free(self) -> None:
        self._done.clear()
        for space in self.spaces:
            space.free()

    def hold(self, change: int) -> None:
        """One more (1) or one less (-1) ``gathered`` block keeps the unit whole."""
        for space in self.spaces:
            space.held += change
