"""Averages of a model's parameters over its training (SWA and EMA), beside the optimizer.

They lie where the parameters' masters lie, on the shards if the model is sharded, and are made by compiled rules, so
that their bits depend on the cut as little as the parameters' own. Nothing here gathers, and nothing here knows what
a shard is: that is `sharding.averages`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardstep.errors import ConfigError, SequenceError
from shardstep.rules.compiled import compile_rule
from shardstep.rules.functions import fma, lerp
from shardstep.rules.language import Elements, rule
from shardstep.sharding.averages import ShardedAverages, UnshardedAverages
from shardstep.sharding.statistics import NAMES, batch_statistics, norms_of
from shardstep.sharding.whole import ATTRIBUTE, whole_of
from shardstep.types import Batch, Update


@rule
def average(param: Elements, grad: Elements, *, step: int, weight: float) -> Elements:
    """param + weight · (grad − param), from the nearer of the two as torch rounds it; the first time, grad."""
    if step == 1:
        param = grad
    elif weight < 0.5:
        param = lerp(param, grad, weight)
    else:
        param = fma(weight - 1, grad - param, grad)
    return param


class Average:
    """An average of a model's trained parameters: an exponential one, or with ``decay="swa"`` the plain mean.

    Call :meth:`update` after every ``optimizer.step()``. It counts the steps from 1 and takes the parameters after the
    steps ``start``, ``start + every``, … (those of them that are not 0); the first time it copies them.

    The average is float32, or float64 for float64 parameters, and is made from the masters where there are any. Sharded
    models are sharded first; the average then belongs to the model, and each rank keeps the part that it owns. Every
    rank makes it and calls all its methods. A float32 average has the bits of torch's ``AveragedModel`` with
    ``get_ema_multi_avg_fn`` (for a decay of ½ or more) or ``get_swa_multi_avg_fn``. As there, buffers are not averaged;
    parameters that are frozen when the average is made are not kept either, since they are their own average.

    Raises ConfigError for arguments that cannot be honoured, RankMismatchError if ranks differ in theirs.
    """

    def __init__(
        self, model: nn.Module, *, decay: float | Literal["swa"] = 0.999, every: int = 1, start: int = 0
    ) -> None:
        _check_arguments(model, decay, every, start)
        self.steps = 0
        """Optimizer steps counted by :meth:`update`."""
        self.n_averaged = 0
        """How many times the parameters have been taken."""
        self._model, self._decay, self._every, self._start = model, decay, every, start
        self._statistics: dict[str, Tensor] = {}
        self._is_sharded = hasattr(model, ATTRIBUTE)
        self._kept = _kept(model, {"decay": decay, "every": every, "start": start})

    def update(self) -> None:
        """Count a step of the optimizer, and average the parameters if it is one of those to take. No communication.

        Forgets the statistics of :meth:`update_bn`, which were those of another average.
        """
        self._check_place("average.update()")
        self.steps += 1
        if self.steps < self._start or (self.steps - self._start) % self._every:
            return
        count = self.n_averaged + 1
        weight = 1 / count if self._decay == "swa" else 1 - float(self._decay)
        batch = Batch(self._kept.segments(count), [Update(0, count, ())], lambda sums, _: sums)
        compile_rule(average).update(batch, [{"weight": weight}])
        self.n_averaged = count
        self._statistics = {}

    @contextmanager
    def applied(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """Inside the ``with`` block, the model's parameters are the averages, rounded to their dtype. Collective.

        Afterwards, also after an exception, parameters and buffers have the bits that they had; what is written to them
        inside is lost to the model. BatchNorm uses the statistics of
        :meth:`update_bn`, or the model's own without. ``model``, if given, must be the one that is averaged. Raises
        SequenceError before the first average, inside another such block, and for ``optimizer.step()`` inside.
        """
        self._check_place("average.applied()")
        if model is not None and model is not self._model:
            raise ConfigError("expected average.applied() of the model that is averaged, got another one; leave it out")
        if not self.n_averaged:
            raise SequenceError(
                f"expected average.applied() after the first average, got it after {self.steps} calls of update() with "
                f"start={self._start} and every={self._every}, none of which took the parameters"
            )
        _APPLIED.add(self._model)
        try:
            with _no_step(self._model), self._kept.swapped(), _own_buffers(self._model, self._statistics):
                yield self._model
        finally:
            _APPLIED.discard(self._model)

    def update_bn(self, micro_batches: Iterable[Any]) -> None:
        """Make the running statistics of every BatchNorm anew, for the averaged parameters. Collective.

        They are the means over ``micro_batches``, like those of torch's ``update_bn``. A `MicroBatch` is given to the
        model as in training; of another tuple or list, the first entry is. Rank r runs micro-batches r, r + N, … of N
        ranks, each rank equally many; the bits then do not depend on N. The model keeps its own statistics.
        """
        if norms := norms_of(self._model):
            with self.applied():
                self._statistics = batch_statistics(self._model, norms, micro_batches, self._kept)

    def state_dict(self) -> dict[str, Any]:
        """Counts, whole averages by parameter name, and the statistics of :meth:`update_bn`. Collective."""
        return {
            "steps": self.steps,
            "n_averaged": self.n_averaged,
            "averages": self._kept.whole() if self.n_averaged else {},
            "statistics": {name: values.clone() for name, values in self._statistics.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``, which may come from another number of ranks, other stages or an unsharded model.

        Every rank gives the same. Raises ConfigError, before anything has changed, if it does not fit the model.
        """
        self._check_place("average.load_state_dict()")
        norms = norms_of(self._model)
        buffers = {f"{name}.{key}": tuple(getattr(norm, key).shape) for name, norm in norms.items() for key in NAMES}
        _check_loaded(state_dict, self._kept.shapes, buffers)
        if state_dict["n_averaged"]:
            self._kept.adopt(state_dict["averages"])
        self._statistics = {
            name: values.detach().to(self._model.get_buffer(name), copy=True)
            for name, values in state_dict["statistics"].items()
        }
        self.steps, self.n_averaged = state_dict["steps"], state_dict["n_averaged"]

    def _check_place(self, call: str) -> None:
        if self._model in _APPLIED:
            raise SequenceError(
                f"expected {call} outside 'with average.applied():' of this model, got it inside, where the parameters "
                f"are averages; leave the block first"
            )
        if hasattr(self._model, ATTRIBUTE) != self._is_sharded:
            raise SequenceError(
                f"expected {call} of the model as it was when the average was made, but shard() has been called since; "
                f"make the average after it"
            )


