"""What a parameter is while its unit is freed: shape, dtype and name stay, the values are gone.

Swapping the class is what makes a read of freed memory noticed: while a parameter is whole it is an ordinary
``nn.Parameter`` and costs nothing extra. A read inside a forward of the model gathers the parameter's unit late; any
other is an error. Nothing here gathers or frees memory itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from shardstep.errors import ConfigError, FreedParameterError

WITHOUT_VALUES = frozenset(
    """
    shape size dim ndim numel nelement stride dtype device layout element_size itemsize nbytes __len__ __hash__ __dir__
    requires_grad requires_grad_ is_leaf grad grad_fn retains_grad _version output_nr name _base _cdata type get_device
    is_floating_point is_complex is_sparse is_contiguous is_cpu is_cuda is_meta is_mkldnn is_quantized is_nested
    is_shared is_inference is_pinned untyped_storage storage_offset register_hook register_post_accumulate_grad_hook
    _backward_hooks _post_accumulate_grad_hooks
    """.split()
)
"""What a freed parameter still answers; everything else would read memory that is not there."""

_IN_PLACE = frozenset("__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__".split())


class Home(Protocol):
    """The flat space that a parameter belongs to."""

    unit_name: str

    def name_of(self, parameter: nn.Parameter) -> str: ...

    def gather_late(self) -> bool:
        """Make the parameters whole if a forward of the model is running; whether one is."""
        ...


class AbsentParameter(nn.Parameter):
    """A parameter whose values are not here, or not yet; ``answers``: what it answers without them."""

    answers: ClassVar[frozenset[str]] = WITHOUT_VALUES

    @classmethod
    def of(cls, home: object) -> type[Self]:
        """The class of such parameters of one flat space."""
        return type(cls.__name__, (cls,), {"home": home})

    @classmethod
    def fetch(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """Make those among the arguments of a call ordinary parameters, with values, or raise."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if called_name(func) in cls.answers:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        cls.fetch(func, types, args, given)
        return func(*args, **given)


class FreedParameter(AbsentParameter):
    """A parameter whose values are spread over the ranks until its unit is gathered again."""

    home: Home

    @classmethod
    def fetch(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        name = called_name(func)
        freed = next(arg for arg in _flatten(args, kwargs) if isinstance(arg, FreedParameter))
        if _writes(func, name, freed, args, kwargs) or not freed.home.gather_late():
            raise FreedParameterError(_sentence(freed, name))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"Parameter {self.home.name_of(self)!r} of shape {tuple(self.shape)}, {self.dtype}, freed "
            f"(its unit {self.home.unit_name!r} is not gathered)"
        )

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __deepcopy__(self, memo: object) -> Tensor:
        raise ConfigError(NOT_COPIED)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise ConfigError(NOT_COPIED)


class NotCopied:
    """A part of the engine that modules refer to: copying or pickling the model meets it, and is told."""

    def __reduce_ex__(self, protocol: object) -> Any:
        raise ConfigError(NOT_COPIED)


NOT_COPIED = (
    "expected a model that is not sharded to copy or pickle, got one whose values are spread over the ranks: copy it "
    "before shard(), or save model.state_dict() and load that into a model built anew"
)


def called_name(func: Callable[..., Any]) -> str:
    """The function's name, or the attribute's when ``func`` gets or sets one."""
    name: str = getattr(func, "__name__", "?")
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name


def _writes(func: Any, name: str, freed: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the call would write into the parameter; what it wrote would be lost when the unit is freed again."""
    if freed is kwargs.get("out"):
        return True
    in_place = name in _IN_PLACE or getattr(func, "__name__", "") == "__set__"
    in_place = in_place or (name.endswith("_") and not name.endswith("__"))
    return in_place and bool(args) and args[0] is freed


def _flatten(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments, with lists and tuples of tensors opened (torch.stack and the like)."""
    flat: list[Any] = []
    for arg in [*args, *kwargs.values()]:
        flat.extend(arg if isinstance(arg, list | tuple) else [arg])
    return flat


def _sentence(parameter: FreedParameter, what: str) -> str:
    name, unit_name = parameter.home.name_of(parameter), parameter.home.unit_name
    owner = name.rpartition(".")[0] or "the model"
    unit = f"unit {unit_name!r}" if unit_name else "the root unit"
    return (
        f"{what} needs the values of {name!r}, which are freed: they are whole only inside the "
        f"forward and backward of {unit}, and {owner!r} was used outside it; call the model itself, or make the method "
        f"that is called an entry with sharded.add_entry('<method>'), or read and write parameters inside "
        f"'with shardstep.gathered(model):'"
    )
