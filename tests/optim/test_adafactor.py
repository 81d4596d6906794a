"""Adafactor against torch's: numbers, state dicts in both directions, refusals; and the same bits on shards."""

import copy
import math

import pytest
import torch
from torch import nn

import shardstep as ss
from shardstep.optim import Adafactor
from tests.sharding.test_lines import Shapes, Tokens

SHAPES = [(), (1,), (7,), (30, 20), (1, 9), (9, 1), (4, 5, 6), (3, 2, 5, 4)]
OPTIONS = [
    {},
    {"lr": 0.1, "weight_decay": 0.1, "d": 2.0, "eps": (1e-6, 1e-2), "beta2_decay": -0.5},
    {"maximize": True, "lr": 1e-3},
]


def trained(kind, dtype, options, steps=20, start=None):
    """Parameters of all shapes after some steps; the last never has a gradient. ``start``: (params, state dict)."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in [*SHAPES, (3, 3)]]
    optimizer = kind([param.requires_grad_() for param in params], **options)
    if start is not None:
        for param, given in zip(params, start[0], strict=True):
            param.data.copy_(given)
        optimizer.load_state_dict(copy.deepcopy(start[1]))
    for _ in range(steps):
        for param in params[:-1]:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
    return params, optimizer


def assert_close(params, others, dtype):
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=["default", "all", "maximize"])
def test_numbers_and_states_are_torchs(options, dtype):
    params, mine = trained(Adafactor, dtype, options)
    others, theirs = trained(torch.optim.Adafactor, dtype, options)
    assert_close(params, others, dtype)
    assert params[-1] not in mine.state
    for param, other in zip(params[:-1], others[:-1], strict=True):
        assert mine.state[param].keys() == theirs.state[other].keys()
        for name, values in theirs.state[other].items():
            torch.testing.assert_close(mine.state[param][name], values, rtol=1e-5, atol=1e-6)


def several(dtype):
    """Tensors of a few shapes in turn, of very different magnitudes; one has an infinity."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(30, 20), (9,), (30, 20), (2, 5, 7), (9,), (30, 20), (2, 5, 7)]
    for number, shape in enumerate(shapes):
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
        param, *grads = ((10.0 ** (3 * number - 9) * one).to(dtype) for one in values)
        grads[2].view(-1)[3] = math.inf if number == 2 else 1.0
        yield nn.Parameter(param), grads


@pytest.mark.parametrize("kind", [Adafactor, ss.optim.keras.Adafactor, ss.optim.LAMB], ids=lambda kind: kind.__module__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensors_that_go_together_have_the_bits_of_each_alone(kind, dtype):
    together, apart = [param for param, _ in several(dtype)], [param for param, _ in several(dtype)]
    optimizers = [kind(together), *(kind([param]) for param in apart)]
    for step in range(4):
        for params in (together, apart):
            for number, (param, (_, grads)) in enumerate(zip(params, several(dtype), strict=True)):
                param.grad = None if (step + number) % 4 == 1 else grads[step]
        for optimizer in optimizers:
            optimizer.step()
    for param, other, optimizer in zip(together, apart, optimizers[1:], strict=True):
        mine, alone = ({"": p.detach(), **o.state[p]} for p, o in ((param, optimizers[0]), (other, optimizer)))
        assert mine.keys() == alone.keys()
        for name, values in mine.items():
            torch.testing.assert_close(values, alone[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    "kinds", [(Adafactor, torch.optim.Adafactor), (torch.optim.Adafactor, Adafactor)], ids=["to torch", "from torch"]
)
def test_a_run_continues_under_the_other_optimizer(kinds):
    source, _ = kinds
    params, optimizer = trained(source, torch.float32, OPTIONS[1], steps=4)
    start = [param.detach().clone() for param in params], optimizer.state_dict()
    ends = [trained(kind, torch.float32, {}, steps=4, start=start) for kind in kinds]
    assert_close(ends[0][0], ends[1][0], torch.float32)
    assert ends[1][1].param_groups[0]["lr"] == 0.1
    assert {int(state["step"]) for state in ends[1][1].state.values()} == {8}


WRONG = [
    {"lr": -1.0},
    {"lr": math.nan},
    {"beta2_decay": 0.5},
    {"eps": (-1.0, 1e-3)},
    {"eps": (None, -1.0)},
    {"eps": 1e-3},
    {"d": 0.5},
    {"weight_decay": -0.1},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ss.ConfigError, match=f"expected {next(iter(options))}.* in parameter group 0, got"):
        Adafactor([nn.Parameter(torch.ones(2, 2))], **options)


def test_a_low_param_is_floored_by_what_is_computed_in():
    """torch's floor is bfloat16's rounding unit, which is larger than most second moments."""
    low = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.ones(4, 4))
    for param in (low, wide):
        param.grad = torch.full_like(param, 1e-4)
        Adafactor([param]).step()
    assert torch.equal(low, wide.bfloat16())


def digest_of_run(stage: int) -> str:
    torch.manual_seed(2)
    model = Shapes()
    optimizer = Adafactor([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    sharded = ss.shard(model, optimizer, stage=stage, clip_norm=1.0)
    for micro in sharded.micro_batches(Tokens(), global_batch=8, micro_batch=2, seed=1):
        model(micro.batch).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
    assert sharded.bytes.peak.state == sharded.bytes.formula.state < 4 * sum(p.numel() for p in model.parameters())
    return ss.digest(model, optimizer)


def test_every_layout_gives_the_bits_of_one_rank(ranks):
    want = digest_of_run(0)
    for world_size in (1, 2, 4):
        for stage in (0, 1, 2, 3):
            assert set(ranks(world_size).run(digest_of_run, stage)) == {want}, (world_size, stage)
