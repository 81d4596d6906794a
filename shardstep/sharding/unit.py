"""A unit at run time: a module and the flat spaces that are gathered and freed together with it."""

from torch import nn

from shardstep.config import Stage
from shardstep.sharding.space import Space


class Unit:
    """The root unit is named '' and comes first in the declared order of a model's units."""

    def __init__(self, name: str, module: nn.Module, stage: Stage, spaces: list[Space]) -> None:
        self.name, self.module, self.stage, self.spaces = name, module, stage, spaces

    @property
    def is_whole(self) -> bool:
        """Whether the parameters are whole that ``free`` would free."""
        return any(space.communicates and space.is_whole for space in self.spaces)

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

    def free(self) -> None:
        for space in self.spaces:
            space.free()

    def hold(self, change: int) -> None:
        """One more (1) or one less (-1) ``gathered`` block keeps the unit whole."""
        for space in self.spaces:
            space.held += change
