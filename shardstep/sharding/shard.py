"""shard(): the one line that a training loop adds.

Checks what it is given, cuts the model into units, and puts the parts of the engine together. The model and
the optimizer stay the objects that they were.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from shardstep.collectives import Group, ProcessGroup
from shardstep.config import PrecisionChoice, StageChoice, UnitChoice, checked_schedule
from shardstep.errors import ConfigError, OwnershipError, RankMismatchError
from shardstep.layout import fingerprint
from shardstep.optim import Combined, Optimizer
from shardstep.optim.unruled import refusal
from shardstep.sharding.access import Access
from shardstep.sharding.agreement import Agreement
from shardstep.sharding.attached import Attached
from shardstep.sharding.buffers import Buffers
from shardstep.sharding.casts import Precisions
from shardstep.sharding.clip import Clipping, clip_coefficient
from shardstep.sharding.cut import check_cut
from shardstep.sharding.early import EarlyUpdates, check_possible
from shardstep.sharding.first_values import FromModel, Source
from shardstep.sharding.formula import Formula, SpaceSize
from shardstep.sharding.gradients import Gradients
from shardstep.sharding.handle import Sharded
from shardstep.sharding.hooks import Hooks
from shardstep.sharding.loans import Loan
from shardstep.sharding.materialise import check as check_meta
from shardstep.sharding.materialise import materialise, materialise_buffers, real_device
from shardstep.sharding.memory import Ledger, laying_out
from shardstep.sharding.modules import check_built, named_modules, seeds
from shardstep.sharding.nonfinite import NonFiniteTrace
from shardstep.sharding.scaler import FLAGS, LossScaler, Scaling, scaler_of
from shardstep.sharding.space import Space
from shardstep.sharding.states import make_states
from shardstep.sharding.step import Step
from shardstep.sharding.unfreezing import Unfreezing
from shardstep.sharding.unit import Unit
from shardstep.sharding.units import UnitPlan, plan_units
from shardstep.sharding.weights import FromFile
from shardstep.sharding.whole import ATTRIBUTE, Whole


def shard(
    model: nn.Module,
    optimizer: Optimizer | Combined,
    *,
    stage: StageChoice = 3,
    units: UnitChoice | None = None,
    precision: PrecisionChoice = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    loss_scale: LossScaler | float | None = None,
    schedule: str | None = None,
    overlap_grad_reduce: bool = True,
    overlap_param_gather: bool = False,
    prefetch: int = 1,
    update_in_backward: bool = False,
    trace_nonfinite: bool = False,
    weights: str | Path | None = None,
    debug: str | None = None,
    group: ProcessGroup | None = None,
) -> Sharded:
    """Shard ``model`` and ``optimizer`` in place over the ranks of ``group`` (all of them by default).

    ``stage``: 0 to 3 for every unit, a mapping of unit-name patterns, or a function (name, module) -> stage.
    ``units``: name patterns or classes of the modules that are gathered and freed together; by default the
    repeated blocks of the model, small neighbours together. Whatever is in none of them forms the root unit.
    ``precision``: dtypes of computation, communication and master; by default the parameters' own, with a
    float32 master for low-precision ones. Exceptions by a mapping of module-name patterns (each counts for a module and
    all in it, the first that matches decides), or a function (name, module) -> Precision, or None as around it.
    ``clip_norm``: clip the mean gradient to this global 2-norm.
    ``clip_value``: clip every element of it to [-clip_value, clip_value].
    ``loss_scale``: a LossScaler or a power of two, for parameters in float16: what goes back through the model's
    outputs is multiplied by it, low-precision outputs are returned in float32, steps that overflow are left out.
    ``schedule``: 'per leaf' (default) or 'per step' (stages 0 and 1). ``prefetch``: units gathered ahead.
    ``overlap_grad_reduce``: False has the schedule per step exchange gradients in optimizer.step(), and not earlier.
    ``overlap_param_gather``: at stages 1 and 2, optimizer.step() leaves updated parameters on their way; each unit's
    next forward waits for its own, and so does whatever else reads or writes them.
    ``update_in_backward``: in the last backward() of a step, update each unit as soon as its gradients are whole and
    give their memory back (the peak falls if a rank has one micro-batch a step); step() does the rest, and must follow.
    The bits are the same. Not with clipping by the norm or a loss scale. Micro-batches come from
    ``sharded.micro_batches``, or ``sharded.expect`` tells their number.
    ``trace_nonfinite``: a step that makes an infinity or NaN raises NonFiniteUpdateError, which names the parameter,
    the element, the rank and the line of the rule; for debugging, since it copies what is updated.
    ``weights``: a .safetensors file, an index of several, or a folder with either, to begin with instead of what the
    model holds; each rank reads only what it keeps.
    ``debug="collectives"``: ranks compare every collective before they run it, so that one which differs is named at
    the very call; slow.

    All ranks call it with models of equal structure; they go on from rank 0's values. Raises ConfigError,
    OwnershipError or RankMismatchError before anything is changed.
    """
    _check_arguments(model, optimizer, clip_norm, clip_value, prefetch, debug)
    _check_flags(overlap_grad_reduce=overlap_grad_reduce, overlap_param_gather=overlap_param_gather)
    _check_flags(update_in_backward=update_in_backward, trace_nonfinite=trace_nonfinite)
    scaler = scaler_of(loss_scale)
    device = _one_device(model)
    check_meta(model, weights is not None)
    if update_in_backward:
        check_possible(optimizer, clip_norm, loss_scale)
    _check_ownership(model, optimizer)
    precisions = Precisions(model, precision)
    plans = plan_units(model, units, stage, precisions.of, optimizer.rule_of)
    schedule_ = checked_schedule(schedule, {plan.name: plan.stage for plan in plans}, overlap_grad_reduce)
    ranks = Group(group, checked=debug == "collectives")
    cut = check_cut(model, ranks)
    file = None if weights is None else FromFile(weights, model, ranks)
    buffers = Buffers(model, ranks)
    options = {
        "schedule": schedule_,
        "overlap_grad_reduce": overlap_grad_reduce,
        "overlap_param_gather": overlap_param_gather,
        "clip_norm": clip_norm,
        "clip_value": clip_value,
        "clipping by the optimizer": optimizer.clip is not None,
        "loss_scale": repr(scaler),
        "update_in_backward": update_in_backward,
        "trace_nonfinite": trace_nonfinite,
        "debug": debug,
    }
    _check_equal_on_all_ranks({**_described(plans, buffers, file, cut), **options}, ranks)

    ledger = Ledger(device)
    with laying_out():
        if file is None:
            materialise(model, device, ranks)
        else:
            file.load_buffers(model, device)
            materialise_buffers(model, device)
        buffers.follow_rank_0()
        built = _build(plans, ranks, ledger, file or FromModel(ranks))
    trained = [space for unit in built for space in unit.spaces if space.trained]
    make_states(trained, optimizer.states_of, optimizer.rule_of, ranks.size)
    flags = sum(len(space.parameters) for space in trained) + len(buffers.owners)
    agreement = Agreement(ranks, max(flags, 0 if scaler is None else 1 + FLAGS), _lend(built, ranks))
    scaling = None if scaler is None else Scaling(scaler)
    by_norm = optimizer.clip if clip_norm is None else partial(clip_coefficient, clip_norm=clip_norm)
    clipping, traced = Clipping(by_norm, clip_value), by_norm is not None and scaling is None
    gradients = Gradients(trained, ranks, ledger, schedule_, agreement, scaling, overlap_grad_reduce, traced)
    trace = NonFiniteTrace(optimizer, ranks) if trace_nonfinite else None
    input_dtype = precisions.root.params if precisions.root else None
    precisions.install()
    attached, whereabouts = Attached(model, built), ranks.whereabouts
    hooks = Hooks(built, gradients, agreement, attached, prefetch, input_dtype, scaling, whereabouts)
    unfreezing = Unfreezing(built, gradients, agreement, hooks, ranks)
    step = Step(
        optimizer,
        trained,
        gradients,
        agreement,
        buffers,
        clipping,
        trace,
        unfreezing,
        ranks,
        ledger,
        overlap_param_gather,
    )
    if update_in_backward:
        gradients.early = EarlyUpdates(step, optimizer, agreement, ranks.size)
    whole = Whole(model, built, gradients, agreement, ranks)
    for _, module in named_modules(model):
        setattr(module, ATTRIBUTE, whole)
    optimizer.attach(step)

    order = {name: place for place, (name, _) in enumerate(model.named_parameters())}

    def formula(own_leaves: int) -> Formula:
        sizes = [[_size(space, optimizer, order) for space in unit.spaces] for unit in built]
        in_backward = gradients.early is not None
        return Formula(
            sizes, ranks.size, own_leaves, prefetch, schedule_, ranks.rank, overlap_grad_reduce, in_backward=in_backward
        )

    access = Access(model, built, gradients, agreement, ranks)
    return Sharded(built, ranks, ledger, gradients, step, formula, seeds(model), hooks, access)


def _size(space: Space, optimizer: Optimizer | Combined, order: Mapping[str, int]) -> SpaceSize:
    moved = [optimizer.moved_bytes(p, space.precision.compute) for p in space.parameters] if space.trained else []
    travelling = tuple(own for own in moved if own is not None)
    rule = optimizer.rule_of(space.parameters[0])
    states = [optimizer.states_of(parameter) for parameter in space.parameters]
    places = tuple(order[slot.name] for slot in space.layout.slots)
    return SpaceSize(
        space.layout,
        space.precision,
        space.trained,
        space.stage,
        states,
        rule,
        travelling,
        places,
        rule in optimizer.elementwise,
        len(space.averages),
    )


def _build(plans: list[UnitPlan], group: Group, ledger: Ledger, source: Source) -> list[Unit]:
    units, tag = [], 0
    group.reserve_tags(_first_of_loans(plans) + sum(len(plan.spaces) for plan in plans))
    for plan in plans:
        spaces = []
        for own in plan.spaces:
            laid_out = (own.layout, own.parts, own.parameters)
            spaces.append(Space(plan.name, tag, *laid_out, plan.stage, own.precision, group, ledger, source))
            tag += 1
        units.append(Unit(plan.name, plan.modules, plan.stage, spaces))
    return units


def _first_of_loans(units: Sequence[Unit | UnitPlan]) -> int:
    """The tags before are two for each space, and two for values that go to the owners of whole tensors."""
    return 2 * sum(len(unit.spaces) for unit in units) + 2


def _lend(units: list[Unit], group: Group) -> list[Loan]:
    """The loans of every space whose parameters are sharded, where the ranks' connection allows it."""
    spaces = [space for unit in units for space in unit.spaces if space.stage.shard_params] if group.lends else []
    if not spaces:
        return []
    first = _first_of_loans(units)
    own = [space.shard.data_ptr() for space in spaces]
    addresses = zip(*group.exchange_json(own, label="exchange of the addresses of shards"), strict=True)
    pairs = zip(spaces, addresses, strict=True)
    loans = [space.lend(at, first + number) for number, (space, at) in enumerate(pairs)]
    group.keep(loans, owner=spaces[0])
    return loans


