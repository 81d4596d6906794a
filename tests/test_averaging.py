"""Averages of parameters: torch's numbers, the same bits on any shards, and a model that gets its own bits back."""

import io
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

import shardstep as ss
from shardstep.sharding.handle import ByteReport
from shardstep.sharding.whole import digest_of, whole_of
from tests.sharding.models import BF16, Convolutions, Images, Tied, Tokens, train, two_groups
from tests.sharding.test_joined_units import joining

MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}
STAGES = (0, 1, 2, 3, MIXED)
LEAVES = 4


def fresh(make: Callable[[], nn.Module], **options: Any) -> tuple[Any, ss.optim.AdamW, ss.Sharded]:
    torch.manual_seed(1)
    model = make()
    optimizer = ss.optim.AdamW(two_groups(model), lr=1e-2)
    return model, optimizer, ss.shard(model, optimizer, **options)


def steps_of(
    model: nn.Module, optimizer: ss.optim.AdamW, sharded: ss.Sharded, dataset: Any, steps: range
) -> Iterator[int]:
    """Train; comes back with -1 between every forward and its backward, and after every step with its number."""
    micro_batches = sharded.micro_batches(
        dataset, global_batch=2 * LEAVES, micro_batch=2, seed=5, start_step=steps.start
    )
    for micro in micro_batches:
        if micro.step not in steps:
            return
        loss = model(micro.batch)
        yield -1
        loss.backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            yield micro.step


def average_digest(average: ss.Average) -> str:
    return digest_of((name, "average", values) for name, values in average.state_dict()["averages"].items())


