"""Options and what happens around micro-batches, drawn at random together: the bits are those of one rank.

Every draw is a function of its number, so failures repeat: ``digests_of([drawn(number)])``.
"""

import random
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import shardstep as ss
from tests.sharding.models import BF16, Tied, Tokens, two_groups
from tests.sharding.test_joined_units import joining

RUNS, STEPS, LEAVES = 30, 3, 4
MIXED = {"blocks.0": 3, "blocks.1*": 1, "blocks.*": 2, "": 0}
OPTIMIZERS = {
    "SGD": lambda groups: ss.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "AdamW8bit": lambda groups: ss.optim.AdamW8bit(groups, lr=1e-2),
    "schedule-free": lambda groups: ss.optim.AdamWScheduleFree(groups, lr=1e-2),
    "Keras": lambda groups: ss.optim.keras.AdamW(groups, learning_rate=1e-2),
}
EVENTS = ("nothing", "write", "set_grad", "unfreeze", "average", "overflow")
QUIET = ("look", "save", "fail")  # these change no bit; the events do, in every layout alike
ALONE = {"stage": 0}, {"join": False, "quiet": ["nothing"] * STEPS}


def drawn(number: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What is computed, the arguments of `shard` that must not matter, and what is done that must not matter."""
    draw = random.Random(number)
    run: dict[str, Any] = {"optimizer": draw.choice(list(OPTIMIZERS)), "events": draw.choices(EVENTS, k=STEPS)}
    run["options"] = draw.choice([{}, {"precision": BF16}, {"clip_norm": 0.05}, {"loss_scale": 256.0}])
    layout = draw.choice([{"stage": 1, "schedule": "per step"}, *({"stage": stage} for stage in (1, 2, 3, 3, MIXED))])
    layout |= {"prefetch": draw.choice([0, 1, 2]), "overlap_param_gather": draw.random() < 0.5}
    if run["optimizer"] in ("SGD", "AdamW8bit") and not run["options"].keys() & {"clip_norm", "loss_scale"}:
        layout["update_in_backward"] = "set_grad" not in run["events"]
    return run, layout, {"join": draw.random() < 0.5, "quiet": draw.choices(QUIET, k=STEPS)}


class Run:
    def __init__(self, run: dict[str, Any], layout: dict[str, Any], beside: dict[str, Any]) -> None:
        torch.manual_seed(1)
        self.model = Tied()
        self.optimizer = OPTIMIZERS[run["optimizer"]](two_groups(self.model))
        with joining(1 << 20 if beside["join"] else 0):
            self.sharded = ss.shard(self.model, self.optimizer, **layout, **run["options"])
        rank, own = self.sharded.rank, LEAVES // self.sharded.world_size
        in_a_row = self.sharded.schedule == "per step"
        self.own = range(rank * own, rank * own + own) if in_a_row else range(rank, LEAVES, LEAVES // own)
        self.average = ss.Average(self.model, decay=0.8)

    def step(self, number: int, event: str, quiet: str) -> None:
        self.before(event)
        self.quietly(quiet)
        self.sharded.expect(len(self.own))
        for leaf in self.own:
            loss = self.loss(number * LEAVES + leaf)
            (loss * float("inf") if event == "overflow" and leaf == 1 and self.sharded.loss_scale else loss).backward()
        if event == "set_grad":
            self.sharded.set_full_grad("head.weight", self.sharded.full_grad("embed.weight") * 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        if event == "average":
            with self.average.applied(), torch.no_grad():
                loss = self.loss(0)
            self.sharded.set_full_param("blocks.0.gain", loss.view(1))

    def loss(self, number: int) -> Tensor:
        torch.manual_seed(number)
        return self.model(torch.stack([Tokens()[number], Tokens()[number + 1]]))

    def before(self, event: str) -> None:
        if event == "write":
            with ss.gathered(self.model.blocks[2]), torch.no_grad():
                self.model.blocks[2].up.weight[3:].mul_(0.5)
        if event == "unfreeze" and not (frozen := self.model.blocks[1].frozen).requires_grad:
            self.optimizer.add_param_group({"params": [frozen.requires_grad_()]})

    def quietly(self, kind: str) -> None:
        if kind == "look":
            with ss.gathered(self.model), torch.no_grad():
                self.loss(3)
            self.sharded.full_param("embed.weight")
            self.average.state_dict()
        if kind == "save":
            self.model.load_state_dict(self.model.state_dict())
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        if kind == "fail":
            self.sharded.expect(LEAVES)
            handle = self.model.blocks[1].register_forward_hook(lambda *args: args[2].register_hook(_fail) and None)
            loss = self.loss(9)
            handle.remove()
            with suppress(ZeroDivisionError):
                loss.backward()
            self.model.zero_grad()


def _fail(grad: Tensor) -> None:
    raise ZeroDivisionError


def digests_of(runs: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> list[str]:
    found = []
    for run, layout, beside in runs:
        one = Run(run, layout, beside)
        for number in range(STEPS):
            one.step(number, run["events"][number], beside["quiet"][number])
        found.append(ss.digest(one.model, one.optimizer))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_any_combination_gives_the_bits_of_one_rank(ranks, world_size):
    runs = [drawn(number) for number in range(world_size, 2 * RUNS, 2)]
    wanted = digests_of([(run, *ALONE) for run, _, _ in runs])
    for found in ranks(world_size).run(digests_of, runs):
        assert not [run for run, own, other in zip(runs, found, wanted, strict=True) if own != other]
