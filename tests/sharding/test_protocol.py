"""What else a torch optimizer does, sharded: groups added later, scaled losses, every scheduler; to the same bits."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs

import shardstep as ss
from shardstep.sharding import units
from shardstep.sharding.whole import whole_of
from tests.sharding.models import BF16, Tied, Tokens

MIXED = {"blocks.0": 3, "blocks.1": 1, "*": 2}
LEAVES = 4


def tied(seed: int = 1) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def own_leaves(sharded: ss.Sharded | None) -> range:
    """Which micro-batches this rank runs; all of them without shards."""
    if sharded is None:
        return range(LEAVES)
    if sharded.schedule == "per leaf":
        return range(sharded.rank, LEAVES, sharded.world_size)
    own = LEAVES // sharded.world_size
    return range(sharded.rank * own, (sharded.rank + 1) * own)


def loss_of(model: nn.Module, step: int, leaf: int) -> Tensor:
    torch.manual_seed(LEAVES * step + leaf)
    return model(Tokens()[LEAVES * step + leaf][None])


def accumulate(model: nn.Module, sharded: ss.Sharded | None, step: int, scale: Callable[[Tensor, int], Tensor]) -> None:
    """The gradients of one step: the mean over its micro-batches, added as the engine adds them."""
    halves = []
    for leaf in own_leaves(sharded):
        loss = scale(loss_of(model, step, leaf), leaf)
        (loss if sharded else loss / LEAVES).backward()
        if not sharded and leaf % 2:
            halves.append([parameter.grad for parameter in model.parameters()])
            model.zero_grad()
    for parameter, first, second in zip(model.parameters(), *halves, strict=True) if halves else []:
        both = [grad for grad in (first, second) if grad is not None]
        parameter.grad = sum(both[1:], both[0]) if both else None


def run_step(model: nn.Module, optimizer: Any, sharded: ss.Sharded | None, step: int) -> None:
    accumulate(model, sharded, step, lambda loss, _: loss)
    optimizer.step()
    optimizer.zero_grad()


def runs_of(runs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """On a rank: what each of these functions returns; one journey for many runs."""
    return [globals()[name](**options) for name, options in runs]


# - groups added after shard()


def unfreezing_run(shard: bool = True, only: int = 3, **options: Any) -> tuple[str, Any]:
    """Two steps with the blocks' frozen parameters, then two in which the first ``only`` of them are trained."""
    model = tied()
    for parameter in model.blocks[2].up.parameters():
        parameter.requires_grad_(False)
    optimizer = ss.optim.AdamW(trained(model), lr=1e-2)
    sharded = ss.shard(model, optimizer, **options) if shard else None
    for step in range(2):
        run_step(model, optimizer, sharded, step)
    added = [block.frozen for block in model.blocks[:only]] + list(model.blocks[2].up.parameters())
    for parameter in added:
        parameter.requires_grad_()
    optimizer.add_param_group({"params": added, "lr": 5e-2})
    for step in range(2, 4):
        run_step(model, optimizer, sharded, step)
    steps = [int(state["step"]) for state in optimizer.state_dict()["state"].values()]
    assert max(steps) == 4
    assert steps[-1] == 2
    return ss.digest(model, optimizer), (sharded.bytes.peak, sharded.bytes.formula) if sharded else None


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_group_of_parameters_that_were_frozen_joins_to_the_same_bits(ranks, world_size):
    options = [{"stage": stage} for stage in ((0, 1, 2, 3, MIXED) if world_size == 2 else (0, 3))]
    options += [{"stage": 1, "schedule": "per step", "only": 1}, {"stage": 3, "only": 1, "precision": BF16}]
    wanted = [unfreezing_reference(run.get("only", 3), "precision" in run) for run in options]
    for results in ranks(world_size).run(runs_of, [("unfreezing_run", run) for run in options]):
        assert [digest for digest, _ in results] == wanted
        assert [peak.state for _, (peak, _) in results] == [formula.state for _, (_, formula) in results]


@cache
def unfreezing_reference(only: int, bf16: bool) -> str:
    if bf16:
        return unfreezing_run(stage=0, only=only, precision=BF16)[0]
    return unfreezing_run(shard=False, only=only)[0]


