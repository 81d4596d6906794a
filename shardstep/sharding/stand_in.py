"""What ``p.grad`` is between backward and step: it has the gradient's shape, and its values are with the engine.

So who looks for gradients finds that there are some, and who needs their values is told, instead of training on
without them. The one operation that a stand-in knows is `torch.amp.GradScaler`'s, which unscales all gradients and
looks for infinities: the engine does both, and all ranks learn of the same infinities.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from shardstep.errors import UnsupportedError

_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
_ACCUMULATE = torch.ops.aten.add_.Tensor


class StandIn(Tensor):
    """Stands for the gradient of one parameter; ``unscale`` multiplies all gradients and tells if any is not finite.

    Referred to weakly: Python's garbage collection does not see what a parameter's ``.grad`` refers to.
    """

    parameter_name: str
    unscale: WeakMethod[Callable[[float], bool]]
    arrived: Tensor | None
    """What autograd has added since the stand-in took its place."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, parameter: nn.Parameter, name: str, unscale: Callable[[float], bool]) -> "StandIn":
        make: Any = torch.Tensor._make_wrapper_subclass
        made: StandIn = make(cls, parameter.shape, dtype=parameter.dtype, device=parameter.device)
        made.parameter_name, made.unscale, made.arrived = name, WeakMethod(unscale), None
        return made

    def hand_over(self) -> Tensor:
        """The gradient that has arrived, once."""
        arrived, self.arrived = self.arrived, None
        assert arrived is not None
        return arrived

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _UNSCALE and (unscale := args[0][0].unscale()) is not None:
            _, found_inf, inverse_scale = args
            if unscale(inverse_scale.item()):
                found_inf.fill_(1.0)
            return None
        if func is _ACCUMULATE and isinstance(args[0], cls) and not isinstance(args[1], cls):
            args[0].arrived = args[1]
            return args[0]
        stand_in = next(arg for arg in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(arg, cls))
        raise UnsupportedError(
            f"{func.__name__} needs the values of the gradient of {stand_in.parameter_name!r}, which are spread over "
            f"the ranks from backward() to step(): clip with shard(clip_norm=...), read it by sharded.full_grad(name), "
            f"change it in tensor.register_hook(), and scale the loss rather than gradients"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"gradient of {self.parameter_name!r} of shape {tuple(self.shape)}, {self.dtype}, spread over the ranks"