def packed(value: Any) -> bytes:
    """As bytes, because tensors travel between processes as handles."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=True)


# - torch's numbers


def torch_run(
    dtype: torch.dtype, decay: Any, averaged_by: Callable[..., Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    model = Tied().to(dtype)
    ours, theirs = ss.Average(model, decay=decay), AveragedModel(model, multi_avg_fn=averaged_by)
    for _ in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * parameter.requires_grad
        ours.update()
        theirs.update_parameters(model)
    return ours.state_dict()["averages"], dict(theirs.module.named_parameters())


@pytest.mark.parametrize("decay", [0.999, 0.4, "swa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.float64, 1e-7), (torch.bfloat16, 0.1)])
def test_the_numbers_are_those_of_torch(dtype, tolerance, decay):
    """In float32 its bits, except that with a decay below ½ it rounds the weight first. In float64 it rounds the weight
    of SWA to float32, and in bfloat16 every average.
    """
    averaged_by = get_swa_multi_avg_fn() if decay == "swa" else get_ema_multi_avg_fn(decay)
    ours, theirs = torch_run(dtype, decay, averaged_by)
    tolerance = max(tolerance, 1e-6 if decay == 0.4 else 0)
    assert ours.keys() == {name for name in theirs if not name.endswith("frozen")}
    for name, values in ours.items():
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(values, theirs[name].detach().to(values.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("every", "start", "taken"), [(1, 0, [1, 2, 3, 4, 5, 6]), (2, 0, [2, 4, 6]), (1, 5, [5, 6]), (3, 2, [2, 5])]
)
def test_which_steps_are_taken(every, start, taken):
    model = nn.Linear(1, 1, bias=False)
    average = ss.Average(model, decay="swa", every=every, start=start)
    seen = []
    for step in range(1, 7):
        with torch.no_grad():
            model.weight.fill_(step)
        before = average.n_averaged
        average.update()
        seen += [step] * (average.n_averaged - before)
    assert seen == taken
    assert average.steps == 6
    assert average.state_dict()["averages"]["weight"].item() == pytest.approx(sum(taken) / len(taken))


# - the same bits on any shards, and the model's own bits back


def averaged_run(precision: ss.Precision | None, stage: Any, swapping: bool) -> list[Any]:
    """Digests of an EMA, an SWA and the model; with ``swapping`` averages are applied all the time."""
    model, optimizer, sharded = fresh(Tied, stage=stage, precision=precision)
    ema, swa = ss.Average(model, decay=0.9), ss.Average(model, decay="swa", every=2, start=1)
    seen: list[Any] = []
    for step in steps_of(model, optimizer, sharded, Tokens(), range(4)):
        if step >= 0:
            traffic = (sharded.traffic.sent_bytes, sharded.traffic.calls)
            ema.update()
            swa.update()
            assert traffic == (sharded.traffic.sent_bytes, sharded.traffic.calls)
        if swapping and ema.n_averaged:
            evaluate(model, ema if step % 2 else swa)
    with ema.applied(model) as same, torch.no_grad():
        assert same is model
        seen += [ss.digest(model, optimizer), model.eval()(torch.arange(9).view(1, 9)).item(), average_digest(ema)]
    return [*seen, average_digest(ema), average_digest(swa), ss.digest(model, optimizer)]


def evaluate(model: nn.Module, average: ss.Average) -> None:
    with pytest.raises(ZeroDivisionError), average.applied(), torch.random.fork_rng():  # noqa: PT012
        model(torch.arange(9).view(1, 9))  # leaves units whole, for a backward that never comes
        raise ZeroDivisionError


def averaged_runs(runs: list[tuple[Any, ...]]) -> list[list[Any]]:
    return [averaged_run(*run) for run in runs]


@cache
def reference(bf16: bool) -> list[Any]:
    return averaged_run(BF16 if bf16 else None, 0, False)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_averages_have_the_same_bits_on_any_shards_and_leave_the_model_its_own(ranks, world_size, bf16):
    runs = [(BF16 if bf16 else None, stage, True) for stage in STAGES]
    for results in ranks(world_size).run(averaged_runs, runs):
        assert not [run for run, result in zip(runs, results, strict=True) if result != reference(bf16)]


def test_the_digests_see_what_should_differ():
    inside, _, within, ema, swa, outside = reference(False)
    assert within == ema
    assert len({inside, ema, swa, outside}) == 4
    assert not set(reference(True)) & set(reference(False))


def read_inside(stage: Any, precision: ss.Precision | None) -> tuple[bytes, bytes, bytes]:
    model, optimizer, sharded = fresh(Tied, stage=stage, precision=precision)
    average = ss.Average(model, decay=0.5)
    for _ in steps_of(model, optimizer, sharded, Tokens(), range(2)):
        average.update()
    with average.applied():
        before = ss.digest(model, optimizer)
        with ss.gathered(model):
            gathered = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        assert ss.digest(model, optimizer) == before
        loaded = packed(model.state_dict())
    return packed(average.state_dict()["averages"]), packed(gathered), loaded


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, MIXED])
def test_inside_everything_that_reads_the_model_reads_the_averages(ranks, stage, precision):
    for answer in ranks(2).run(read_inside, stage, precision):
        averages, gathered, loaded = map(unpacked, answer)
        for name, values in averages.items():
            assert torch.equal(gathered[name], values.to(gathered[name].dtype)), name
            assert torch.equal(loaded[name], gathered[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unsharded_model_gets_its_own_tensors_back(dtype):
    torch.manual_seed(1)
    model = Convolutions().to(dtype)
    average = ss.Average(model, decay=0.5)
    for _ in range(2):
        average.update()
        with torch.no_grad():
            model.head.weight += 1
    own = {name: (values, values.clone()) for name, values in model.state_dict(keep_vars=True).items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with average.applied():
        assert torch.equal(model.head.weight, average.state_dict()["averages"]["head.weight"].to(dtype))
        assert not torch.equal(model.head.weight, own["head.weight"][1])
        model((torch.randn(2, 3, 6, 6, dtype=dtype), torch.tensor([0, 1])))
        assert model.stem[1].num_batches_tracked == 1
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    for name, values in model.state_dict(keep_vars=True).items():
        assert values is own[name][0]
        assert torch.equal(values, own[name][1]), name


# - parameters that are trained from some step on


def averages_around_unfreezing(stage: Any, join: bool) -> tuple[list[list[str]], list[str], bool]:
    """Names and digests of an average made before one frozen parameter of three is trained, and of one made after,
    which is loaded into another model; whether the bytes are the formula's.
    """
    with joining(1 << 20 if join else 0):
        model, optimizer, sharded = fresh(Tied, stage=stage)
        averages = [ss.Average(model, decay=0.9)]
        for step in steps_of(model, optimizer, sharded, Tokens(), range(3)):
            if step == 0:
                optimizer.add_param_group({"params": [model.blocks[0].frozen.requires_grad_()]})
                averages.append(ss.Average(model, decay=0.9))
            for average in averages if step >= 0 else ():
                average.update()
        sharded.set_full_param("blocks.1.frozen", torch.full((7,), 2.5))
        with averages[1].applied():
            applied = ss.digest(model, optimizer)
            kept = sharded.full_param("blocks.1.frozen").tolist() == [2.5] * 7
        names = [sorted(average.state_dict()["averages"]) for average in averages]
        other = Tied()
        other.blocks[0].frozen.requires_grad_()
        loaded = ss.Average(other, decay=0.9)
        loaded.load_state_dict(averages[1].state_dict())
        digests = [*map(average_digest, (*averages, loaded)), applied]
        return names, digests, kept and sharded.bytes.peak.state == sharded.bytes.formula.state


def averages_around_unfreezings(runs: list[tuple[Any, bool]]) -> list[Any]:
    return [averages_around_unfreezing(*run) for run in runs]


def test_averages_made_before_and_after_frozen_parameters_are_trained(ranks):
    wanted = averages_around_unfreezing(0, False)
    (before, after), (_, second, loaded, _), right = wanted
    assert right
    assert loaded == second
    assert sorted({*after} - {*before}) == ["blocks.0.frozen"]
    for found in ranks(2).run(averages_around_unfreezings, [(stage, join) for stage in (1, 3) for join in (0, 1)]):
        assert found == [wanted] * 4


# - saved and loaded


def run_and_save(stage: Any, steps: int) -> bytes:
    model, optimizer, sharded = fresh(Tied, stage=stage)
    average = ss.Average(model, decay=0.9)
    for step in steps_of(model, optimizer, sharded, Tokens(), range(steps)):
        if step >= 0:
            average.update()
    return packed(average.state_dict())


def load_and_go_on(stage: Any, saved: bytes, steps: range) -> bytes:
    model, optimizer, sharded = fresh(Tied, stage=stage)
    for _ in steps_of(model, optimizer, sharded, Tokens(), range(steps.start)):
        pass
    average = ss.Average(model, decay=0.9)
    average.load_state_dict(unpacked(saved))
    for step in steps_of(model, optimizer, sharded, Tokens(), steps):
        if step >= 0:
            average.update()
    return packed(average.state_dict())


@pytest.mark.parametrize(("saver", "loader"), [((4, 3), (2, 1)), ((1, 0), (4, 2)), ((2, MIXED), (1, 3))])
def test_saved_on_some_ranks_and_loaded_on_others(ranks, saver, loader):
    first, *others = ranks(saver[0]).run(run_and_save, saver[1], 2)
    assert all(other == first for other in others)
    wanted = unpacked(run_and_save(0, 4))
    for answer in ranks(loader[0]).run(load_and_go_on, loader[1], first, range(2, 4)):
        got = unpacked(answer)
        assert {key: got[key] for key in ("steps", "n_averaged")} == {"steps": 4, "n_averaged": 4}
        assert got["averages"].keys() == wanted["averages"].keys()
        assert all(torch.equal(got["averages"][name], values) for name, values in wanted["averages"].items())


def test_an_unsharded_model_loads_what_a_sharded_one_saved():
    saved = unpacked(run_and_save(3, 2))
    average = ss.Average(Tied())
    average.load_state_dict(saved)
    saved["averages"]["embed.weight"].zero_()
    loaded = average.state_dict()
    assert loaded["averages"]["embed.weight"].any(), "what was loaded is a copy"
    loaded["averages"]["embed.weight"].zero_()
    assert average.state_dict()["averages"]["embed.weight"].any(), "and so is what is given out"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": -1}, "expected steps to be 0 or a positive integer"),
        ({"n_averaged": True}, "expected n_averaged to be 0 or a positive integer"),
        ({"averages": {}}, "expected an average of each of the 2 trained parameters, got 0: .*'bias', 'weight'"),
        ({"averages": {"weight": torch.ones(3), "bias": torch.ones(2)}}, r"'weight' to be a tensor of shape \(2, 3\)"),
        ({"statistics": {"norm.running_mean": torch.ones(1)}}, "'norm.running_mean' to be a tensor of shape None"),
        ({"more": 1}, r"expected what Average.state_dict\(\) gives, got \['averages', 'more'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(change, says):
    average = ss.Average(nn.Linear(3, 2))
    average.update()
    before = packed(average.state_dict())
    with pytest.raises(ss.ConfigError, match=says):
        average.load_state_dict({**average.state_dict(), **change})
    assert packed(average.state_dict()) == before


# - BatchNorm


def statistics_run(stage: Any, micro_batches: int = 8) -> dict[str, bytes]:
    model, optimizer, sharded = fresh(Convolutions, stage=stage)
    average = ss.Average(model, decay="swa")
    for step in steps_of(model, optimizer, sharded, Images(), range(2)):
        if step >= 0:
            average.update()
    model.stem[1].eval()
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    data = sharded.micro_batches(Images(), global_batch=2 * LEAVES, micro_batch=2, seed=7)
    average.update_bn(islice(data, micro_batches // sharded.world_size))
    assert [module.training for module in model.stem] == [True, False]
    assert {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}
    assert all(torch.equal(buffer, own[name]) for name, buffer in model.named_buffers())
    with average.applied():
        applied = {name: buffer.clone() for name, buffer in model.named_buffers()}
        weights = model.state_dict()
    saved = average.state_dict()
    assert all(torch.equal(values, applied[name]) for name, values in saved["statistics"].items())
    loaded = ss.Average(model, decay="swa")
    loaded.load_state_dict(saved)
    assert packed(loaded.state_dict()) == packed(saved)
    average.update()
    assert not average.state_dict()["statistics"], "the statistics of what was averaged before"
    return {"statistics": packed(applied), "weights": packed(weights)}


def statistics_runs(stages: list[Any]) -> list[bytes]:
    return [statistics_run(stage)["statistics"] for stage in stages]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batch_statistics_have_the_same_bits_on_any_ranks(ranks, world_size):
    wanted = statistics_run(0)["statistics"]
    stages = [0, 2, 3, {"stages.*.0": 3, "": 2, "*": 1}]
    for results in ranks(world_size).run(statistics_runs, stages):
        assert [stage for stage, result in zip(stages, results, strict=True) if result != wanted] == []


def test_batch_statistics_are_those_of_torch():
    ours = statistics_run(3)
    _, _, sharded = fresh(Convolutions, stage=0)
    batches = islice(sharded.micro_batches(Images(), global_batch=2 * LEAVES, micro_batch=2, seed=7), 8)
    plain = Convolutions()
    plain.load_state_dict(unpacked(ours["weights"]))
    update_bn(([micro.batch] for micro in batches), plain)
    statistics = unpacked(ours["statistics"])
    assert statistics["stem.1.num_batches_tracked"] == 8
    torch.testing.assert_close(statistics, dict(plain.named_buffers()), rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """A BatchNorm that runs twice, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.idle = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x) + x)