def test_frozen_neighbours_of_what_joins_have_no_part_in_the_digest(monkeypatch):
    """Joined blocks have one space for all that is frozen, which gets a master when any of it is trained."""
    wanted = unfreezing_run(stage=0, only=1, precision=BF16)[0]
    monkeypatch.setattr(units, "SMALL_NUMEL", 1 << 20)
    assert unfreezing_run(stage=3, only=1, precision=BF16)[0] == wanted


def test_only_blocks_with_something_that_is_trained_count_in_the_norm(monkeypatch):
    """Zeros of frozen neighbours would change the order in which the others are added."""
    monkeypatch.setattr(units, "SMALL_NUMEL", 1 << 20)
    model = tied()
    optimizer = ss.optim.AdamW(trained(model))
    ss.shard(model, optimizer, clip_norm=1.0)
    (frozen,) = (space for unit in whole_of(model).units for space in unit.spaces if not space.trained)
    optimizer.add_param_group({"params": [model.blocks[1].frozen.requires_grad_()]})
    assert frozen.trained_parts == [False, True, False]


def test_a_master_that_joins_begins_with_the_stored_values():
    model = tied()
    optimizer = ss.optim.AdamW(trained(model))
    sharded = ss.shard(model, optimizer, stage=2, precision=BF16)
    added = [block.frozen for block in model.blocks]
    before = [parameter.detach().clone() for parameter in added]
    optimizer.add_param_group({"params": [p.requires_grad_() for p in added], "lr": 0.0})
    run_step(model, optimizer, sharded, 0)
    assert all(map(torch.equal, added, before))


def test_a_group_that_cannot_join_is_refused_and_changes_nothing():
    model = tied()
    optimizer = ss.optim.AdamW(trained(model))
    sharded = ss.shard(model, optimizer, stage=3)
    frozen = model.blocks[0].frozen
    with pytest.raises(ss.OwnershipError, match=r"parameters that the model had .* of shape \(2,\) at position 1"):
        optimizer.add_param_group({"params": [frozen.requires_grad_(), nn.Parameter(torch.ones(2))]})
    frozen.requires_grad_(False)
    with pytest.raises(ss.ConfigError, match="position 0 of the new group without"):
        optimizer.add_param_group({"params": frozen})
    loss_of(model, 0, 0).backward()
    with pytest.raises(ss.SequenceError, match="got it after 1 micro-batches of step 0"):
        optimizer.add_param_group({"params": frozen.requires_grad_()})
    assert len(optimizer.param_groups) == 1
    frozen.requires_grad_(False)
    optimizer.zero_grad()
    run_step(model, optimizer, sharded, 0)


def test_a_frozen_parameter_of_the_optimizer_that_gets_a_gradient_is_named():
    model = tied()
    optimizer = ss.optim.AdamW(model.parameters())
    ss.shard(model, optimizer, stage=0)
    model.blocks[1].frozen.requires_grad_()
    loss_of(model, 0, 0).backward()
    with pytest.raises(ss.SequenceError, match=r"'blocks.1.frozen' to stay frozen.* give it to add_param_group"):
        optimizer.step()


def different_groups() -> None:
    model = tied()
    optimizer = ss.optim.AdamW(trained(model))
    sharded = ss.shard(model, optimizer, stage=0)
    optimizer.add_param_group({"params": model.blocks[sharded.rank].frozen.requires_grad_()})


def test_ranks_that_add_different_groups_are_told(ranks):
    with pytest.raises(
        Exception, match=r"every rank to add the same parameters, but rank \d adds \['blocks.\d.frozen'\]"
    ):
        ranks(2).run(different_groups)


# - torch.amp.GradScaler


