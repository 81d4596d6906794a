"""An optimizer that was not sharded: it updates whole tensors where they are and keeps their whole state.

The same interface to the update as a ``FlatSource``: batches of segments. Complex numbers, other memory formats and
16-bit parameters become flat real arrays here, and their new values are copied back.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from shardstep.errors import UnsupportedError
from shardstep.optim.loading import StatesIn
from shardstep.optim.states import as_real, start_of
from shardstep.rules.binding import compute_dtype
from shardstep.rules.ir import State
from shardstep.types import Batch, Segment, Update

_DENSE: Final = torch.strided
_COMPUTED: Final = frozenset({torch.float32, torch.float64})
_ONE: Final = torch.ones(())


def batches_alone(
    groups: Sequence[Mapping[str, Any]],
    signs: Sequence[float],
    states: MutableMapping[Tensor, dict[str, Tensor]],
    states_in: StatesIn,
    of_tensors: frozenset[str],
) -> Iterator[Batch]:
    """One batch of every parameter with a gradient; steps are counted and new ``states`` kept when it is updated.

    ``signs``: what the gradients of each group are multiplied by; ``of_tensors``: the names of states that are not of
    elements.
    """
    segments, converted = list[Segment](), list[tuple[Tensor, Tensor]]()
    updated = dict[Tensor, dict[str, Tensor]]()
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not _DENSE:
                raise UnsupportedError(
                    f"expected a dense gradient at parameter group {index}, position {position}, got {grad.layout}; "
                    f"build the layer with sparse=False"
                )
            updated[param] = state = states.get(param) or _start(param, states_in(group, param.ndim))
            segment = _segment(param, grad, state, index, of_tensors, converted)
            segment.grad_scale = signs[index]
            segments.append(segment)
    if not segments:
        return
    keys = [Update(segment.group, segment.step, tuple(segment.shape or ())) for segment in segments]
    yield Batch(segments, keys, lambda sums, _: sums)
    states.update(updated)  # now that nothing can fail
    torch._foreach_add_([state["step"] for state in updated.values()], _ONE)
    for data, master in converted:
        data.copy_(master)
    increment_version(list(updated))  # autograd cannot see what a kernel writes


def _start(param: Tensor, states: Sequence[State]) -> dict[str, Tensor]:
    """The first state of ``param``."""
    state = {"step": torch.zeros((), dtype=torch.float32)}
    for declared in states:
        state.update(start_of(declared, param))
    return state


def _segment(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    group: int,
    of_tensors: frozenset[str],
    converted: list[tuple[Tensor, Tensor]],
) -> Segment:
    """One whole tensor; ``converted`` gains (param, master) if its new values must be copied back."""
    arrays = {name: values for name, values in state.items() if name != "step" and name not in of_tensors}
    if param.is_complex():
        param, grad = as_real(param), as_real(grad)
        arrays = {name: as_real(values) for name, values in arrays.items()}
    master, grad = param, grad.resolve_neg()
    if param.dtype not in _COMPUTED or not param.is_contiguous():
        master = param.to(compute_dtype(param), memory_format=torch.contiguous_format, copy=True)
        converted.append((param, master))
    return Segment(
        group=group,
        step=int(state["step"]) + 1,
        param=master,
        grad=grad if grad.is_contiguous() else grad.contiguous(),
        state=arrays,
        low=None,
        grad_scale=1.0,
        shape=param.shape,
        tensor_state={name: state[name] for name in of_tensors if name in state},
    )