def test_batch_statistics_of_an_unsharded_model_that_runs_a_norm_twice():
    model = Twice()
    average = ss.Average(model)
    average.update()
    loader = [(torch.randn(4, 3) * size, "label") for size in (1.0, 2.0, 3.0)]
    average.update_bn(loader)
    plain = deepcopy(model)
    update_bn(loader, plain)
    torch.testing.assert_close(average.state_dict()["statistics"], dict(plain.named_buffers()))
    with pytest.raises(ss.ConfigError, match="expected at least one micro-batch"):
        average.update_bn([])
    plain = ss.Average(nn.Linear(1, 1))
    plain.update_bn(iter(lambda: pytest.fail("a model without BatchNorm reads no data"), None))


def unequal_shares() -> str:
    model, optimizer, sharded = fresh(Convolutions, stage=1)
    average = ss.Average(model)
    for _ in steps_of(model, optimizer, sharded, Images(), range(1)):
        average.update()
    micro_batches = sharded.micro_batches(Images(), global_batch=2 * LEAVES, micro_batch=2, seed=7)
    with pytest.raises(ss.RankMismatchError) as caught:
        average.update_bn(islice(micro_batches, 2 + sharded.rank))
    return str(caught.value)


def test_unequal_shares_of_the_micro_batches_are_named_on_every_rank(ranks):
    for text in ranks(2).run(unequal_shares):
        assert "rank 0 enters or leaves 'with average.applied():'" in text
        assert "rank 1 runs another micro-batch of average.update_bn()" in text


