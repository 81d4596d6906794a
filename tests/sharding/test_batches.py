"""Micro-batches: together the ranks see what one rank sees, with the same random numbers, from any step on."""

import random
from dataclasses import replace

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shardstep as ss
from shardstep.sharding.batches import BatchPlan, MicroBatch, micro_batches


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """The plan of rank 0 of a few ranks."""
    schedule = draw(st.sampled_from(["per leaf", "per step"]))
    world_size = draw(st.integers(1, 4))
    own = draw(st.sampled_from([1, 2, 4] if schedule == "per step" else [1, 2, 3, 5]))
    micro_batch = draw(st.integers(1, 3))
    global_batch = own * world_size * micro_batch
    samples = global_batch + draw(st.integers(0, 3 * global_batch))
    return BatchPlan(samples, global_batch, micro_batch, draw(st.integers(0, 99)), 0, world_size, schedule)


def dealt(plan: BatchPlan, steps: range, hints: list[int | None] | None = None) -> list[MicroBatch]:
    said: list[int | None] = [] if hints is None else hints
    return list(micro_batches(range(plan.samples), plan, steps, list, said.append))


def dealt_to_all(plan: BatchPlan, steps: range) -> list[list[MicroBatch]]:
    return [dealt(replace(plan, rank=rank), steps) for rank in range(plan.world_size)]


def contents(batches: list[MicroBatch]) -> list[tuple[int, int, list[int]]]:
    return [(micro.step, micro.index, micro.batch) for micro in batches]


@settings(max_examples=50)
@given(plans(), st.integers(1, 3))
def test_together_the_ranks_get_what_one_rank_gets(plan, epochs):
    steps = range(epochs * plan.steps_per_epoch)
    alone = contents(dealt(replace(plan, world_size=1), steps))
    everyone = [micro for batches in dealt_to_all(plan, steps) for micro in contents(batches)]
    assert sorted(everyone) == alone
    assert [(step, index) for step, index, _ in alone] == [(s, i) for s in steps for i in range(plan.leaves)]


@settings(max_examples=50)
@given(plans())
def test_each_rank_gets_its_own_by_the_schedule(plan):
    for rank, batches in enumerate(dealt_to_all(plan, range(1))):
        indices = [micro.index for micro in batches]
        if plan.schedule == "per leaf":
            assert indices == [i for i in range(plan.leaves) if i % plan.world_size == rank]
        else:
            assert indices == [i for i in range(plan.leaves) if i // plan.own_leaves == rank]


@settings(max_examples=50)
@given(plans())
def test_the_last_micro_batch_of_every_step_is_marked_and_their_number_told_with_each(plan):
    hints: list[int | None] = []
    steps = range(2 * plan.steps_per_epoch)
    for position, micro in enumerate(dealt(plan, steps, hints), 1):
        assert micro.last == (position % plan.own_leaves == 0)
    assert hints == [plan.own_leaves] * plan.own_leaves * len(steps) + [None]


@settings(max_examples=50)
@given(plans(), st.data())
def test_a_later_start_gives_the_rest_of_the_same_sequence(plan, data):
    last = 3 * plan.steps_per_epoch
    start = data.draw(st.integers(0, last))
    whole = dealt(plan, range(last))
    assert dealt(plan, range(start, last)) == whole[start * plan.own_leaves :]


@settings(max_examples=50)
@given(plans())
def test_an_epoch_sees_no_sample_twice_and_drops_the_partial_last_batch(plan):
    alone = replace(plan, world_size=1)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = [sample for micro in dealt(alone, steps) for sample in micro.batch]
        assert len(set(seen)) == len(seen) == plan.samples - plan.samples % plan.global_batch


def order_of(seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    plan = BatchPlan(40, 8, 2, seed, rank, world_size, "per leaf")
    return [micro.batch for micro in dealt(plan, range(epoch * 5, epoch * 5 + 5))]


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [order_of(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(orders.count(order) == 1 for order in orders)
    assert order_of(0, 0) == order_of(0, 0)
    assert order_of(0, 0) != sorted(order_of(0, 0))


def drawn() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(numpy.random.rand())


def numbers_drawn(plan: BatchPlan, steps: range, disturbance: int) -> dict[tuple[int, int], tuple[float, ...]]:
    numbers = {}
    for micro in micro_batches(range(plan.samples), plan, steps, list, lambda leaves: None):
        numbers[micro.step, micro.index] = drawn()
        torch.rand(disturbance)
    return numbers


@settings(max_examples=50)
@given(plans())
def test_random_numbers_depend_on_the_micro_batch_and_on_nothing_else(plan):
    steps = range(plan.steps_per_epoch)
    alone = numbers_drawn(replace(plan, world_size=1), steps, 0)
    together: dict[tuple[int, int], tuple[float, ...]] = {}
    for rank in range(plan.world_size):
        together |= numbers_drawn(replace(plan, rank=rank), steps, 1 + rank)
    assert together == alone
    assert len(set(alone.values())) == len(alone), "each micro-batch has numbers of its own"


def noisy_collate(samples: list[int]) -> list[int]:
    torch.rand(len(samples))
    return samples


def test_random_numbers_do_not_depend_on_what_the_dataset_draws():
    plan = BatchPlan(8, 4, 2, 0, 0, 1, "per leaf")
    quiet = [drawn() for _ in micro_batches(range(8), plan, range(2), list, lambda leaves: None)]
    noisy = [drawn() for _ in micro_batches(range(8), plan, range(2), noisy_collate, lambda leaves: None)]
    assert quiet == noisy


def one_rank() -> ss.Sharded:
    model = nn.Linear(2, 2)
    return ss.shard(model, ss.optim.AdamW(model.parameters()))


def test_the_handle_deals_epochs_from_a_step_on_with_torchs_collate_or_yours():
    sharded, dataset = one_rank(), torch.arange(10)
    options = {"global_batch": 4, "micro_batch": 2, "seed": 3, "epochs": 3}
    whole = list(sharded.micro_batches(dataset, **options))
    assert [(m.step, m.index, m.last) for m in whole] == [(s, i, i == 1) for s in range(6) for i in range(2)]
    rest = list(sharded.micro_batches(dataset, **options, start_step=4))
    assert [m.batch.tolist() for m in rest] == [m.batch.tolist() for m in whole[8:]]
    mine = list(sharded.micro_batches(dataset, **options, collate=len))
    assert {m.batch for m in mine} == {2}