def scaled_run(shard: bool = True, infinite: tuple[int, int] | None = None, early: bool = False, **options: Any) -> Any:
    """The digest and the scales of four steps with a scaled loss, one leaf of which may be infinite."""
    model = tied()
    optimizer = ss.optim.AdamW(trained(model), lr=1e-2)
    sharded = ss.shard(model, optimizer, **options) if shard else None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    scales = []
    for step in range(4):

        def scaled(loss: Tensor, leaf: int, step: int = step) -> Tensor:
            return scaler.scale(loss * (float("inf") if (step, leaf) == infinite else 1))

        accumulate(model, sharded, step, scaled)
        if early:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return ss.digest(model, optimizer), scales


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_grad_scaler_unscales_skips_and_grows_alike_on_all_ranks(ranks, world_size):
    clean, skipped = scaled_run(shard=False), scaled_run(shard=False, infinite=(1, 1))
    assert (clean[1], skipped[1]) == ([256, 512, 512, 1024], [256, 128, 128, 256])
    assert clean[0] != skipped[0]
    layouts = [{"stage": 0}, {"stage": 1, "schedule": "per step"}, {"stage": 3, "early": True}]
    runs = [("scaled_run", {**layout, "infinite": inf}) for layout in layouts for inf in (None, (1, 1))]
    for results in ranks(world_size).run(runs_of, runs):
        assert results == [clean, skipped] * len(layouts)


def test_clipping_counts_without_the_scale_of_the_loss():
    model = tied()
    optimizer = ss.optim.AdamW(trained(model))
    sharded = ss.shard(model, optimizer, stage=2, clip_norm=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss_of(model, 0, 0)).backward()
    scaler.step(optimizer)
    plain = tied()
    loss_of(plain, 0, 0).backward()
    wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    assert sharded.grad_norm == pytest.approx(wanted.item(), rel=1e-6)


def test_a_backward_after_unscaling_is_refused():
    model = tied()
    optimizer = ss.optim.AdamW(trained(model))
    ss.shard(model, optimizer, stage=0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0, 0)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(ss.SequenceError, match=r"after the gradients were unscaled, .*got another backward"):
        loss_of(model, 0, 1).backward()
    optimizer.zero_grad()
    loss_of(model, 0, 1).backward()