# - bytes


def bytes_run(stage: Any, precision: ss.Precision | None) -> tuple[ByteReport, int, int]:
    """The report, the bytes of the averages' buffers, and how much they added to the state."""
    model, optimizer, sharded = fresh(Tied, stage=stage, precision=precision)
    before = sharded.bytes.peak.state
    averages = [ss.Average(model, decay=decay) for decay in (0.9, "swa")]
    for step in steps_of(model, optimizer, sharded, Tokens(), range(2)):
        if step >= 0:
            for average in averages:
                average.update()
                with average.applied():
                    pass
    spaces = [space for unit in whole_of(model).units for space in unit.spaces]
    buffers = sum(average.nbytes for space in spaces for average in space.averages)
    return sharded.bytes, buffers, sharded.bytes.peak.state - before


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_averages_are_in_the_formula_and_are_the_real_buffers(ranks, world_size, precision):
    alone = bytes_run(0, precision)[0]
    for stage in (0, 3, MIXED):
        for report, buffers, added in ranks(world_size).run(bytes_run, stage, precision):
            assert report.peak.state == report.formula.state
            assert report.unsharded.state == alone.peak.state
            assert added == buffers > 0


def test_an_average_that_is_made_after_a_group_has_joined_has_its_parameters():
    torch.manual_seed(1)
    model = Tied()
    joining = [model.embed.weight]
    for parameter in joining:
        parameter.requires_grad_(False)
    optimizer = ss.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    sharded = ss.shard(model, optimizer)
    before = ss.Average(model)
    for parameter in joining:
        parameter.requires_grad_()
    optimizer.add_param_group({"params": joining})
    after = ss.Average(model, decay="swa")
    for _ in steps_of(model, optimizer, sharded, Tokens(), range(1)):
        pass
    for average in (before, after):
        average.update()
    own, later = before.state_dict()["averages"], after.state_dict()["averages"]
    assert later.keys() - own.keys() == {"embed.weight"}
    assert all(torch.equal(values, sharded.full_param(name)) for name, values in later.items())
    assert sharded.bytes.peak.state == sharded.bytes.formula.state


