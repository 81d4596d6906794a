"""Same meaning: an independent loop of plain torch, in one process, goes the same way for 20 steps.

The plain loop knows nothing of shardstep: torch's AdamW, gradients accumulated by torch, torch's clipping.
"""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from tests.sharding.models import Tied

STEPS, LEAVES, CLIP_NORM = 20, 4, 0.5


def tokens(step: int, leaf: int) -> Tensor:
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(LEAVES * step + leaf))


def fresh(dtype: torch.dtype) -> Tied:
    """Tied weights, frozen parameters, dropout, and a layer in each block that is used now and then."""
    torch.manual_seed(1)
    return Tied().to(dtype)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "lr": 2e-2, "betas": (0.8, 0.95)},
    ]


def schedule_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [5])


def plain_run(dtype: torch.dtype, clip: bool) -> dict[str, Any]:
    model = fresh(dtype)
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2, foreach=False)
    scheduler, losses, norms = schedule_of(optimizer), [], []
    for step in range(STEPS):
        for leaf in range(LEAVES):
            torch.manual_seed(LEAVES * step + leaf)
            loss = model(tokens(step, leaf))
            (loss / LEAVES).backward()
            losses.append(loss.item())
        if clip:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses, "norms": norms}


def sharded_run(dtype: torch.dtype, clip: bool, options: dict[str, Any]) -> bytes:
    """This rank's losses and the whole result; as bytes, because tensors travel between processes as handles."""
    model = fresh(dtype)
    optimizer = ss.optim.AdamW(groups_of(model), lr=1e-2, foreach=False)
    scheduler, losses, norms = schedule_of(optimizer), [], []
    sharded = ss.shard(model, optimizer, clip_norm=CLIP_NORM if clip else None, **options)
    for step in range(STEPS):
        for leaf in own_leaves(sharded):
            torch.manual_seed(LEAVES * step + leaf)
            loss = model(tokens(step, leaf))
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        norms += [sharded.grad_norm] if clip else []
    packed = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses, "norms": norms}, packed
    )
    return packed.getvalue()


def own_leaves(sharded: ss.Sharded) -> range:
    if sharded.schedule == "per leaf":
        return range(sharded.rank, LEAVES, sharded.world_size)
    own = LEAVES // sharded.world_size
    return range(sharded.rank * own, (sharded.rank + 1) * own)


def losses_in_order(ours: list[dict[str, Any]], schedule: str) -> list[float]:
    """All ranks' losses in the order of the plain loop."""
    by_rank = torch.tensor([run["losses"] for run in ours]).view(len(ours), STEPS, -1)
    order = (1, 2, 0) if schedule == "per leaf" else (1, 0, 2)
    return by_rank.permute(order).flatten().tolist()