_APPLIED: Final[WeakSet[nn.Module]] = WeakSet()
"""The models whose parameters are averages now."""


@contextmanager
def _own_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Copies in place of all buffers, with ``values`` for some; the buffers themselves are not touched."""
    places = [
        (module._buffers, key, buffer, f"{name}.{key}" if name else key)
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        copies = {id(buffer): values.get(name, buffer).detach().clone() for _, _, buffer, name in reversed(places)}
        for buffers, key, buffer, _ in places:
            buffers[key] = copies[id(buffer)]
        yield
    finally:
        for buffers, key, buffer, _ in places:
            buffers[key] = buffer


@contextmanager
def _no_step(model: nn.Module) -> Iterator[None]:
    """Refuse every step of an optimizer that has any of the model's parameters."""
    averaged = {id(parameter) for parameter in model.parameters()}

    def refuse(optimizer: Any, args: Any, kwargs: Any) -> None:
        if any(id(parameter) in averaged for group in optimizer.param_groups for parameter in group["params"]):
            raise SequenceError(
                "expected optimizer.step() outside 'with average.applied():', got it inside, where the parameters are "
                "averages; leave the block first"
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _kept(model: nn.Module, options: Mapping[str, float | str]) -> ShardedAverages | UnshardedAverages:
    if not hasattr(model, ATTRIBUTE):
        return UnshardedAverages(model)
    whole = whole_of(model)
    if whole.model is not model:
        raise ConfigError(
            f"expected the model that shard() was called on, got a part of it, a {type(model).__name__}; "
            f"average the whole model"
        )
    return ShardedAverages(whole, options)


def _check_arguments(model: nn.Module, decay: object, every: object, start: object) -> None:
    if decay != "swa" and (isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1):
        raise ConfigError(f"expected decay to be a number from 0 to 1 or 'swa', got {decay!r}")
    for name, value, least in (("every", every, 1), ("start", start, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"expected {name} to be an integer of at least {least}, got {value!r}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"expected a model with parameters that are trained, but {type(model).__name__} has none")


def _check_loaded(
    state: Mapping[str, Any], averages: Mapping[str, tuple[int, ...]], buffers: Mapping[str, tuple[int, ...]]
) -> None:
    if not isinstance(state, Mapping) or state.keys() != {"steps", "n_averaged", "averages", "statistics"}:
        raise ConfigError(
            f"expected what Average.state_dict() gives, got "
            f"{sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__}; load one of those"
        )
    for name in ("steps", "n_averaged"):
        if isinstance(state[name], bool) or not isinstance(state[name], int) or state[name] < 0:
            raise ConfigError(f"expected {name} to be 0 or a positive integer in the state dict, got {state[name]!r}")
    wanted = averages.keys() if state["n_averaged"] else set()
    if wanted != state["averages"].keys():
        differing = sorted(wanted ^ state["averages"].keys())
        raise ConfigError(
            f"expected an average of each of the {len(wanted)} trained parameters, got {len(state['averages'])}: "
            f"{differing[:4]} are on one side only; the state dict belongs to another model"
        )
    for name, values in [*state["averages"].items(), *state["statistics"].items()]:
        shape = averages.get(name, buffers.get(name))
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(
                f"expected {name!r} to be a tensor of shape {shape}, got {got}; the state dict belongs to another model"
            )