def test_a_gradient_is_there_from_backward_to_step_and_its_values_are_not():
    model = tied()
    optimizer = ss.optim.AdamW(trained(model))
    ss.shard(model, optimizer, stage=3)
    loss_of(model, 0, 0).backward()
    grad = model.blocks[0].up.weight.grad
    assert (grad.shape, grad.dtype) == ((15, 7), torch.float32)
    assert "'blocks.0.up.weight'" in repr(grad)
    assert model.blocks[0].frozen.grad is None
    with pytest.raises(ss.UnsupportedError, match=r"values of the gradient of '.*clip with shard\(clip_norm=\.\.\.\)"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert model.blocks[0].up.weight.grad is grad, "as torch's, until zero_grad()"
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


class Hidden:
    """An output that hooks cannot look into."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Hidden:
        return Hidden(self.inner(x).square().mean())


@pytest.mark.parametrize("shard", [False, True])
def test_leaves_whose_backward_nobody_announces_are_added(shard):
    torch.manual_seed(0)
    model = Hiding()
    optimizer = ss.optim.AdamW(model.parameters(), lr=0.1)
    if shard:
        ss.shard(model, optimizer, stage=1)
    losses = [model(torch.full((1, 3), x)).loss * (1 if shard else 0.5) for x in (1.0, 2.0)]
    for loss in losses:
        loss.backward()
    optimizer.step()
    assert ss.digest(model, optimizer) == hiding_reference()


@cache
def hiding_reference() -> str:
    torch.manual_seed(0)
    model = Hiding()
    optimizer = ss.optim.AdamW(model.parameters(), lr=0.1)
    sum(model(torch.full((1, 3), x)).loss * 0.5 for x in (1.0, 2.0)).backward()
    optimizer.step()
    return ss.digest(model, optimizer)


@pytest.mark.parametrize("told", [2, 4])
def test_more_micro_batches_than_were_told_are_refused_where_a_sum_was_sent(told):
    model = tied()
    optimizer = ss.optim.AdamW(trained(model))
    sharded = ss.shard(model, optimizer, stage=1, schedule="per step")
    sharded.expect(told)
    for _ in range(2):
        for leaf in range(told):
            loss_of(model, 0, leaf).backward()
        with pytest.raises(ss.SequenceError, match=rf"expected optimizer.step\(\) after {told} micro-batches, as"):
            loss_of(model, 0, told).backward()
        optimizer.zero_grad()
    sharded.expect(1)
    loss_of(model, 0, 0).backward()
    optimizer.step()
    loss_of(model, 0, 0).backward()  # of another model's loss, say
    optimizer.zero_grad()
    assert sharded.step_count == 1


# - what is saved, and what is refused


@ss.rule
def averaged(param, grad, average=ss.zeros, *, lr=0.1, keep=False):
    average = average + grad if keep else average
    return param - lr * grad, average


Averaged = averaged.optimizer()


def test_groups_with_other_flags_save_their_own_states_only():
    model = tied()
    wide, narrow = ([p for p in trained(model) if (p.ndim > 1) is wide] for wide in (True, False))
    optimizer = Averaged([{"params": wide, "keep": True}, {"params": narrow}])
    sharded = ss.shard(model, optimizer, stage=2)
    run_step(model, optimizer, sharded, 0)
    saved = optimizer.state_dict()
    names = [{*saved["state"][index]} for group in saved["param_groups"] for index in group["params"][:1]]
    assert names == [{"step", "average"}, {"step"}]
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda params: ss.optim.LBFGS(params), "LBFGS: it calls its closure several times a step"),
        (lambda params: ss.optim.SparseAdam(params), "SparseAdam: a sparse gradient updates rows"),
    ],
)
def test_optimizers_of_torch_that_are_no_rule_do_not_shard(make, said):
    model = tied()
    with pytest.raises(ss.ConfigError, match=f"whose rule can run on shards, got torch.optim.*{said}.*use one of"):
        ss.shard(model, make(trained(model)))


# - schedulers

Scheduler = Callable[[Any], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, [lambda k: 0.9**k, lambda k: 1 / (k + 1)]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda k: 0.8),
    "StepLR": lambda o: lrs.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 3], gamma=0.5),
    "ConstantLR": lambda o: lrs.ConstantLR(o, factor=0.5, total_iters=2),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.2, total_iters=3),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 3, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, 1e-2, step_size_up=2, cycle_momentum=True),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=[0.1, 0.05], total_steps=5),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.3),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=2), lrs.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 2), lrs.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: ss.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def scheduled_run(name: str, shard: bool = True, tensor_lr: bool = False, **options: Any) -> tuple[str, Any]:
    """The digest of four steps, and the rates and betas that they were made with."""
    model = tied()
    groups = [
        {"params": [p for p in trained(model) if (p.ndim > 1) is wide], "maximize": not wide} for wide in (True, False)
    ]
    optimizer = ss.optim.AdamW(groups, lr=torch.tensor(1e-2) if tensor_lr else 1e-2)
    sharded = ss.shard(model, optimizer, **options) if shard else None
    scheduler, rates = SCHEDULERS[name](optimizer), []
    for step in range(4):
        rates.append([(float(group["lr"]), tuple(group["betas"])) for group in optimizer.param_groups])
        run_step(model, optimizer, sharded, step)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    return ss.digest(model, optimizer), rates


def test_every_scheduler_of_torch_is_in_the_table():
    classes = {name for name in lrs.__all__ if name != "LRScheduler"}
    assert classes == SCHEDULERS.keys() - {"SWALR"}


def test_every_scheduler_drives_a_sharded_optimizer_to_the_bits_of_an_unsharded_one(ranks):
    wanted = {name: scheduled_run(name, shard=False) for name in SCHEDULERS}
    assert all(len({str(step) for step in rates}) > 1 for _, rates in wanted.values()), "each one changes something"
    assert (
        len({betas for rates in (wanted["OneCycleLR"][1], wanted["CyclicLR"][1]) for s in rates for _, betas in s}) > 2
    )
    runs = [("scheduled_run", {"name": name, "stage": 3 - number % 4}) for number, name in enumerate(SCHEDULERS)]
    for results in ranks(2).run(runs_of, runs):
        assert dict(zip(SCHEDULERS, results, strict=True)) == wanted


def test_a_scheduler_writes_into_a_rate_that_is_a_tensor():
    wanted = scheduled_run("ExponentialLR", shard=False, tensor_lr=True)
    assert scheduled_run("ExponentialLR", tensor_lr=True, stage=3) == wanted
    assert len({str(step) for step in wanted[1]}) == 4
