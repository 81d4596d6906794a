"""Loss scaling: what a LossScaler does from step to step, and one decision of all ranks to leave a step out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardstep as ss
from shardstep.sharding.scaler import FLAGS, Scaling
from tests.sharding.models import Convolutions, Images, Tied, Tokens, two_groups
from tests.sharding.test_bytes import counted_runs

F16 = ss.Precision(params=torch.float16, reduce=torch.float16)
MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.*": 2, "": 0}
LEAVES = 4


# - the scaler alone, as in DeepSpeed's tests


def test_the_scale_doubles_after_each_window_of_good_steps():
    scaler = ss.LossScaler(initial_scale=2.0**8, window=2)
    scales = []
    for _ in range(6):
        scaler.update(overflowed=False)
        scales.append(scaler.scale)
    assert scales == [256, 512, 512, 1024, 1024, 2048]


def test_the_scale_halves_on_overflow_down_to_the_minimum():
    scaler = ss.LossScaler(initial_scale=2.0**3, hysteresis=1, minimum=2.0)
    scales = []
    for _ in range(4):
        scaler.update(overflowed=True)
        scales.append(scaler.scale)
    assert scales == [4, 2, 2, 2]


def test_an_overflow_begins_the_window_anew():
    scaler = ss.LossScaler(initial_scale=8.0, window=3, hysteresis=1)
    for overflowed in (False, False, True, False, False):
        scaler.update(overflowed)
    assert scaler.scale == 4
    scaler.update(overflowed=False)
    assert scaler.scale == 8


def test_patience_is_used_up_by_overflows_and_renewed_by_doubling():
    scaler = ss.LossScaler(initial_scale=8.0, window=2, hysteresis=3)
    scales = []
    for overflowed in (True, False, True, True, False, False, True, True, True):
        scaler.update(overflowed)
        scales.append(scaler.scale)
    assert scales == [8, 8, 8, 4, 4, 8, 8, 8, 4]


def test_a_static_scale_stays():
    scaler = ss.LossScaler.static(1024)
    for overflowed in (True, True, False, True):
        scaler.update(overflowed)
    assert scaler.scale == 1024


def test_a_loaded_scaler_goes_on_where_the_other_was():
    one = ss.LossScaler(initial_scale=2.0**10, window=3)
    for overflowed in (True, False, True, False, False):
        one.update(overflowed)
    other = ss.LossScaler(window=3)
    other.load_state_dict(one.state_dict())
    assert repr(other) == repr(one)
    for overflowed in (False, True, True):
        one.update(overflowed)
        other.update(overflowed)
    assert other.scale == one.scale == 512


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ss.LossScaler(1000.0), r"initial_scale to be a power of two, .* got 1000.0; give one such as 1024"),
        (lambda: ss.LossScaler(float("inf")), "initial_scale to be a power of two"),
        (lambda: ss.LossScaler(-2.0), "initial_scale to be a power of two"),
        (lambda: ss.LossScaler(True), "initial_scale to be a power of two"),
        (lambda: ss.LossScaler(minimum=3.0), "minimum to be a power of two"),
        (lambda: ss.LossScaler(2.0, minimum=4.0), "at least the minimum 4.0, got 2.0"),
        (lambda: ss.LossScaler(window=0), "window to be a positive integer, got 0"),
        (lambda: ss.LossScaler(hysteresis=1.5), "hysteresis to be a positive integer, got 1.5"),
        (lambda: ss.LossScaler.static("much"), "a static loss scale to be a power of two, .* got 'much'"),
        (lambda: ss.LossScaler().load_state_dict({"scale": 2.0}), r"LossScaler.state_dict\(\) gives, got \['scale'\]"),
        (lambda: sharded_run(loss_scale=3.0), "loss_scale to be a power of two"),
        (lambda: sharded_run(loss_scale="dynamic"), "LossScaler, a power of two or None, got 'dynamic'"),
    ],
)
def test_arguments_that_have_no_meaning(make, text):
    with pytest.raises(ss.ConfigError, match=text):
        make()


def test_ranks_with_other_scales_see_that_they_differ():
    told = [Scaling(ss.LossScaler.static(2.0**power)).told() for power in (-20, 0, 1, 16, 120)]
    assert {len(flags) for flags in told} == {FLAGS}
    for one in told:
        for other in told:
            either = [a or b for a, b in zip(one, other, strict=True)]
            assert Scaling.differs(either) == (one is not other)


# - training


def sharded_run(
    *,
    infinite: tuple[int, ...] = (),
    steps: int = 4,
    loss: Callable[[Tensor], Tensor] = lambda loss: loss,
    optimizer: Callable[[nn.Module], Any] = lambda model: ss.optim.AdamW(two_groups(model), lr=1e-2),
    **options: Any,
) -> tuple[str, list[float], int]:
    """Digest, the scale after each step, steps left out; micro-batch 1 of the steps ``infinite`` overflows."""
    torch.manual_seed(1)
    model = Tied()
    made = optimizer(model)
    if "scaler" in options:
        options["loss_scale"] = ss.LossScaler(**options.pop("scaler"))
    sharded = ss.shard(model, made, **options)
    scales = []
    for micro in sharded.micro_batches(Tokens(), global_batch=LEAVES * 2, micro_batch=2, seed=5):
        factor = float("inf") if micro.step in infinite and micro.index == 1 else 1.0
        (loss(model(micro.batch)) * factor).backward()
        if micro.last:
            made.step()
            made.zero_grad()
            scales.append(sharded.loss_scale)
            if micro.step == steps - 1:
                break
    return ss.digest(model, made), scales, sharded.skipped


def runs_of(all_options: list[dict[str, Any]]) -> list[Any]:
    return [sharded_run(**options) for options in all_options]


DYNAMIC = {"scaler": {"initial_scale": 2.0**8, "window": 2, "hysteresis": 1}}
LAYOUTS = [{"stage": stage} for stage in (0, 3, MIXED)] + [{"stage": 1, "schedule": "per step"}]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_overflow_of_one_micro_batch_leaves_the_step_out_on_all_ranks(ranks, world_size):
    """In float16, at every stage; the scale doubles and halves alike, and the bits are the one-rank run's."""
    clip = {"clip_norm": 0.05}
    kinds = [{}, {"infinite": (1,)}, {"infinite": (0, 1), **clip}]
    wanted = [sharded_run(stage=0, precision=F16, **DYNAMIC, **kind) for kind in kinds]
    assert [row[1:] for row in wanted] == [
        ([256, 512, 512, 1024], 0),
        ([256, 128, 128, 256], 1),
        ([128, 64, 64, 128], 2),
    ]
    runs = [{**layout, "precision": F16, **DYNAMIC, **kind} for layout in LAYOUTS for kind in kinds]
    for results in ranks(world_size).run(runs_of, runs):
        assert results == wanted * len(LAYOUTS)


