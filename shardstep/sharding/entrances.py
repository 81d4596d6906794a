"""Where a model is entered: the hooks of its units, and of the modules of its root unit, which may be called alone.

A module of the root that runs inside another one is none of their business. Nothing here gathers or frees.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from shardstep.sharding.freed import NotCopied
from shardstep.sharding.modules import named_children
from shardstep.sharding.unit import Unit


class Entered(Protocol):
    """Who is told."""

    def runs_another(self, module: nn.Module) -> bool: ...

    def before_forward(self, order: int, module: nn.Module, args: Any, kwargs: Any) -> Any: ...

    def after_forward(self, module: nn.Module, output: Any) -> Any: ...


def rest_of_root(units: list[Unit]) -> Iterator[nn.Module]:
    """The modules of the root unit, without the root itself."""
    seen = {id(module) for unit in units for module in unit.modules}

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        for _, child in named_children(module):
            if id(child) not in seen:
                seen.add(id(child))
                yield child
                yield from visit(child)

    return visit(units[0].modules[0])


class Before(NotCopied):
    """Runs before the forward of a unit; or of an ``inner`` module of the root, if the model's own does not run."""

    def __init__(self, hooks: Entered, order: int, inner: bool) -> None:
        self._hooks, self._order, self._inner = hooks, order, inner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _untraced(self._run, module, args, kwargs)
        return self._run(module, args, kwargs)

    def _run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._inner and self._hooks.runs_another(module):
            return None
        return self._hooks.before_forward(self._order, module, args, kwargs)


class After(NotCopied):
    """Runs after a forward, also one that raised."""

    def __init__(self, hooks: Entered) -> None:
        self._hooks = hooks

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return _untraced(self._hooks.after_forward, module, output)
        return self._hooks.after_forward(module, output)


@torch._disable_dynamo  # type: ignore[attr-defined]  # which imports the compiler: so it is called only where that is at work
def _untraced(function: Callable[..., Any], *args: Any) -> Any:
    """Call what a compiled module must not look into: what it does changes with every step."""
    return function(*args)
