"""What a parameter is while the values that a step has made are still on their way (``overlap_param_gather=True``).

As in `freed`, swapping the class is what makes a read noticed: whoever needs the values, or writes them, waits for
those of the whole space first, and from then on it is an ordinary ``nn.Parameter`` again. Every rank has posted its
messages before it leaves ``optimizer.step()``, so waiting is each rank's own affair: nothing is agreed on here, and
nothing is sent. What was taken from a parameter before the step, such as ``p.data``, waits for nothing.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from shardstep.sharding.freed import WITHOUT_VALUES, AbsentParameter


class Home(Protocol):
    """The flat space that a parameter belongs to."""

    def arrive(self) -> None:
        """Wait until the parameters are whole, and let them be ordinary ones."""
        ...


class ArrivingParameter(AbsentParameter):
    """A parameter whose new values are on their way to this rank. A freed one's storage is empty; this one's has bytes,
    old and new ones.
    """

    answers = WITHOUT_VALUES - {"untyped_storage"}
    home: Home

    @classmethod
    def fetch(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        for kind in types:
            if issubclass(kind, ArrivingParameter):
                kind.home.arrive()

    def __deepcopy__(self, memo: Any) -> Tensor:
        self.home.arrive()
        copied: Tensor = copy.deepcopy(self, memo)  # the parameter is an ordinary one now
        return copied
