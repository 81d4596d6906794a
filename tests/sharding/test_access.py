"""Full parameters, gradients and states by name: what is read, what writing does, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from tests.conftest import RankFailed
from tests.sharding.models import BF16, Tied, Tokens, two_groups

NAME = "blocks.1.up.weight"
STAGES = [0, 1, 2, 3]
F16 = ss.Precision(torch.float16, torch.float16)


def tied_and_sharded(**options: Any) -> tuple[Tied, ss.optim.AdamW, ss.Sharded]:
    torch.manual_seed(1)
    model = Tied().eval()
    optimizer = ss.optim.AdamW(two_groups(model), lr=1e-2)
    return model, optimizer, ss.shard(model, optimizer, **options)


def backwards(model: nn.Module, sharded: ss.Sharded | None, step: int = 0, leaves: int = 4) -> None:
    """This rank's micro-batches of a step, of all where it is not sharded; every parameter is used."""
    rank, size = (sharded.rank, sharded.world_size) if sharded else (0, 1)
    for leaf in range(rank, leaves, size):
        tokens = torch.stack([Tokens()[step * leaves + leaf + i] for i in range(2)])
        model(tokens).backward()


def one_step(model: nn.Module, optimizer: Any, sharded: ss.Sharded, step: int = 0) -> None:
    backwards(model, sharded, step)
    optimizer.step()
    optimizer.zero_grad()


def readings(options: dict[str, Any]) -> dict[str, Tensor | None]:
    model, optimizer, sharded = tied_and_sharded(**options)
    one_step(model, optimizer, sharded)
    backwards(model, sharded, step=1)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    read: dict[str, Tensor | None] = {f"grad {name}": sharded.full_grad(name) for name in names}
    optimizer.step()
    read |= {f"param {name}": sharded.full_param(name) for name, _ in model.named_parameters()}
    read |= {f"{s} {name}": sharded.full_state(name, s) for name in names for s in ("exp_avg", "exp_avg_sq", "step")}
    return {what: None if values is None else values.clone() for what, values in read.items()}


def readings_of(runs: list[dict[str, Any]]) -> list[dict[str, Tensor | None]]:
    return [readings(options) for options in runs]


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
def test_every_rank_reads_the_same_full_tensors_at_every_stage(ranks, precision):
    wanted = readings({"stage": 0, "precision": precision})
    for read in ranks(2).run(readings_of, [{"stage": stage, "precision": precision} for stage in STAGES]):
        for stage, found in zip(STAGES, read, strict=True):
            assert found.keys() == wanted.keys()
            for what, values in wanted.items():
                assert (values is None) == (found[what] is None), (stage, what)
                assert values is None or torch.equal(found[what], values), (stage, what)


def test_what_is_read_is_what_torch_has():
    read = readings({"stage": 3})
    torch.manual_seed(1)
    model = Tied().eval()
    optimizer = torch.optim.AdamW(two_groups(model), lr=1e-2)
    backwards_scaled(model)
    optimizer.step()
    optimizer.zero_grad()
    backwards_scaled(model, step=1)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(read[f"grad {name}"], parameter.grad, rtol=1e-4, atol=1e-6)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(read[f"param {name}"], parameter.detach(), rtol=1e-4, atol=1e-5)
        for state, values in optimizer.state.get(parameter, {}).items():
            torch.testing.assert_close(read[f"{state} {name}"], values, rtol=1e-4, atol=1e-6)


def backwards_scaled(model: nn.Module, step: int = 0) -> None:
    """The mean over the micro-batches, as torch has it after dividing."""
    backwards(model, None, step)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= 4


def test_a_gradient_is_read_without_the_scale_of_the_loss():
    grads = []
    for options in ({}, {"loss_scale": 2.0**9}, {"loss_scale": 2.0**9, "clip_norm": 1e-3}):
        model, _, sharded = tied_and_sharded(stage=2, **options)
        backwards(model, sharded)
        grads.append(sharded.full_grad(NAME))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_reading_changes_nothing():
    digests = []
    for reads in (False, True):
        model, optimizer, sharded = tied_and_sharded(stage=3, clip_norm=0.1)
        for step in range(2):
            backwards(model, sharded, step, leaves=3)
            if reads:
                sharded.full_grad(NAME)
                sharded.full_param(NAME)
                sharded.full_state(NAME, "exp_avg")
            optimizer.step()
            optimizer.zero_grad()
        digests.append(ss.digest(model, optimizer))
    assert digests[0] == digests[1]


