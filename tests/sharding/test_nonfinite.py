"""trace_nonfinite names the parameter, the element, the rank and the line of the rule, on every rank."""

import re

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.optim import keras
from tests.optim.test_localities import Lamb
from tests.sharding.models import Tied, Tokens


def trained(stage: int, poison: float) -> str:
    """What the second of two steps raises, with one element of the second moment poisoned between them."""
    torch.manual_seed(1)
    model = Tied()
    optimizer = ss.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sharded = ss.shard(model, optimizer, stage=stage, trace_nonfinite=True)
    for micro in sharded.micro_batches(Tokens(), global_batch=4, micro_batch=1, seed=0):
        model(micro.batch).backward()
        if not micro.last:
            continue
        try:
            optimizer.step()
        except ss.NonFiniteUpdateError as error:
            return str(error)
        optimizer.zero_grad()
        if micro.step == 0:
            state = optimizer.state_dict()
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            state["state"][names.index("blocks.1.up.weight")]["exp_avg_sq"].view(-1)[100] = poison
            optimizer.load_state_dict(state)
        elif micro.step == 2:
            return "all is well"
    return "no step"


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 0), (2, 3), (4, 1)])
def test_the_place_and_the_line_are_named_on_every_rank(ranks, world_size, stage):
    said = set(ranks(world_size).run(trained, stage, -1.0))
    assert len(said) == 1
    text = said.pop()
    assert re.search(r"the update of step 1 .* rank \d, parameter 'blocks\.1\.up\.weight', element 100; ", text)
    assert "sqrt(" in text
    assert "denominator = sqrt(second)" in text


def test_nothing_is_said_when_all_is_finite(ranks):
    assert set(ranks(2).run(trained, 2, 1.0)) == {"all is well"}


def digest_of_steps(trace: bool) -> str:
    torch.manual_seed(1)
    model = Tied()
    optimizer = ss.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sharded = ss.shard(model, optimizer, stage=3, trace_nonfinite=trace)
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=0):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
    return ss.digest(model, optimizer)


def test_watching_changes_no_bit(ranks):
    assert set(ranks(2).run(digest_of_steps, True)) == set(ranks(1).run(digest_of_steps, False))


def test_a_gradient_that_was_not_finite_is_told_from_what_the_rule_made():
    model = nn.Linear(3, 2)
    optimizer = ss.optim.AdamW(model.parameters())
    ss.shard(model, optimizer, trace_nonfinite=True)
    model(torch.tensor([[1.0, float("inf"), 1.0]])).sum().backward()
    with pytest.raises(ss.NonFiniteUpdateError, match=r"element 1; the first value that is not finite is given: grad"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Lamb, "which line made it is known for"),
        (lambda params: keras.Adam(params, clipnorm=1.0), "which line made it is known for"),
        (keras.Adam, "the first value that is not finite is given: grad"),
    ],
    ids=["Lamb", "clipping", "not clipping"],
)
def test_rules_with_sums_name_the_place_only(make, said):
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    ss.shard(model, optimizer, trace_nonfinite=True)
    model(torch.tensor([[float("nan"), 1.0, 1.0]])).sum().backward()
    with pytest.raises(ss.NonFiniteUpdateError, match=f"'weight', element 0; {said}"):
        optimizer.step()