# - schedules


def swa_rates(stage: Any) -> tuple[list[float], str]:
    model, optimizer, sharded = fresh(Tied, stage=stage)
    schedule, average, rates = SWALR(optimizer, swa_lr=0.05, anneal_epochs=3), ss.Average(model, decay="swa"), []
    for step in steps_of(model, optimizer, sharded, Tokens(), range(4)):
        if step >= 0:
            average.update()
            schedule.step()
            rates += schedule.get_last_lr()
    return rates, average_digest(average)


def test_swalr_drives_a_sharded_optimizer(ranks):
    plain = torch.optim.AdamW(two_groups(Tied()), lr=1e-2)
    schedule, rates = SWALR(plain, swa_lr=0.05, anneal_epochs=3), []
    for _ in range(4):
        plain.step()
        schedule.step()
        rates += schedule.get_last_lr()
    wanted = swa_rates(0)
    assert wanted[0] == rates
    assert ranks(2).run(swa_rates, 3) == [wanted] * 2


# - misuse


def averaged_linear() -> tuple[nn.Module, ss.Average]:
    model = nn.Linear(3, 2)
    average = ss.Average(model)
    average.update()
    return model, average


@pytest.mark.parametrize("sharded", [False, True])
def test_what_has_no_meaning_inside_is_refused_and_the_model_gets_its_bits_back(sharded):
    model = nn.Linear(3, 2)
    optimizer = ss.optim.AdamW(model.parameters())
    if sharded:
        ss.shard(model, optimizer, stage=3)
    average, other = ss.Average(model), ss.Average(model, decay="swa")
    with pytest.raises(ss.SequenceError, match="after the first average, got it after 0 calls"), average.applied():
        pass
    for one in (average, other):
        one.update()
    before = ss.digest(model, optimizer)
    saved = average.state_dict()
    for misuse, call in [
        (optimizer.step, "optimizer.step()"),
        (other.update, "average.update()"),
        (lambda: other.applied().__enter__(), "average.applied()"),
        (lambda: average.load_state_dict(saved), "average.load_state_dict()"),
        (lambda: average.update_bn([]), None),
    ]:
        with average.applied():
            if call is None:
                misuse()  # nothing to do without BatchNorm
                continue
            with pytest.raises(ss.SequenceError) as caught:
                misuse()
            assert f"expected {call} " in str(caught.value)
    assert ss.digest(model, optimizer) == before
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert ss.digest(model, optimizer) != before


