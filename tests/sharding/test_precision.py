"""Dtypes chosen apart: what leaves travel in, what they are summed in, and parameters without a master."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from tests.sharding.models import Tied, Tokens, train
from tests.sharding.test_bytes import ALL_SHARDS, FLOOR, PADDED_ROOT, counted_runs, tower_on_two_ranks

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
STOCHASTIC = ss.Precision(BF16, BF16, BF16, rounding="stochastic", seed=3)
COCKTAILS = {
    "low on the wire": ss.Precision(F32, BF16),
    "wide on the wire": ss.Precision(BF16, F32),
    "low sums": ss.Precision(BF16, BF16, accumulate=BF16),
    "wide sums": ss.Precision(BF16, BF16, accumulate=F64),
    "half": ss.Precision(F16, BF16, accumulate=F32),
    "stochastic": STOCHASTIC,
    "stochastic, wide sums": ss.Precision(F16, F32, F16, rounding="stochastic", accumulate=F64),
    "nearest": ss.Precision(BF16, BF16, BF16, rounding="nearest"),
}
MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}
LAYOUTS = [{"stage": 0}, {"stage": 2}, {"stage": 3}, {"stage": MIXED}, {"stage": 1, "schedule": "per step"}]


def digests_of(runs: list[dict[str, Any]]) -> list[str]:
    digests = []
    for run in runs:
        model, optimizer, _ = train(Tied, Tokens(), steps=2, **run)
        digests.append(ss.digest(model, optimizer))
    return digests


@cache
def wanted(name: str) -> str:
    return digests_of([{"stage": 0, "precision": COCKTAILS[name]}])[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_precision_has_the_bits_of_its_one_rank_run(ranks, world_size):
    names = list(COCKTAILS)
    assert wanted("low sums") != wanted("wide sums")
    assert wanted("stochastic") != wanted("nearest")
    cases = [(name, LAYOUTS[(i + world_size) % 5]) for i, name in enumerate(names)]
    for digests in ranks(world_size).run(digests_of, [{**layout, "precision": COCKTAILS[n]} for n, layout in cases]):
        assert not [case for case, digest in zip(cases, digests, strict=True) if digest != wanted(case[0])]


def test_the_formula_is_exact_for_every_precision(ranks):
    layouts = [(1, {"stage": 3}), (3, {"stage": 0}), (2, {"stage": 1, "schedule": "per step"}), (2, {"stage": 2})]
    runs = [(own, {**options, "precision": p}) for p in COCKTAILS.values() for own, options in layouts]
    for results in ranks(2).run(counted_runs, runs):
        for run, row in zip(runs, results, strict=True):
            assert (row.peak, row.sent) == (row.formula, row.sent_formula), run


def test_parameters_without_a_master_by_hand(ranks):
    (parameters, _, state), _ = tower_on_two_ranks(ranks, stage=3, precision=STOCHASTIC, prefetch=0)
    assert parameters == 2 * (ALL_SHARDS + PADDED_ROOT + FLOOR)
    assert state == 2 * 4 * ALL_SHARDS  # exp_avg and exp_avg_sq in float32, and no master


class Single(nn.Module):
    """One parameter, whose gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


@pytest.mark.parametrize(("accumulate", "total"), [(None, 1 + 2**-9), (BF16, 1.0), (F64, 1 + 2**-9)])
def test_leaves_are_summed_in_the_dtype_that_accumulate_says(accumulate, total):
    model = Single()
    optimizer = ss.optim.SGD(model.parameters(), lr=2.0)
    ss.shard(model, optimizer, precision=ss.Precision(F32, BF16, accumulate=accumulate))
    for value in (1.0, 2.0**-9):
        model(torch.full((2,), value)).backward()
    optimizer.step()
    with ss.gathered(model):
        assert model.weight.tolist() == [-total] * 2


@pytest.mark.parametrize(("reduce", "sent"), [(F32, 1 + 2**-9), (BF16, 1.0)])
def test_leaves_travel_in_the_dtype_that_reduce_says(reduce, sent):
    model = Single()
    optimizer = ss.optim.SGD(model.parameters(), lr=1.0)
    ss.shard(model, optimizer, precision=ss.Precision(F32, reduce))
    model(torch.full((2,), 1 + 2.0**-9)).backward()
    optimizer.step()
    with ss.gathered(model):
        assert model.weight.tolist() == [-sent] * 2


