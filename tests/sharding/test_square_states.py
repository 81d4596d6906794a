"""States of square matrices on shards: at the owners only, with the bits of one rank, in whole state dicts, counted."""

from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardstep as ss
from shardstep.config import Stage
from shardstep.demo.gpt import GPT
from shardstep.layout import lay_out
from shardstep.rules.functions import identity, max_abs, norm
from shardstep.sharding.formula import Formula, SpaceSize
from shardstep.sharding.ownership import owners, places_by_rule
from tests.sharding.models import BF16, Tied, Tokens
from tests.sharding.test_bytes import CONFIG, train_steps

MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}
SHAMPOO = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "update_freq": 2}


def combined(model: nn.Module) -> ss.optim.Combined:
    given = [p for p in model.parameters() if p.requires_grad]
    return ss.optim.Combined(
        ss.optim.Shampoo([p for p in given if p.ndim == 2], **SHAMPOO),
        ss.optim.AdamW([p for p in given if p.ndim != 2], lr=0.01),
    )


def trained(
    options: dict[str, Any], steps: range = range(4), before: Any = None, reload: bool = False
) -> tuple[nn.Module, ss.optim.Combined]:
    """From what ``before`` holds, values and states, on."""
    torch.manual_seed(1)
    model = Tied(40)
    optimizer = combined(model)
    if before is not None:
        model.load_state_dict(before[0])
    sharded = ss.shard(model, optimizer, **options)
    if before is not None:
        optimizer.load_state_dict(before[1])
    batches = sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=5, start_step=steps.start)
    for micro in batches:
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if reload:
                optimizer.load_state_dict(optimizer.state_dict())
            if micro.step == steps[-1]:
                break
    return model, optimizer


def digests(all_options: list[dict[str, Any]], steps: range = range(4), before: Any = None) -> list[str]:
    return [ss.digest(*trained(options, steps, before)) for options in all_options]


