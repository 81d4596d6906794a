"""An optimizer that was not sharded: it updates whole tensors where they are and keeps their whole state.

The same interface to the update as a ``FlatSource``: batches of segments. Complex numbers, other memory formats and
16-bit parameters become flat real arrays here, and their new values are copied back.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from shardstep.errors import UnsupportedError
from shardstep.optim.states import as_real, start_of
from shardstep.rules import Rule
from shardstep.rules.binding import compute_dtype
from shardstep.rules.compiled import compile_rule
from shardstep.types import Batch, Segment


def batches_alone(
    groups: Sequence[Mapping[str, Any]], states: MutableMapping[Tensor, dict[str, Tensor]], rule: Rule
) -> Iterator[Batch]:
    """One batch of every parameter that has a gradient; what it needs of ``states`` starts here."""
    updated, segments, converted = list[dict[str, Tensor]](), list[Segment](), list[tuple[Tensor, Tensor]]()
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise UnsupportedError(
                    f"expected a dense gradient at parameter group {index}, position {position}, got {grad.layout}; "
                    f"build the layer with sparse=False"
                )
            state = states[param]
            if not state:
                _start(state, param, group, rule)
            segments.append(_segment(param, grad.detach(), state, index, converted))
            updated.append(state)
    yield Batch(segments, [(segment.group, segment.step) for segment in segments], lambda sums, _: sums)
    for state in updated:
        state["step"] += 1
    for param, master in converted:
        param.copy_(master)
    increment_version([segment.param for segment in segments])  # autograd cannot see what a kernel writes


def _start(state: dict[str, Tensor], param: Tensor, group: Mapping[str, Any], rule: Rule) -> None:
    """Begin the state of ``param``."""
    state["step"] = torch.zeros((), dtype=torch.float32)
    for declared in compile_rule(rule).states(group):
        state[declared.name] = start_of(declared, param)


def _segment(
    param: Tensor, grad: Tensor, state: Mapping[str, Tensor], group: int, converted: list[tuple[Tensor, Tensor]]
) -> Segment:
    """One whole tensor; ``converted`` gains (param, master) if its new values must be copied back."""
    data = param.detach()
    arrays = {name: values for name, values in state.items() if name != "step"}
    if data.is_complex():
        data, grad, arrays = as_real(data), as_real(grad), {name: as_real(values) for name, values in arrays.items()}
    dtype = compute_dtype(data)
    master = data
    if data.dtype != dtype or not data.is_contiguous():
        master = data.to(dtype, memory_format=torch.contiguous_format, copy=True)
        converted.append((data, master))
    return Segment(
        group=group,
        step=int(state["step"]) + 1,
        param=master.view(-1),
        grad=grad.resolve_neg().reshape(-1),
        state={name: values.view(-1) for name, values in arrays.items()},
        low=None,
        grad_scale=1.0,
        shape=tuple(data.shape),
    )