# - parameters without a master


def learned(precision: ss.Precision | None) -> Tensor:
    """A least-squares problem whose updates are smaller than half a place of bfloat16: weights near 1, slowly moved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    target = torch.randn(16, 16) * 0.1 + 1.0
    model[0].weight.data.fill_(1.0)
    optimizer = ss.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    ss.shard(model, optimizer, stage=1, precision=precision)
    for _ in range(60):
        (model[0].weight.float() - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model[0].weight.detach().float()


def test_stochastic_rounding_follows_the_run_in_float32_and_nearest_does_not():
    exact = learned(None)
    stochastic = (learned(STOCHASTIC) - exact).abs().mean()
    nearest = (learned(COCKTAILS["nearest"]) - exact).abs().mean()
    assert torch.equal(learned(COCKTAILS["nearest"]) != 1.0, torch.zeros(16, 16, dtype=torch.bool)), "all updates lost"
    assert stochastic < 0.4 * nearest


def test_the_seed_and_the_space_choose_the_noise():
    one, again = learned(STOCHASTIC), learned(STOCHASTIC)
    other = learned(ss.Precision(BF16, BF16, BF16, rounding="stochastic", seed=4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)

    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32, bias=False)) for _ in range(2)))
    for block in model:
        block[0].weight.data.fill_(1.0)
    optimizer = ss.optim.SGD(model.parameters(), lr=2.0**-10)
    ss.shard(model, optimizer, stage=0, precision=STOCHASTIC)
    sum(block[0].weight.float().sum() for block in model).backward()
    optimizer.step()
    moved = [block[0].weight != 1.0 for block in model]
    assert all(0.1 < one.float().mean() < 0.4 for one in moved), "1 - 2^-10 is a quarter of the way to the next"
    assert not torch.equal(*moved)


def combined_digest(stage: Any) -> str:
    """Muon's products at their owners, and LAMB's sums over tensors, without masters."""
    torch.manual_seed(1)
    model = Tied()
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and p.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is m for m in matrices)]
    optimizer = ss.optim.Combined(ss.optim.Muon(matrices, lr=0.02), ss.optim.LAMB(others, lr=1e-2))
    sharded = ss.shard(model, optimizer, stage=stage, precision=STOCHASTIC)
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=5):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if micro.step == 1:
                break
    return ss.digest(model, optimizer)


def test_rules_over_whole_tensors_round_alike_on_every_shard(ranks):
    alone = combined_digest(0)
    assert combined_digest(3) == alone
    for stage in (1, 3):
        assert ranks(2).run(combined_digest, stage) == [alone, alone]


def averaged(stage: int) -> list[list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40, bias=False))
    optimizer = ss.optim.SGD(model.parameters(), lr=0.1)
    ss.shard(model, optimizer, stage=stage, precision=STOCHASTIC)
    average = ss.Average(model, decay=0.9)
    for step in range(3):
        model(torch.full((1, 40), 1.0 + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    seen = []
    with ss.gathered(model):
        seen.append(model[0].weight.detach().float().flatten().tolist())
    with average.applied(), ss.gathered(model):
        seen.append(model[0].weight.detach().float().flatten().tolist())
    with ss.gathered(model):
        seen.append(model[0].weight.detach().float().flatten().tolist())
    averages = average.state_dict()["averages"]["0.weight"]
    assert averages.dtype == torch.float32
    return [*seen, averages.to(BF16).float().flatten().tolist()]


def test_averages_of_parameters_without_a_master(ranks):
    """They are kept in float32; the parameters have their own bits back after ``applied``."""
    before, inside, after, stored = averaged(0)
    assert before == after != inside == stored
    for stage in (1, 3):
        assert ranks(2).run(averaged, stage) == [[before, inside, after, stored]] * 2


def test_states_go_to_another_sharding_without_a_master():
    model, optimizer, _ = train(Tied, Tokens(), stage=3, precision=STOCHASTIC)
    states = optimizer.state_dict()
    assert {v.dtype for s in states["state"].values() for v in s.values()} == {torch.float32}
    other, again, _ = train(Tied, Tokens(), stage=0, steps=1, precision=STOCHASTIC)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(states)
    assert ss.digest(other, again) == ss.digest(model, optimizer)


# - exceptions by module

LOW = ss.Precision(BF16, BF16)
WIDE = ss.Precision(F32, F32)
NORMS_WIDE = {"blocks.*.norm": WIDE, "*": LOW}


def norms_wide(name: str, module: nn.Module) -> ss.Precision | None:
    return WIDE if isinstance(module, nn.LayerNorm) else None if name else LOW


def exceptional(stage: Any, precision: Any) -> tuple[str, dict[str, str]]:
    model, optimizer, _ = train(Tied, Tokens(), steps=2, stage=stage, precision=precision)
    dtypes = {name: str(parameter.dtype) for name, parameter in model.named_parameters()}
    return ss.digest(model, optimizer), dtypes


def exceptional_runs(runs: list[tuple[Any, Any]]) -> list[Any]:
    return [exceptional(*run) for run in runs]


def test_norms_in_float32_in_a_model_in_bfloat16(ranks):
    digest, dtypes = exceptional(0, NORMS_WIDE)
    assert {name for name, dtype in dtypes.items() if dtype == "torch.float32"} == {
        f"blocks.{i}.norm.{part}" for i in range(3) for part in ("weight", "bias")
    }
    assert exceptional(2, norms_wide) == (digest, dtypes)
    assert exceptional(0, LOW)[0] != digest
    for results in ranks(2).run(exceptional_runs, [(stage, NORMS_WIDE) for stage in (0, 3, MIXED)]):
        assert results == [(digest, dtypes)] * 3


class Watched(nn.Module):
    """Notes the dtypes that reach a module, in containers too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self.seen = [x.dtype, more["x"].dtype, more["index"].dtype, self.weight.dtype]
        return x * self.weight + more["x"], more["index"]


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(3, 3), nn.ModuleList([Watched()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y, index = self.inner[0](x, more={"x": x, "index": torch.arange(3)})
        self.seen = [x.dtype, y.dtype, index.dtype]
        return y


@pytest.mark.parametrize(
    "precision", [{"inner.0": WIDE, "*": LOW}, {"inner": WIDE, "*": LOW}, {"inner.*": WIDE, "first": LOW, "": LOW}]
)
def test_a_module_is_given_its_own_dtype_and_its_outputs_go_on_in_the_callers(precision):
    model = Around()
    ss.shard(model, ss.optim.SGD(model.parameters()), precision=precision)
    model(torch.ones(2, 3)).float().sum().backward()
    assert model.inner[0].seen == [F32, F32, torch.int64, F32]
    assert model.seen == [BF16, BF16, torch.int64]


def test_an_exception_alone_is_cast_back_to_what_it_was_given():
    model = Around()
    ss.shard(model, ss.optim.SGD(model.parameters()), precision={"inner.0": LOW})
    assert model(torch.ones(2, 3)).dtype == F32
    assert model.inner[0].seen == [BF16, BF16, torch.int64, BF16]


def test_buffers_keep_their_dtype():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = ss.optim.SGD(model.parameters(), lr=0.1)
    ss.shard(model, optimizer, precision={"1": WIDE, "*": LOW})
    model(torch.randn(8, 4)).float().sum().backward()
    optimizer.step()
    assert [buffer.dtype for buffer in model.buffers()] == [F32, F32, torch.int64]
    assert [p.dtype for p in model.parameters()] == [BF16, BF16, F32, F32, BF16, BF16]


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        (
            {"embed": LOW, "*": WIDE},
            "one precision for a parameter that two modules have, .* in 'embed' and .*'head'",
        ),
        ({"*": "bf16"}, r"name patterns with one each, .* got 'bf16' for module ''"),
        (lambda name, module: 16, "got 16 for module ''"),
        ({"blocks.*.nrom": WIDE, "*": LOW}, r"to match a module of Tied, but 'blocks.\*.nrom' matches none"),
    ],
)
def test_precisions_that_have_no_meaning(precision, text):
    model = Tied()
    with pytest.raises(ss.ConfigError, match=text):
        ss.shard(model, ss.optim.SGD(p for p in model.parameters() if p.requires_grad), precision=precision)


def test_the_formula_knows_spaces_of_several_dtypes(ranks):
    names = {"blocks.*.*_norm": WIDE, "*": LOW}
    runs = [(own, {"stage": stage, "precision": names}) for stage in (0, 1, 2, 3) for own in (1, 2)]
    for results in ranks(2).run(counted_runs, runs):
        for run, row in zip(runs, results, strict=True):
            assert (row.peak, row.sent) == (row.formula, row.sent_formula), run