def test_other_optimizers_step_inside():
    model, average = averaged_linear()
    other = nn.Linear(1, 1)
    with average.applied():
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        with pytest.raises(ss.SequenceError, match=r"expected optimizer.step\(\) outside"):
            torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_inside_gathered_it_is_refused():
    model, _, _ = fresh(Tied, stage=3)
    average = ss.Average(model)
    average.update()
    expected = r"expected average.applied\(\) outside 'with shardstep.gathered"
    with ss.gathered(model), pytest.raises(ss.SequenceError, match=expected):
        average.applied().__enter__()
    with average.applied():
        pass


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"decay": 1.5}, "expected decay to be a number from 0 to 1 or 'swa', got 1.5"),
        ({"decay": "ema"}, "got 'ema'"),
        ({"decay": float("nan")}, "got nan"),
        ({"every": 0}, "expected every to be an integer of at least 1, got 0"),
        ({"start": -1}, "expected start to be an integer of at least 0, got -1"),
    ],
)
def test_arguments_out_of_range(arguments, says):
    with pytest.raises(ss.ConfigError, match=says):
        ss.Average(nn.Linear(1, 1), **arguments)


def test_models_that_cannot_be_averaged():
    with pytest.raises(ss.ConfigError, match="parameters that are trained, but Flatten has none"):
        ss.Average(nn.Flatten())
    with pytest.raises(ss.ConfigError, match=r"'weight' of torch\.complex64"):
        ss.Average(nn.Linear(1, 1, dtype=torch.complex64))
    model, optimizer = nn.Linear(1, 1), None
    average = ss.Average(model)
    optimizer = ss.optim.AdamW(model.parameters())
    ss.shard(model, optimizer)
    with pytest.raises(ss.SequenceError, match=r"shard\(\) has been called since"):
        average.update()
    model, _, _ = train(Tied, Tokens(), steps=1)
    with pytest.raises(ss.ConfigError, match=r"expected the model that shard\(\) was called on, got a part"):
        ss.Average(model.blocks[0])
    average = ss.Average(model)
    average.update()
    with pytest.raises(ss.ConfigError, match="got another one"):
        average.applied(nn.Linear(1, 1)).__enter__()


def differing_options() -> str:
    model, _, sharded = fresh(Tied, stage=2)
    with pytest.raises(ss.RankMismatchError) as caught:
        ss.Average(model, every=1 + sharded.rank)
    return str(caught.value)


def test_ranks_that_differ_in_their_options(ranks):
    assert all("the options of rank 1 ({'decay': 0.999, 'every': 2" in text for text in ranks(2).run(differing_options))