class WithNothing(nn.Module):
    """One matrix has columns and no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.something, self.nothing = nn.Linear(3, 2), nn.Parameter(torch.ones(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.something(x).sum() + self.nothing.sum()


def digest_with_nothing(stage: int) -> str:
    torch.manual_seed(1)
    model = WithNothing()
    optimizer = combined(model)
    ss.shard(model, optimizer, stage=stage)
    model(torch.ones(2, 3)).backward()
    optimizer.step()
    return ss.digest(model, optimizer)


def test_a_matrix_without_elements_has_states_that_stay(ranks):
    wanted = digest_with_nothing(0)
    for stage in (0, 3):
        assert ranks(2).run(digest_with_nothing, stage) == [wanted] * 2


def reloaded_digest(options: dict[str, Any]) -> str:
    return ss.digest(*trained(options, reload=True))


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
def test_every_layout_gives_the_bits_of_the_one_rank_run(ranks, precision):
    common = {"clip_norm": 0.5, "precision": precision}
    (expected,) = digests([{"stage": 0, **common}])
    layouts = [{"stage": stage, **common} for stage in ((0, 1, 2, 3, MIXED) if precision is None else (0, MIXED))]
    for world_size in (1, 2, 4):
        for found in ranks(world_size).run(digests, layouts):
            assert found == [expected] * len(layouts), world_size


def test_states_reloaded_after_each_step(ranks):
    (expected,) = digests([{"stage": 0}])
    assert set(ranks(4).run(reloaded_digest, {"stage": 3})) == {expected}


def saved(options: dict[str, Any], steps: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model, optimizer = trained(options, steps)
    with ss.gathered(model):
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return values, optimizer.state_dict()


def test_state_dicts_go_from_any_layout_to_any_other(ranks):
    """Also to the same optimizer alone; the roots of an earlier step come along."""
    (expected,) = digests([{"stage": 0}])
    before = ranks(2).run(saved, {"stage": 3}, range(1))[0]
    state = before[1]["state"]
    shapes = {name: tuple(values.shape) for name, values in state[0].items()}
    square = {"left": (50, 50), "left_root": (50, 50), "right": (40, 40), "right_root": (40, 40)}
    assert shapes == {"step": (), **square, "momentum_buffer": (50, 40)}
    alone = saved({"stage": 0}, range(1))[1]["state"]
    assert all(torch.equal(alone[key][name], values) for key, own in state.items() for name, values in own.items())
    for world_size, stage in ((1, 0), (2, 1), (4, 3)):
        found = ranks(world_size).run(digests, [{"stage": stage}], range(1, 4), before)
        assert found == [[expected]] * world_size, (world_size, stage)
    optimizer = combined(Tied(40))
    optimizer.load_state_dict(before[1])
    assert optimizer.state_dict()["state"][0]["left"].shape == (50, 50)


def counted(runs: list[dict[str, Any]]) -> list[tuple[Any, Any, int]]:
    """Peaks, formula, and the bytes sent in the second step over those of the formula."""
    found = []
    for options in runs:
        torch.manual_seed(1)
        model = GPT(CONFIG)
        optimizer = combined(model)
        sharded = ss.shard(model, optimizer, **options)
        sent = train_steps(model, optimizer, sharded, 2, 2)
        found.append((astuple(sharded.bytes.peak), astuple(sharded.bytes.formula), sent[1] - sharded.step_bytes(2)))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_formula_counts_them_to_the_byte(ranks, world_size):
    runs = [{"stage": stage, "precision": precision} for stage in (0, 1, 3, MIXED) for precision in (None, BF16)]
    for results in ranks(world_size).run(counted, runs):
        for run, (peak, formula, more) in zip(runs, results, strict=True):
            assert peak == formula, run
            assert more == 0, "its norms are those of whole matrices, which the owner takes"


@pytest.mark.parametrize("stage", [0, 3])
def test_bytes_by_hand(stage):
    """Two matrices on two ranks: the costlier one belongs to rank 0, the other one to rank 1. Four: two to each."""
    shapes = [(6, 10), (30, 20)]
    layout = lay_out(torch.float32, [(str(shape), shape) for shape in shapes])
    states = [ss.optim.Shampoo.rule.declared[:4]] * 2
    precision = ss.Precision(params=torch.float32, reduce=torch.float32, master=torch.float32)

    def bytes_of(rank: int, *rules: int) -> tuple[int, int]:
        moved = ((4, 4), (4, 4))
        sizes = [SpaceSize(layout, precision, True, Stage(*[stage > 0] * 3), states, rule, moved) for rule in rules]
        formula = Formula([sizes], 2, 1, 1, "per leaf", rank)
        return formula.peak().state, formula.traffic()

    large, small = 4 * 2 * (30 * 30 + 20 * 20), 4 * 2 * (6 * 6 + 10 * 10)
    assert [bytes_of(rank, 0)[0] for rank in (0, 1)] == [large, small]
    assert [bytes_of(rank, 0, 0)[0] for rank in (0, 1)] == [large + small, large + small]
    for rank in (0, 1):
        assert bytes_of(rank, 0, 1) == tuple(2 * bytes_ for bytes_ in bytes_of(rank, 0)), "each rule by itself"


def test_the_tensors_of_each_rule_have_owners_of_their_own():
    layouts = [lay_out(torch.float32, [(str(n), (n, n)) for n in sizes]) for sizes in ([8, 6], [9, 7], [5])]
    spaces = [(rule, layout, Stage(True, True, True)) for rule, layout in zip((0, 1, 0), layouts, strict=True)]
    found = [[place.owner for place in own] for own in places_by_rule(spaces, 2)]
    assert found == [[0, 1], [0, 1], [1]]
    assert owners([8**3, 6**3, 5**3], 2) == [0, 1, 1]


class Layers(nn.Module):
    """``large`` comes to be trained later, and then changes who owns the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(30, 40, bias=False)
        self.large = nn.Linear(40, 60, bias=False)
        self.last = nn.Linear(60, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.last(torch.tanh(self.large(torch.tanh(self.first(x))))), torch.arange(4) % 8)