def test_a_step_that_is_left_out_changes_nothing():
    options = {"stage": 2, "precision": F16, **DYNAMIC}
    digests = [sharded_run(steps=steps, infinite=(1,), **options)[0] for steps in (1, 2, 3)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_a_scale_changes_no_bit_of_a_run_in_float32(ranks, clip_norm):
    """Powers of two round nothing, in the norm neither; the same loss is scaled in the model and outside it."""
    wanted = sharded_run(stage=0, clip_norm=clip_norm)
    runs = [{"stage": stage, "clip_norm": clip_norm, "loss_scale": 1024.0} for stage in (0, 3)]
    for results in ranks(2).run(runs_of, runs):
        assert [digest for digest, *_ in results] == [wanted[0]] * 2


def test_small_gradients_underflow_in_float16_without_a_scale():
    def tiny(loss: Tensor) -> Tensor:
        return loss * 2.0**-22

    def sgd(model: nn.Module) -> ss.optim.SGD:
        return ss.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0**22)

    def drift(**options: Any) -> float:
        torch.manual_seed(1)
        model = Tied()
        made = sgd(model)
        ss.shard(model, made, stage=0, **options)
        before = model.blocks[0].up.weight.detach().float().clone()
        torch.manual_seed(2)
        tiny(model(torch.stack([Tokens()[0], Tokens()[1]]))).backward()
        made.step()
        return (model.blocks[0].up.weight.detach().float() - before).norm().item()

    exact = drift()
    assert drift(precision=F16, loss_scale=2.0**20) == pytest.approx(exact, rel=0.02)
    assert drift(precision=F16) < 0.9 * exact


# - what the model returns


@dataclass
class Answer:
    """As models of Hugging Face return it."""

    loss: Tensor
    logits: Tensor
    name: str = "answer"


class Pair(NamedTuple):
    loss: Tensor
    logits: Tensor


