"""A unit at run time: a module, or several small ones, and the flat spaces that are gathered and freed with them."""

from torch import nn

from shardstep.config import Stage
from shardstep.sharding.space import Space


class Unit:
    """The root unit is named '' and comes first in the declared order of a model's units."""

    def __init__(self, name: str, modules: list[nn.Module], stage: Stage, spaces: list[Space]) -> None:
        self.name, self.modules, self.stage, self.spaces = name, modules, stage, spaces
        self._done: set[nn.Module] = set()

    def start_gather(self, phase: str, *, ahead: bool = False) -> None:
        for space in self.spaces:
            space.start_gather(phase, ahead=ahead)

    def finish_gather(self) -> None:
        for space in self.spaces:
            space.finish_gather()

    def complete(self, module: nn.Module) -> bool:
        """Whether all of its modules have run, in any order, now that ``module`` has."""
        self._done.add(module)
        return len(self._done) == len(self.modules)

    def free(self) -> None:
        self._done.clear()
        for space in self.spaces:
            space.free()

    def hold(self, change: int) -> None:
        """One more (1) or one less (-1) ``gathered`` block keeps the unit whole."""
        for space in self.spaces:
            space.held += change