FP32 = {"rtol": 1e-5, "atol": 2e-6}
FP64 = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize(("dtype", "tight"), [(torch.float32, FP32), (torch.float64, FP64)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    ("world_size", "options"),
    [(1, {"stage": 3}), (2, {"stage": 3}), (2, {"stage": 1, "schedule": "per step"})],
    ids=["1 rank", "2 ranks", "2 ranks per step"],
)
def test_twenty_steps_go_the_way_of_plain_torch(ranks, world_size, options, clip, dtype, tight):
    plain = plain_run(dtype, clip)
    packed = ranks(world_size).run(sharded_run, dtype, clip, options)
    ours = [torch.load(io.BytesIO(one), weights_only=True) for one in packed]
    torch.testing.assert_close(losses_in_order(ours, options.get("schedule", "per leaf")), plain["losses"], **tight)
    for run in ours:
        torch.testing.assert_close(run["norms"], plain["norms"], **tight)
        assert_models_close(run["model"], plain["model"], tight)
        assert_optimizers_close(run["optimizer"], plain["optimizer"], tight)


def assert_models_close(ours: dict[str, Tensor], plain: dict[str, Tensor], tight: dict[str, float]) -> None:
    assert list(ours) == list(plain)
    for name, values in plain.items():
        torch.testing.assert_close(ours[name], values, **tight, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(ours["head.weight"], ours["embed.weight"])
    assert torch.equal(ours["blocks.0.frozen"], plain["blocks.0.frozen"])


def assert_optimizers_close(ours: dict[str, Any], plain: dict[str, Any], tight: dict[str, float]) -> None:
    for mine, theirs in zip(ours["param_groups"], plain["param_groups"], strict=True):
        assert {name: theirs[name] for name in mine} == mine
    assert ours["state"].keys() == plain["state"].keys()
    for index, state in plain["state"].items():
        assert ours["state"][index]["step"].item() == state["step"].item()
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours["state"][index][name], state[name], **tight)


def test_some_parameters_skip_some_steps():
    """So that the runs above show that they are skipped as torch skips them."""
    steps = {int(state["step"]) for state in plain_run(torch.float32, False)["optimizer"]["state"].values()}
    assert max(steps) == STEPS
    assert len(steps) > 1


class Branches(nn.Module):
    """Two branches, of which a micro-batch takes one or none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2))

    def forward(self, x: Tensor, branch: int | None) -> Tensor:
        x = self.stem(x)
        return (x if branch is None else self.branches[branch](x)).square().sum()


Taken = tuple[tuple[int | None, int | None], ...]
"""The branch of each of a step's two micro-batches."""
APART: Taken = ((0, None), (None, None), (None, 0), (1, 0), (0, 0), (None, None))
TOGETHER: Taken = ((0, 0), (None, None), (0, 0), (1, 1), (0, 0), (None, None))


def branches_alone(all_taken: Taken) -> list[tuple[int, float]]:
    torch.manual_seed(2)
    model = Branches().double()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5, foreach=False)
    for step, taken in enumerate(all_taken):
        for leaf, branch in enumerate(taken):
            (model(inputs_of(step, leaf), branch) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [
        (int(optimizer.state[p]["step"]) if p in optimizer.state else 0, p.sum().item()) for p in model.parameters()
    ]


def branches_sharded(stage: int, all_taken: Taken) -> list[tuple[int, float]]:
    torch.manual_seed(2)
    model = Branches().double()
    optimizer = ss.optim.AdamW(model.parameters(), weight_decay=0.5)
    sharded = ss.shard(model, optimizer, stage=stage)
    for step, taken in enumerate(all_taken):
        for leaf in range(sharded.rank, 2, sharded.world_size):
            model(inputs_of(step, leaf), taken[leaf]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    with ss.gathered(model):
        sums = [parameter.sum().item() for parameter in model.parameters()]
    return [(int(state[i]["step"]) if i in state else 0, total) for i, total in enumerate(sums)]


def inputs_of(step: int, leaf: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(2 * step + leaf)).double()


@pytest.mark.parametrize(
    ("world_size", "stage", "all_taken"),
    [(1, 3, APART), (2, 0, APART), (2, 2, APART), (2, 3, TOGETHER)],
    ids=["1 rank", "2 ranks at stage 0", "2 ranks at stage 2", "2 ranks at stage 3"],
)
def test_a_unit_without_gradient_is_neither_decayed_nor_counted(ranks, world_size, stage, all_taken):
    """A branch that only the other rank takes counts; one that no rank takes is left alone, decay and all.

    At stage 3 the ranks take the same branches: a unit is gathered by all of them or by none.
    """
    plain = branches_alone(all_taken)
    assert [steps for steps, _ in plain] == [6] * 2 + [4 - (all_taken is TOGETHER)] * 4 + [1] * 4
    for ours in ranks(world_size).run(branches_sharded, stage, all_taken):
        assert [steps for steps, _ in ours] == [steps for steps, _ in plain]
        torch.testing.assert_close([total for _, total in ours], [total for _, total in plain], rtol=1e-12, atol=1e-13)