class Head(nn.Module):
    """Logits, and a loss of them, in a container of any kind."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(6, 5)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        logits = self.last(x)
        return self.wrap(F.cross_entropy(logits.float(), torch.arange(len(x)) % 5), logits)


WRAPS = {
    "tuple": lambda loss, logits: (loss, logits, None, 3),
    "nested": lambda loss, logits: {"loss": loss, "rest": [logits, "text"]},
    "dataclass": Answer,
    "named tuple": Pair,
}
PARTS = {
    "tuple": lambda out: out[:2],
    "nested": lambda out: (out["loss"], out["rest"][0]),
    "dataclass": lambda out: (out.loss, out.logits),
    "named tuple": lambda out: (out.loss, out.logits),
}


def head_grads(kind: str, wrap: str, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Parameters after one SGD step, which are their mean gradients, and what the model returned."""
    torch.manual_seed(1)
    model = Head(WRAPS[wrap])
    optimizer = ss.optim.SGD(model.parameters(), lr=1.0)
    ss.shard(model, optimizer, stage=3, **options)
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        output = model(inputs)
        loss, logits = PARTS[wrap](output)
        outside = F.cross_entropy(logits / 2, torch.arange(4))
        {"inside": loss, "outside": outside, "both": loss + outside}[kind].backward()
    optimizer.step()
    with ss.gathered(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, output


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", ["inside", "outside", "both"])
def test_losses_inside_and_outside_the_model_are_scaled_once(kind, wrap):
    plain, before = head_grads(kind, wrap)
    scaled, after = head_grads(kind, wrap, loss_scale=2.0**10)
    assert type(after) is type(before)
    for name, values in plain.items():
        assert torch.equal(scaled[name], values), name


def test_low_outputs_come_back_in_float32_with_the_same_values():
    _, plain = head_grads("inside", "dataclass", precision=F16)
    _, scaled = head_grads("inside", "dataclass", precision=F16, loss_scale=ss.LossScaler())
    assert (plain.logits.dtype, scaled.logits.dtype) == (torch.float16, torch.float32)
    assert torch.equal(scaled.logits, plain.logits.float())
    assert scaled.name == "answer"


def one_model(**options: Any) -> tuple[nn.Module, Any, ss.Sharded]:
    torch.manual_seed(1)
    model = Head(WRAPS["tuple"])
    optimizer = ss.optim.SGD(model.parameters(), lr=1.0)
    return model, optimizer, ss.shard(model, optimizer, stage=1, **options)


def test_an_output_that_is_changed_in_place_is_scaled_all_the_same():
    results = []
    for options in ({}, {"loss_scale": 2.0**10}):
        model, optimizer, _ = one_model(**options)
        output = model(torch.ones(4, 6))[1]
        output /= 2
        output.square().mean().backward()
        optimizer.step()
        results.append(model.last.weight.detach().clone())
    assert torch.equal(*results)


def test_gradients_leave_the_model_through_its_inputs_without_the_scale():
    grads = []
    for options in ({}, {"loss_scale": 2.0**10}, {"loss_scale": 2.0**10, "precision": F16}):
        model, _, _ = one_model(**options)
        inputs = torch.ones(4, 6, requires_grad=True)
        model(inputs)[0].backward()
        grads.append(inputs.grad)
    assert torch.equal(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0], rtol=0.02, atol=1e-4)


def test_one_scaled_model_after_another():
    """Each of two sharded models has a scale of its own, and both get the gradients that they have without."""
    results = []
    for scales in ((None, None), (2.0**4, 2.0**9)):
        torch.manual_seed(1)
        models = [nn.Linear(5, 5), nn.Linear(5, 2)]
        optimizers = [ss.optim.SGD(model.parameters(), lr=1.0) for model in models]
        for model, optimizer, scale in zip(models, optimizers, scales, strict=True):
            ss.shard(model, optimizer, stage=0, loss_scale=scale)
        models[1](models[0](torch.ones(3, 5)).tanh()).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        results.append([parameter.detach().clone() for model in models for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# - protocol


def test_gradients_that_do_not_come_through_outputs_are_refused():
    model, _, _ = one_model(loss_scale=2.0**4)
    with pytest.raises(ss.SequenceError, match=r"expected a loss made of what the model returns"):
        model.last.weight.square().sum().backward()


def test_a_loss_of_parameters_is_scaled_by_hand():
    results = []
    for options in ({}, {"loss_scale": 2.0**6}):
        model, optimizer, sharded = one_model(**options)
        penalty = model.last.weight.square().sum() * (sharded.loss_scale or 1.0)
        (model(torch.ones(4, 6))[0] + penalty).backward()
        optimizer.step()
        results.append(model.last.weight.detach().clone())
    assert torch.equal(*results)


def test_two_scalings_are_refused():
    model, optimizer, _ = one_model(loss_scale=2.0**4)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(4, 6))[0]).backward()
    with pytest.raises(ss.ConfigError, match="expected one scaling of the loss, got torch"):
        scaler.step(optimizer)


