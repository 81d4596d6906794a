"""Which precision each module computes in, and the casts where one meets another.

A module whose precision is another than that of what calls it is given floating-point tensors in its own dtype, and
what it returns goes on in the dtype that it was given. Buffers keep their dtypes. Nothing here moves parameters.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardstep.config import Precision, PrecisionChoice, matches
from shardstep.errors import ConfigError
from shardstep.sharding.modules import named_children, own_parameters
from shardstep.sharding.nested import in_dtype, mapped


class Precisions:
    """Those of a model's modules and parameters; None where parameters are taken as they are."""

    def __init__(self, model: nn.Module, choice: PrecisionChoice) -> None:
        self._choice = choice
        self._of_parameter: dict[int, tuple[Precision | None, str]] = {}
        self._borders: list[tuple[nn.Module, torch.dtype, torch.dtype | None]] = []
        seen: set[int] = set()
        self.root = self._resolved(("",), model, None)
        for path, module, own, caller in self._walk(("",), model, self.root, self.root):
            if id(module) in seen:
                continue
            seen.add(id(module))
            for parameter in own_parameters(module):
                self._note(parameter, own, path[-1])
            if own is not None and (caller is None or own.params != caller.params):
                self._borders.append((module, own.params, None if caller is None else caller.params))
        self._check_patterns(model)

    def of(self, parameter: nn.Parameter) -> Precision | None:
        """That of the modules which have it."""
        return self._of_parameter[id(parameter)][0]

    def install(self) -> None:
        """Cast at the borders from now on."""
        for module, inner, outer in self._borders:
            _Border(inner, outer).install(module)

    def _walk(
        self, path: tuple[str, ...], module: nn.Module, own: Precision | None, caller: Precision | None
    ) -> Iterator[tuple[tuple[str, ...], nn.Module, Precision | None, Precision | None]]:
        """(names from the root down, module, its precision, that of what calls it) of every module."""
        yield path, module, own, caller
        calls = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        for key, child in named_children(module):
            below = (*path, f"{path[-1]}.{key}" if path[-1] else key)
            yield from self._walk(below, child, self._resolved(below, child, own), own if calls else caller)

    def _resolved(self, path: tuple[str, ...], module: nn.Module, outer: Precision | None) -> Precision | None:
        choice = self._choice
        if isinstance(choice, Mapping):
            found = (one for pattern, one in choice.items() if any(matches(name, pattern) for name in path))
            chosen = next(found, None)
        elif callable(choice):
            chosen = choice(path[-1], module) or outer
        else:
            chosen = choice
        if chosen is not None and not isinstance(chosen, Precision):
            raise ConfigError(
                f"expected precision to be a shardstep.Precision, name patterns with one each, a function (name, "
                f"module) -> Precision or None, or None, got {chosen!r} for module {path[-1]!r}"
            )
        return chosen

    def _check_patterns(self, model: nn.Module) -> None:
        for pattern in self._choice if isinstance(self._choice, Mapping) else ():
            if not any(matches(path[-1], pattern) for path, *_ in self._walk(("",), model, None, None)):
                raise ConfigError(
                    f"expected each pattern of precision to match a module of {type(model).__name__}, but {pattern!r} "
                    f"matches none; patterns are dotted names, with '*' for one part, or '*' alone for all"
                )

    def _note(self, parameter: nn.Parameter, own: Precision | None, name: str) -> None:
        before, where = self._of_parameter.setdefault(id(parameter), (own, name))
        if before != own:
            raise ConfigError(
                f"expected one precision for a parameter that two modules have, got {before} in {where!r} and {own} in "
                f"{name!r}; give both modules the same"
            )


class _Border:
    """The casts of one module: ``inner`` is its dtype, ``outer`` that of its caller, where it is known."""

    def __init__(self, inner: torch.dtype, outer: torch.dtype | None) -> None:
        self._inner, self._outer = inner, outer
        self._given: list[torch.dtype | None] = []

    def install(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given: list[torch.dtype] = []

        def inward(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            given.append(tensor.dtype)
            return tensor.to(self._inner)

        cast = mapped((args, kwargs), inward)
        self._given.append(given[0] if given else self._outer)
        return cast

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        dtype = self._given.pop() if self._given else None
        if dtype is None or output is None:  # nothing to go by, or an exception on its way
            return None
        return in_dtype(output, dtype)