def _check_arguments(
    model: nn.Module,
    optimizer: Optimizer | Combined,
    clip_norm: float | None,
    clip_value: float | None,
    prefetch: int,
    debug: str | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected shard(model, optimizer), got {type(model).__name__} for the model; is it a module?"
        )
    if not isinstance(optimizer, Optimizer | Combined):
        raise ConfigError(refusal(optimizer))
    if getattr(model, ATTRIBUTE, None) is not None:
        raise ConfigError("expected a model that is not sharded yet, but shard() was already called on this one")
    if any(getattr(module, ATTRIBUTE, None) is not None for _, module in named_modules(model)):
        raise ConfigError("expected a model that is not sharded yet, but shard() was already called on a part of it")
    optimizer.check_shardable()
    if optimizer.attached:
        raise ConfigError("expected an optimizer that is not sharded yet, got one that is; make one for this model")
    if not any(True for _ in model.parameters()):
        raise ConfigError(f"expected a model with parameters, but {type(model).__name__} has none; nothing to shard")
    check_built(model)
    for name, bound in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0):
            raise ConfigError(f"expected {name} to be a positive number or None, got {bound!r}")
    if clip_value is not None and (clip_norm is not None or optimizer.clip is not None):
        other = "an optimizer that clips by the norm" if clip_norm is None else f"clip_norm={clip_norm!r}"
        raise ConfigError(
            f"expected clipping by value or by the norm, got clip_value={clip_value!r} and {other}; leave one out"
        )
    if clip_norm is not None and optimizer.clip is not None:
        raise ConfigError(
            f"expected one clipping by the global norm, got clip_norm={clip_norm!r} and an optimizer that clips by it "
            f"too; leave one out"
        )
    if isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 0:
        raise ConfigError(f"expected prefetch to be 0 or a positive number of units, got {prefetch!r}")
    if debug not in (None, "collectives"):
        raise ConfigError(f"expected debug to be 'collectives' or None, got {debug!r}")


