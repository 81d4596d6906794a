"""What a parameter is while its unit is freed: shape, dtype and name stay, the values are gone.

Swapping the class is what makes a read of freed memory an error instead of a crash: while a parameter is
whole it is an ordinary ``nn.Parameter`` and costs nothing extra. Nothing here gathers or frees memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardstep.errors import FreedParameterError

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


class FreedParameter(nn.Parameter):
    """A parameter whose values are spread over the ranks until its unit is gathered again."""

    shardstep_name: str
    shardstep_unit: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if called_name(func) in WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        freed = next(arg for arg in _flatten(args, kwargs) if isinstance(arg, FreedParameter))
        raise FreedParameterError(_sentence(freed, called_name(func)))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"Parameter {self.shardstep_name!r} of shape {tuple(self.shape)}, {self.dtype}, freed "
            f"(its unit {self.shardstep_unit!r} is not gathered)"
        )

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __deepcopy__(self, memo: object) -> Tensor:
        raise FreedParameterError(_sentence(self, "deepcopy"))


def called_name(func: Callable[..., Any]) -> str:
    """The function's name, or the attribute's when ``func`` gets or sets one."""
    name: str = getattr(func, "__name__", "?")
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name


def _flatten(args: Sequence[Any], kwargs: dict[str, Any] | None) -> list[Any]:
    """Arguments, with lists and tuples of tensors opened (torch.stack and the like)."""
    flat: list[Any] = []
    for arg in [*args, *(kwargs or {}).values()]:
        flat.extend(arg if isinstance(arg, list | tuple) else [arg])
    return flat


def _sentence(parameter: FreedParameter, what: str) -> str:
    owner = parameter.shardstep_name.rpartition(".")[0] or "the model"
    unit = f"unit {parameter.shardstep_unit!r}" if parameter.shardstep_unit else "the root unit"
    return (
        f"{what} needs the values of {parameter.shardstep_name!r}, which are freed: they are whole only inside the "
        f"forward and backward of {unit}, and {owner!r} was used outside it; call the model itself, or read and "
        f"write parameters inside 'with shardstep.gathered(model):'"
    )
