"""An optimizer that was not sharded: it updates whole tensors where they are and keeps their whole state.

The same interface to the update as a ``FlatSource``: batches of segments. They are made anew in every step, so nothing
that was replaced since the last one goes unnoticed; for rules that see single elements in columns, since this costs
the least for many small tensors. Complex numbers, other memory formats and 16-bit parameters become flat real arrays
here, and their new values are copied back.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from shardstep.errors import UnsupportedError
from shardstep.optim.loading import StatesIn
from shardstep.optim.states import as_real, start_of
from shardstep.rules.binding import compute_dtype
from shardstep.types import Batch, Segment, Stack, Update

_DENSE: Final = torch.strided
_COMPUTED: Final = frozenset({torch.float32, torch.float64})
_ONE: Final = torch.ones(())

_dtype: Final = attrgetter("dtype")
_layout: Final = attrgetter("layout")


class _Updated(NamedTuple):
    """Tensors with gradients, in columns: step counts with this update, params, gradients, and states."""

    steps: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]

    def where(self, chosen: Sequence[bool]) -> "_Updated":
        """Those of the rows that are chosen."""
        if all(chosen):
            return self
        steps, params = compress(self.steps, chosen), compress(self.params, chosen)
        grads, states = compress(self.grads, chosen), compress(self.states, chosen)
        return _Updated([*steps], [*params], [*grads], [*states])


class Step:
    """One update of every parameter with a gradient. ``of_tensors``: the names of states that are not of elements."""

    def __init__(
        self, states: MutableMapping[Tensor, dict[str, Tensor]], states_in: StatesIn, of_tensors: frozenset[str]
    ) -> None:
        self._states, self._states_in, self._of_tensors = states, states_in, of_tensors
        self._params, self._counts = list[Tensor](), list[Tensor]()
        self._started = dict[Tensor, dict[str, Tensor]]()
        self._converted = list[tuple[Tensor, Tensor]]()

    def batches(self, groups: Sequence[Mapping[str, Any]], signs: Sequence[float], in_stacks: bool) -> Iterator[Batch]:
        """One batch, if there is anything to update; steps are counted and new states kept when it is updated.

        ``signs``: what the gradients of each group are multiplied by; ``in_stacks``: whether the rule sees single
        elements.
        """
        batch = Batch([], [], lambda sums, _: sums)
        for index, group in enumerate(groups):
            updated = self._updated(group, index)
            if in_stacks:
                for stack in self._stacks(index, signs[index], updated):
                    if len(stack.steps) == 1:
                        batch.segments.append(stack.first)
                    else:
                        batch.stacks.append(stack)
            else:
                batch.segments += [self._segment(index, signs[index], *row) for row in zip(*updated, strict=True)]
        if self._params:
            batch.updated = [Update(one.group, one.step, tuple(one.shape or ())) for one in batch.segments]
            yield batch
            self._finish()

    def _finish(self) -> None:
        """What remains when nothing can fail any more."""
        self._states.update(self._started)
        torch._foreach_add_(self._counts, [_ONE] * len(self._counts))  # one number for all takes four times as long
        for data, master in self._converted:
            data.copy_(master)
        increment_version(self._params)  # autograd cannot see what a kernel writes

    def _updated(self, group: Mapping[str, Any], index: int) -> _Updated:
        """Those of one group. Raises UnsupportedError for a sparse gradient."""
        params = [param for param in group["params"] if param.grad is not None]
        grads = [param.grad for param in params]
        if not {*map(_layout, grads)} <= {_DENSE}:
            raise _sparse(group["params"], index)
        states = [self._states.get(param) or self._start(param, group) for param in params]
        counts = [state["step"] for state in states]
        self._params += params
        self._counts += counts
        return _Updated([int(count.item()) + 1 for count in counts], params, grads, states)

    def _start(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for declared in self._states_in(group, param.ndim):
            state.update(start_of(declared, param))
        self._started[param] = state
        return state

    def _stacks(self, group: int, sign: float, updated: _Updated) -> Iterator[Stack]:
        """Whole tensors, those together that have the same states."""
        names = [*map(tuple, updated.states)]
        for own in dict.fromkeys(names):
            steps, params, grads, states = updated.where([one == own for one in names])
            kept = [name for name in own if name != "step"]
            columns = [params, grads, *([state[name] for state in states] for name in kept)]
            yield self._stack(group, sign, kept, steps, [*chain.from_iterable(zip(*columns, strict=True))])

    def _stack(self, group: int, sign: float, states: list[str], steps: list[int], arrays: list[Tensor]) -> Stack:
        names, width = ("param", "grad", *states), 2 + len(states)
        if not _are_flat(arrays[::width], arrays[1::width]):
            rows = (dict(zip(names, arrays[at : at + width], strict=True)) for at in range(0, len(arrays), width))
            arrays = [array for row in rows for array in self._flat(row).values()]
        state = dict(zip(states, arrays[2:width], strict=True))
        first = Segment(group, steps[0], arrays[0], arrays[1], state, None, sign)
        return Stack(first, names, width, steps, [0] * len(steps), arrays)

    def _segment(
        self, group: int, sign: float, step: int, param: Tensor, grad: Tensor, state: dict[str, Tensor]
    ) -> Segment:
        """One whole tensor."""
        arrays = {"param": param, "grad": grad, **state}
        del arrays["step"]
        of_tensor = {name: arrays.pop(name) for name in self._of_tensors if name in arrays}
        if not _are_flat((param,), (grad,)):
            arrays = self._flat(arrays)
        master, grad = arrays.pop("param"), arrays.pop("grad")
        return Segment(group, step, master, grad, arrays, None, sign, 0, param.shape, tensor_state=of_tensor)

    def _flat(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same as contiguous real arrays, the param in what it is computed in."""
        if arrays["param"].is_complex():
            arrays = {name: as_real(values) for name, values in arrays.items()}
        param, grad = arrays["param"], arrays["grad"].resolve_neg().contiguous()
        if _are_flat((param,), ()):
            return {**arrays, "grad": grad}
        master = param.to(compute_dtype(param), memory_format=torch.contiguous_format, copy=True)
        self._converted.append((param, master))
        return {**arrays, "param": master, "grad": grad}


def _sparse(params: Sequence[Tensor], group: int) -> UnsupportedError:
    grads = [(position, param.grad) for position, param in enumerate(params) if param.grad is not None]
    position, layout = next((position, grad.layout) for position, grad in grads if grad.layout is not _DENSE)
    return UnsupportedError(
        f"expected a dense gradient at parameter group {group}, position {position}, got {layout}; "
        f"build the layer with sparse=False"
    )


def _are_flat(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether kernels take them as they are."""
    if not {*map(_dtype, params)} <= _COMPUTED or any(map(Tensor.is_neg, grads)):
        return False
    return all(map(Tensor.is_contiguous, params)) and all(map(Tensor.is_contiguous, grads))