def written(options: dict[str, Any], what: str) -> tuple[str, list[float], float]:
    """Digest after a write and two more steps, the written values as they are read again, and the norm."""
    model, optimizer, sharded = tied_and_sharded(clip_norm=0.1, **options)
    one_step(model, optimizer, sharded)
    values = torch.linspace(-1, 1, 15 * 7).view(15, 7) + sharded.rank  # rank 0's count
    if what == "grad":
        backwards(model, sharded, step=1)
        sharded.set_full_grad(NAME, values)
        read = sharded.full_grad(NAME)
        optimizer.step()
        optimizer.zero_grad()
    elif what == "param":
        sharded.set_full_param(NAME, values)
        read = sharded.full_param(NAME)
        with ss.gathered(model):
            computed = model.blocks[1].up.weight.detach().clone()
            assert torch.equal(computed, read.to(computed.dtype))
    else:
        sharded.set_full_state(NAME, what, torch.tensor(7.0) if what == "step" else values.abs())
        read = sharded.full_state(NAME, what)
    one_step(model, optimizer, sharded, step=2)
    return ss.digest(model, optimizer), read.flatten().tolist(), sharded.grad_norm


def written_all(runs: list[tuple[dict[str, Any], str]]) -> list[Any]:
    return [written(*run) for run in runs]


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
def test_what_is_written_is_read_again_and_trained_on_alike(ranks, precision):
    kinds = ("param", "grad", "exp_avg", "step")
    wanted = {what: written({"stage": 0, "precision": precision}, what) for what in kinds}
    assert len({digest for digest, *_ in wanted.values()}) == len(kinds)
    assert wanted["param"][1] == torch.linspace(-1, 1, 105).tolist()
    assert wanted["step"][1] == [7.0]
    runs = [({"stage": stage, "precision": precision}, what) for stage in STAGES for what in kinds]
    for results in ranks(2).run(written_all, runs):
        assert results == [wanted[what] for _ in STAGES for what in kinds]


def test_the_norm_is_of_the_gradient_that_was_set():
    model, optimizer, sharded = tied_and_sharded(stage=3, clip_norm=1.0)
    backwards(model, sharded)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sharded.set_full_grad(name, torch.zeros(parameter.shape))
    sharded.set_full_grad(NAME, torch.full((15, 7), 2.0))
    optimizer.step()
    assert sharded.grad_norm == pytest.approx(2.0 * (15 * 7) ** 0.5)


def test_a_gradient_that_is_set_where_there_was_none_is_used():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model.forward = lambda x: model[0](x).sum()
    optimizer = ss.optim.SGD(model.parameters(), lr=1.0)
    sharded = ss.shard(model, optimizer, stage=0)
    before = sharded.full_param("1.weight")
    model(torch.ones(1, 3)).backward()
    assert sharded.full_grad("1.weight") is None
    sharded.set_full_grad("1.weight", torch.ones(3, 3))
    optimizer.step()
    assert torch.equal(sharded.full_param("1.weight"), before - 1)


def test_tied_parameters_answer_to_every_name_and_frozen_ones_have_values():
    _, _, sharded = tied_and_sharded(stage=3)
    sharded.set_full_param("head.weight", torch.ones(50, 7))
    assert torch.equal(sharded.full_param("embed.weight"), torch.ones(50, 7))
    frozen = sharded.full_param("blocks.0.frozen")
    assert torch.equal(frozen, torch.linspace(0.5, 1.5, 7))
    sharded.set_full_param("blocks.0.frozen", frozen + 1)
    assert torch.equal(sharded.full_param("blocks.0.frozen"), frozen + 1)
    with pytest.raises(ss.ConfigError, match=r"a parameter that is trained, got 'blocks.0.frozen', which is frozen"):
        sharded.full_state("blocks.0.frozen", "exp_avg")


@pytest.mark.parametrize("make", [ss.optim.AdamW8bit, ss.optim.Adafactor, ss.optim.Muon])
def test_states_of_other_kinds(ranks, make):
    wanted = other_states(0, make)
    assert other_states(3, make) == wanted
    for stage in (1, 3):
        assert ranks(2).run(other_states, stage, make) == [wanted] * 2


