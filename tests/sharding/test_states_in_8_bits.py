"""8-bit states on shards: the bits of one rank and of the optimizer alone, bytes by the formula, reloading."""

from typing import Any

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.optim import Optimizer
from tests.rules.examples import lamb, rows_in_8_bits
from tests.sharding.models import BF16, Tied, Tokens

STATES = dict(zip(lamb.states, ("dynamic8", "dynamic8_unsigned"), strict=True))
Lamb8bit = type("Lamb8bit", (Optimizer,), {"rule": lamb.stored(**STATES)})
Rows8bit = type("Rows8bit", (Optimizer,), {"rule": rows_in_8_bits})


class Wide(nn.Module):
    """Parameters of several blocks of 1,024 elements beside those that fill no 256."""

    def __init__(self) -> None:
        super().__init__()
        self.small = Tied()
        self.large = nn.Parameter(torch.randn(3, 700))
        self.odd = nn.Parameter(torch.randn(1301))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = (self.large.pow(2).mean(0) * tokens.float().mean()).mean()
        return self.small(tokens) + x + (self.odd * torch.linspace(-1, 1, 1301)).tanh().pow(2).mean()


def trained(kind: type[Optimizer], options: dict[str, Any], reload: bool = False) -> tuple[Any, ...]:
    torch.manual_seed(3)
    model = Wide()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.01)
    sharded = ss.shard(model, optimizer, **options)
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=1):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if reload:
                optimizer.load_state_dict(optimizer.state_dict())
            if micro.step == 2:
                break
    return ss.digest(model, optimizer), sharded.bytes.peak.state, sharded.bytes.formula.state


def all_trained(runs: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [trained(*run) for run in runs]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_gives_the_bits_of_one_rank_and_the_bytes_of_the_formula(ranks, world_size):
    kinds = {(ss.optim.AdamW8bit, None): (0, 1, 2, 3), (ss.optim.AdamW8bit, BF16): (1, 3), (Lamb8bit, None): (0, 3)}
    kinds |= {(Rows8bit, None): (0, 2, 3), (Rows8bit, BF16): (1,)}
    runs = [
        (kind, {"stage": stage, "precision": precision, "clip_norm": 0.5}, stage == 3)
        for (kind, precision), stages in kinds.items()
        for stage in stages
    ]
    wanted = {key: trained(key[0], {"stage": 0, "precision": key[1], "clip_norm": 0.5})[0] for key in kinds}
    assert len(set(wanted.values())) == len(kinds)
    for results in ranks(world_size).run(all_trained, runs):
        for (kind, options, _), (digest, peak, formula) in zip(runs, results, strict=True):
            assert digest == wanted[kind, options["precision"]], (kind.__name__, options)
            assert peak == formula


def state_bytes(numel: int) -> int:
    torch.manual_seed(0)
    model = nn.Linear(numel // 4, 4, bias=False)
    return ss.shard(model, ss.optim.AdamW8bit(model.parameters()), stage=1).bytes.peak.state


def test_the_bytes_by_hand(ranks):
    """8,192 elements on two ranks: 4,096 codes and 16 scales of each state."""
    assert ranks(2).run(state_bytes, 8192) == [2 * (4096 + 4 * 16)] * 2


@ss.rule
def drifting(param, grad, buffer=ss.state(dtype="dynamic8"), *, lr=0.01):
    """Where there is no gradient, as in the gaps between tensors, its state is largest."""
    buffer = 0.9 * buffer + 1 / (1 + 1000 * abs(grad))
    return param - lr * buffer * grad, buffer


def alone_and_sharded(kind: type[Optimizer]) -> tuple[str, str]:
    """In float64, in which one micro-batch's gradient is the same to the bit."""
    digests = []
    for sharded in (False, True):
        torch.manual_seed(1)
        model = Wide().double()
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if sharded:
            ss.shard(model, optimizer, stage=3)
        for step in range(3):
            torch.manual_seed(step)
            model(torch.stack([Tokens()[i] for i in range(4)])).backward()
            optimizer.step()
            optimizer.zero_grad()
        digests.append(ss.digest(model, optimizer))
    return digests[0], digests[1]


@pytest.mark.parametrize("kind", [ss.optim.AdamW8bit, drifting.optimizer()], ids=lambda kind: kind.__name__)
def test_scales_are_of_a_tensors_own_elements(kind):
    """A shard's gaps and neighbours never enter one."""
    alone, sharded = alone_and_sharded(kind)
    assert alone == sharded


def whole_states(stage: int, saved: dict[str, Any] | None) -> dict[str, Any]:
    torch.manual_seed(5)
    model = Wide()
    optimizer = ss.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ss.shard(model, optimizer, stage=stage)
    if saved is not None:
        optimizer.load_state_dict(saved)
    else:
        model(torch.stack([Tokens()[i] for i in range(2)])).backward()
        optimizer.step()
    return optimizer.state_dict()


def test_states_go_from_any_shards_to_any_others_and_to_none(ranks):
    saved = ranks(2).run(whole_states, 3, None)[0]
    for world_size, stage in ((1, 0), (4, 2)):
        loaded = ranks(world_size).run(whole_states, stage, saved)[-1]
        for key, state in saved["state"].items():
            assert list(loaded["state"][key]) == list(state)
            assert all(torch.equal(loaded["state"][key][name], values) for name, values in state.items())
    model = Wide()
    alone = ss.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=0.01)
    alone.load_state_dict(saved)
    assert torch.equal(alone.state[model.odd]["exp_avg"], saved["state"][1]["exp_avg"])


def poisoned(stage: int) -> str:
    """A gradient whose square is infinite: the param stays finite, and 256 second moments are lost."""
    torch.manual_seed(1)
    model = Wide()
    optimizer = ss.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ss.shard(model, optimizer, stage=stage, trace_nonfinite=True)
    place = torch.arange(1301) == 1200
    model.odd.register_hook(lambda grad: torch.where(place, 1e30, grad))
    model(torch.stack([Tokens()[i] for i in range(2)])).backward()
    try:
        optimizer.step()
    except ss.NonFiniteUpdateError as error:
        return str(error)
    return "all is well"


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 3)])
def test_the_element_that_lost_its_neighbours_is_named(ranks, world_size, stage):
    for said in ranks(world_size).run(poisoned, stage):
        assert "parameter 'odd', element 1200; the first value that is not finite, fma(" in said