def _check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigError(f"expected {name} to be True or False, got {flag!r}")


def _one_device(model: nn.Module) -> torch.device:
    """Where all parameters are, or are going to be when they come from the meta device."""
    first: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(parameter.device, name)
    if len(first) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in first.items())
        raise ConfigError(f"expected all parameters on one device, got {places}; move the model with model.to(device)")
    device = next(iter(first))
    return real_device() if device.type == "meta" else device


def _check_ownership(model: nn.Module, optimizer: Optimizer | Combined) -> None:
    """Every trained parameter of the model is in the optimizer once, and nothing else is."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    counts: dict[int, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
            if id(parameter) not in names:
                raise OwnershipError(
                    f"expected the optimizer to own parameters of the model only, but parameter {position} of its "
                    f"group {index}, of shape {tuple(parameter.shape)}, is not one of the model's"
                )
    for name, parameter in model.named_parameters():
        count = counts.get(id(parameter), 0)
        if parameter.requires_grad and count == 0:
            raise OwnershipError(
                f"expected the optimizer to own every parameter that is trained, but {name!r} is in none of its "
                f"param_groups; add it, or set requires_grad=False on it"
            )
        if count > 1:
            raise OwnershipError(f"expected the optimizer to own {name!r} once, but it is there {count} times")


_PROBLEM = "problem with the file of weights"


def _described(
    plans: list[UnitPlan], buffers: Buffers, file: FromFile | None, cut: int
) -> dict[str, str | float | None]:
    """What of the model must be the same everywhere, by the name that a message gives it."""
    return {
        "layout": fingerprint((plan.name, space.layout) for plan in plans for space in plan.spaces),
        "stages": ", ".join(f"{plan.name!r}: {plan.stage.number}" for plan in plans),
        "buffers": ", ".join(buffers.owners),
        "number of parameters cut while it was built": cut,
        "file of weights": None if file is None else file.fingerprint,
        _PROBLEM: None if file is None else file.problem,
        "precision": ", ".join(sorted({str(space.precision) for plan in plans for space in plan.spaces})),
    }


def _check_equal_on_all_ranks(own: dict[str, str | float | None], group: Group) -> None:
    everyone = group.exchange_json(own, label="comparison of models and options in shard()")
    problems = [(rank, other[_PROBLEM]) for rank, other in enumerate(everyone) if other[_PROBLEM]]
    if problems:
        rank, problem = problems[0]
        raise ConfigError(problem if group.size == 1 else f"rank {rank}: {problem}")
    for rank, other in enumerate(everyone):
        for name, value in other.items():
            if value != everyone[0][name]:
                raise RankMismatchError(
                    f"expected models of equal structure and equal options on all ranks, but the {name} of rank {rank} "
                    f"({value}) differs from rank 0's ({everyone[0][name]}); build and shard the same way everywhere"
                )