def test_without_a_scaler_nothing_is_left_out():
    model, optimizer, sharded = one_model(clip_norm=1.0)
    assert (sharded.loss_scale, sharded.skipped) == (None, 0)
    (model(torch.ones(4, 6))[0] * float("inf")).backward()
    with pytest.raises(ss.NonFiniteGradientError):
        optimizer.step()


def test_a_scaler_that_is_loaded_between_two_micro_batches_waits_for_the_next_step():
    scaler = ss.LossScaler(initial_scale=2.0**4)
    model, optimizer, sharded = one_model(loss_scale=scaler)
    model(torch.ones(4, 6))[0].backward()
    scaler.load_state_dict({"scale": 2.0**9, "good_steps": 3, "patience": 1})
    assert sharded.loss_scale == 2.0**4
    model(torch.ones(4, 6))[0].backward()
    plain, other, _ = one_model()
    for _ in range(2):
        plain(torch.ones(4, 6))[0].backward()
    optimizer.step()
    other.step()
    assert torch.equal(model.last.weight, plain.last.weight)
    assert sharded.loss_scale == 2.0**9
    assert scaler.state_dict()["good_steps"] == 4


def other_scale_on_one_rank() -> str:
    scaler = ss.LossScaler()
    model, optimizer, sharded = one_model(loss_scale=scaler)
    if sharded.rank == 1:
        scaler.load_state_dict({"scale": 4.0, "good_steps": 0, "patience": 1})
    model(torch.ones(4, 6))[0].backward()
    try:
        optimizer.step()
    except ss.RankMismatchError as error:
        return str(error)
    return ""


def test_ranks_that_load_other_scales_are_told(ranks):
    for text in ranks(2).run(other_scale_on_one_rank):
        assert "expected the same loss scale on all ranks" in text


KEPT_COUNTS = [
    lambda model: ss.optim.keras.Adam(list(model.parameters()), learning_rate=1e-2),
    lambda model: ss.optim.AdamWScheduleFree(model.parameters(), lr=1e-2),
]


@pytest.mark.parametrize("make", KEPT_COUNTS)
def test_counts_that_an_optimizer_keeps_itself_stay_too(make):
    torch.manual_seed(1)
    model = Head(WRAPS["tuple"])
    optimizer = make(model)
    ss.shard(model, optimizer, stage=2, loss_scale=ss.LossScaler())
    before = optimizer.state_dict()["param_groups"]
    kept = ("iterations", "k", "weight_sum", "lr_max")
    for factor in (float("inf"), 1.0):
        (model(torch.ones(4, 6))[0] * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        now = optimizer.state_dict()["param_groups"]
        same = all(group.get(name) == old.get(name) for group, old in zip(now, before, strict=True) for name in kept)
        assert same == (factor == float("inf"))


def skipping_statistics() -> list[float]:
    torch.manual_seed(1)
    model = Convolutions()
    optimizer = ss.optim.SGD(model.parameters(), lr=0.1)
    sharded = ss.shard(model, optimizer, stage=2, loss_scale=ss.LossScaler())
    images = torch.stack([Images()[i][0] for i in range(2)]) + sharded.rank
    (model((images, torch.tensor([0, 1]))) * float("inf")).backward()
    optimizer.step()
    return next(iter(model.buffers())).tolist()


def test_buffers_follow_rank_0_in_a_step_that_is_left_out(ranks):
    first, second = ranks(2).run(skipping_statistics)
    assert first == second


def test_the_formula_holds_with_a_scale(ranks):
    runs = [(1, {"stage": stage, "precision": F16, "loss_scale": 256.0}) for stage in (0, 1, 2, 3)]
    for results in ranks(2).run(counted_runs, runs):
        assert all(row.peak == row.formula and row.sent == row.sent_formula for row in results)