def other_states(stage: int, make: Any) -> list[Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(70, 40, bias=False), nn.Linear(40, 30, bias=False))
    optimizer = make(model.parameters(), lr=1e-2)
    sharded = ss.shard(model, optimizer, stage=stage)
    for leaf in range(sharded.rank, 2, sharded.world_size):
        model(torch.full((1, 70), 1.0 + leaf)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    found: list[Any] = []
    for declared in optimizer.states:
        values = sharded.full_state("1.weight", declared.name)
        found.append((declared.name, tuple(values.shape), values.flatten().tolist()))
        sharded.set_full_state("1.weight", declared.name, values * 0.5 + sharded.rank)
        again = sharded.full_state("1.weight", declared.name)
        torch.testing.assert_close(again, values * 0.5, rtol=0.1, atol=values.abs().max().item() / 100)
        found.append(again.flatten().tolist())
    found.append(ss.digest(model, optimizer))
    return found


# - what is refused


FOLLOWING = {
    "schedule-free": lambda model: ss.optim.AdamWScheduleFree(two_groups(model), lr=0.1),
    "Keras": lambda model: ss.optim.keras.Adam(two_groups(model), use_ema=True, ema_overwrite_frequency=2),
}


def loaded_before_the_first_step(kind: str, stage: int | None, leaves: int) -> str:
    torch.manual_seed(1)
    model = Tied().double().eval()
    optimizer = FOLLOWING[kind](model)
    sharded = None if stage is None else ss.shard(model, optimizer, stage=stage, units="blocks.*")
    model.load_state_dict({name: values * 0.5 for name, values in model.state_dict().items()})
    for step in range(2):
        backwards(model, sharded, step, leaves)
        optimizer.step()
        optimizer.zero_grad()
    return ss.digest(model, optimizer)


@pytest.mark.parametrize("kind", FOLLOWING)
def test_states_that_begin_as_the_parameter_follow_it_to_its_first_update(ranks, kind):
    alone = loaded_before_the_first_step(kind, None, 1)
    assert [loaded_before_the_first_step(kind, stage, 1) for stage in (0, 3)] == [alone] * 2
    wanted = loaded_before_the_first_step(kind, 0, 2)
    assert ranks(2).run(loaded_before_the_first_step, kind, 3, 2) == [wanted] * 2


def test_but_not_where_the_state_was_set():
    torch.manual_seed(1)
    model = Tied().eval()
    optimizer = FOLLOWING["schedule-free"](model)
    sharded = ss.shard(model, optimizer)
    z = torch.full((15, 7), 3.0)
    sharded.set_full_param(NAME, z * 2)
    assert torch.equal(sharded.full_state(NAME, "z"), z * 2)
    sharded.set_full_state(NAME, "z", z)
    sharded.set_full_param(NAME, z * 4)
    assert torch.equal(sharded.full_state(NAME, "z"), z)
    one_step(model, optimizer, sharded)
    assert (sharded.full_state(NAME, "z") - z).abs().max() < 1


def test_names_shapes_and_moments():
    model, optimizer, sharded = tied_and_sharded(stage=3)
    with pytest.raises(ss.ConfigError, match=r"got 'blocks.1.up.wight'; did you mean 'blocks.1.up.weight'\?"):
        sharded.full_param("blocks.1.up.wight")
    with pytest.raises(ss.ConfigError, match=r"one of \d+ such as 'embed.weight'"):
        sharded.full_param("?")
    with pytest.raises(ss.ConfigError, match=r"one of \['exp_avg', 'exp_avg_sq', 'step'\], got 'momentum'"):
        sharded.full_state(NAME, "momentum")
    with pytest.raises(ss.ConfigError, match=r"a tensor of shape \(15, 7\) for .*, got \(7, 15\)"):
        sharded.set_full_param(NAME, torch.zeros(7, 15))
    with pytest.raises(ss.ConfigError, match=r"a tensor of shape \(15, 7\) for .*, got float"):
        sharded.set_full_state(NAME, "exp_avg", 0.0)
    for call in (lambda: sharded.full_grad(NAME), lambda: sharded.set_full_grad(NAME, torch.zeros(15, 7))):
        with pytest.raises(ss.SequenceError, match=r"between the last backward\(\) and optimizer.step\(\)"):
            call()
    with ss.gathered(model), pytest.raises(ss.SequenceError, match=r"set_full_param\(.*outside 'with shardstep.gath"):
        sharded.set_full_param(NAME, torch.zeros(15, 7))
    backwards(model, sharded)
    sharded.full_grad(NAME)
    with pytest.raises(ss.SequenceError, match=r"unscaled, read or set, got another backward\(\)"):
        backwards(model, sharded)
    optimizer.zero_grad()
    with pytest.raises(ss.SequenceError, match="without a gradient of this step"):
        sharded.full_grad(NAME)
    one_step(model, optimizer, sharded)


def test_nothing_is_read_inside_backward():
    model, _, sharded = tied_and_sharded(stage=0)
    seen = []

    def look(_: Tensor) -> None:
        with pytest.raises(ss.SequenceError, match=r"outside backward\(\)"):
            sharded.full_param(NAME)
        seen.append(True)

    model.blocks[0].up.weight.register_post_accumulate_grad_hook(look)
    backwards(model, sharded, leaves=1)
    assert seen == [True]


def ask_for_different_names(what: str) -> None:
    _, _, sharded = tied_and_sharded(stage=3)
    if what == "names":
        sharded.full_param(f"blocks.{sharded.rank}.up.weight")
    elif sharded.rank:
        sharded.full_param(NAME)
    else:
        sharded.set_full_param(NAME, torch.zeros(15, 7))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("names", r"to ask for the same tensor, but rank \d asks for 'param blocks.\d.up.weight'"),
        ("acts", r"rank 0 writes a full tensor by name .* but rank 1 reads a full tensor by name"),
    ],
)
def test_ranks_that_ask_for_other_things_are_told(ranks, what, text):
    with pytest.raises(RankFailed) as caught:
        ranks(2).run(ask_for_different_names, what)
    assert [name for name, _ in caught.value.failures] == ["RankMismatchError"] * 2
    assert caught.match(text)