def unfrozen(options: dict[str, Any] | None) -> tuple[str, list[list[int]], tuple[int, int]]:
    """The digest, the owners before and after, and the bytes of states that there are and that there should be."""
    model = Layers()
    model.large.weight.requires_grad_(False)
    optimizer = ss.optim.Shampoo([model.first.weight, model.last.weight], lr=0.1)
    sharded = None if options is None else ss.shard(model, optimizer, **options)
    at: list[list[int]] = []
    for step in range(4):
        if step == 2:
            model.large.weight.requires_grad_()
            optimizer.add_param_group({"params": [model.large.weight], "update_freq": 2})
        torch.manual_seed(step)
        model(torch.randn(4, 30)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if sharded is not None and step in (1, 3):
            spaces = [space for unit in sharded._units for space in unit.spaces if space.trained]
            at.append([place.owner for space in spaces for place in space.places])
    live = (0, 0) if sharded is None else (sharded._ledger.live.state, sharded.bytes.formula.state)
    return ss.digest(model, optimizer), at, live


def test_parameters_that_are_trained_later_move_the_states_of_others(ranks):
    expected, _, _ = unfrozen(None)
    for world_size, stage in ((1, 3), (2, 0), (2, 3)):
        for digest, at, (live, formula) in ranks(world_size).run(unfrozen, {"stage": stage}):
            assert digest == expected, (world_size, stage)
            assert live == formula
            if world_size == 2:
                assert at == [[0, 1], [1, 1, 0]] or at == [[0, 1], [1, 0, 1]] or at[0][0] != at[1][0], at


@ss.rule
def counting(param, grad, count=ss.state(shape="row_pair"), *, lr=0.1):
    """Nothing goes to the middle, and nothing comes back."""
    return param - lr * grad, count + 1


@ss.rule
def measured(param, grad, left=ss.state(1.0, shape="row_pair"), right=ss.state(shape="column_pair"), *, lr=0.1):
    """Elements meet a number of the states, and a state is made of the other's."""
    size = norm(left)
    return param - lr / size * grad, 0.5 * left + size, right + max_abs(left) * identity(right)


def odd_digest(rule: Any, stage: int | None) -> str:
    model = Layers()
    optimizer = rule.optimizer()(model.parameters())
    if stage is not None:
        ss.shard(model, optimizer, stage=stage)
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randn(4, 30)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer)


@pytest.mark.parametrize("number", [0, 1], ids=["counting", "measured"])
def test_states_that_products_have_no_part_in(ranks, number):
    expected = odd_digests(number, [None])[0]
    for world_size in (1, 2):
        assert ranks(world_size).run(odd_digests, number, [0, 3]) == [[expected] * 2] * world_size


def odd_digests(number: int, stages: list[int | None]) -> list[str]:
    return [odd_digest((counting, measured)[number], stage) for stage in stages]


def idle_muon(stage: int) -> str:
    """Without a middle."""
    model = Layers()
    optimizer = ss.optim.Muon(model.parameters(), lr=0.1, ns_steps=0)
    ss.shard(model, optimizer, stage=stage)
    for step in range(2):
        torch.manual_seed(step)
        model(torch.randn(4, 30)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer)


def test_a_rule_whose_products_are_left_out(ranks):
    assert set(ranks(2).run(idle_muon, 3)) == {idle_muon(0)}


def test_rows_beside_products_do_not_shard():
    @ss.rule
    def both(param, grad, row=ss.state(shape="row"), left=ss.state(shape="row_pair")):
        return param - left @ grad * row, row + 1, left + grad @ grad.T

    model = nn.Linear(3, 3, bias=False)
    with pytest.raises(ss.ConfigError, match="values and states of elements and of square matrices, and no others"):
        ss.shard(model, both.optimizer()(model.parameters()))
