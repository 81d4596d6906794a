"""Updates in the backward pass: the bits of step(), the bytes of the formula, what may not follow, what is refused."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from shardstep.sharding.space import Space
from shardstep.sharding.step import Step
from tests.sharding.models import BF16, two_groups
from tests.sharding.test_bytes import FLOOR, FLOOR_SHARD, PADDED_ROOT, Tower, counted_runs
from tests.sharding.test_bytes import MIXED as MIXED_GPT
from tests.sharding.test_skipping import LEAVES as PATH_LEAVES
from tests.sharding.test_skipping import PATHS, Paths, batch
from tests.sharding.test_zoo import LEAVES, STEPS, digest_of_one_rank, made, trained
from tests.sharding.zoo import ZOO, External

ON = {"update_in_backward": True}
MIXED = {"blocks.0": 3, "blocks.1": 1, "blocks.2": 2, "blocks.3": 0, "*": 3}
STOCHASTIC = ss.Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, rounding="stochastic", seed=3)
WIDE_SUMS = ss.Precision(torch.float32, torch.float32, accumulate=torch.float64)


@contextmanager
def counting() -> Iterator[list[str]]:
    """The units that are updated in backward on this rank, in order."""
    early: list[str] = []
    update = Step.update

    def counted(self: Step, space: Space) -> None:
        early.append(space.unit_name)
        update(self, space)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "update", counted)
        yield early


class Stack(nn.Module):
    """Blocks that use all of their parameters in every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 6)) for _ in range(4)
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).square().mean()


class Vectors:
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(index))


def inputs(number: int = 0) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(number))


# - the same bits


def adamw(model: nn.Module) -> ss.optim.AdamW:
    return ss.optim.AdamW(two_groups(model), lr=1e-2)


def adamw_8bit(model: nn.Module) -> ss.optim.AdamW8bit:
    return ss.optim.AdamW8bit(two_groups(model), lr=1e-2)


def ascending(model: nn.Module) -> ss.optim.SGD:
    return ss.optim.SGD(two_groups(model), lr=1e-2, momentum=0.9, maximize=True)


def with_muon(model: nn.Module) -> ss.optim.Combined:
    return ss.optim.Combined(
        ss.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2),
        ss.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-2),
    )


def with_lamb(model: nn.Module) -> ss.optim.Combined:
    return ss.optim.Combined(
        ss.optim.LAMB([p for p in model.parameters() if p.ndim == 2], lr=1e-2),
        ss.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-2),
    )


def every_run() -> list[tuple[Any, dict[str, Any], int, int]]:
    """(optimizer, options, leaves, spaces that are updated in backward in a step on several ranks)."""
    runs: list[tuple[Any, dict[str, Any], int, int]] = [(adamw, {"stage": stage}, 4, 3) for stage in (1, 2, 3)]
    runs += [(adamw, {"stage": 0}, 4, 0), (adamw, {"stage": MIXED}, 12, 2)]
    runs += [(adamw, {"stage": 3, "prefetch": prefetch, "clip_value": 1e-4}, 4, 3) for prefetch in (0, 2)]
    runs += [(adamw, {"stage": stage, "precision": BF16}, 12, 3) for stage in (1, 2, 3)]
    runs += [(adamw, {"stage": 1, "schedule": "per step", "precision": BF16}, 8, 3)]
    runs += [(adamw, {"stage": {"blocks.1": 0, "*": 1}, "schedule": "per step"}, 8, 2)]
    runs += [(adamw, {"stage": 3, "precision": precision}, 4, 3) for precision in (STOCHASTIC, WIDE_SUMS)]
    runs += [(adamw, {"stage": 2, "trace_nonfinite": True}, 4, 3)]
    return runs + [
        (kind, {"stage": stage}, 4, 3) for kind in (adamw_8bit, ascending, with_muon, with_lamb) for stage in (2, 3)
    ]


def stack_run(kind: Callable[[nn.Module], Any], options: dict[str, Any], leaves: int) -> tuple[str, int, bool]:
    """The digest of two steps, updates in backward, and whether the gradients' bytes are the formula's."""
    torch.manual_seed(2)
    model = Stack()
    optimizer = kind(model)
    sharded = ss.shard(model, optimizer, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with counting() as early:
        for micro in sharded.micro_batches(Vectors(), global_batch=leaves, micro_batch=1, seed=5):
            model(micro.batch).backward()
            if micro.last:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                if micro.step == 1:
                    break
    return ss.digest(model, optimizer), len(early), sharded.bytes.peak == sharded.bytes.formula


def stack_runs(runs: list[tuple[Any, dict[str, Any], int, int]]) -> list[tuple[str, int, bool]]:
    return [stack_run(kind, {**options, **ON}, leaves) for kind, options, leaves, _ in runs]


@cache
def updated_in_step() -> list[str]:
    kept = ("precision", "clip_value")
    plain = [(kind, {n: v for n, v in options.items() if n in kept}, count) for kind, options, count, _ in every_run()]
    return [stack_run(kind, {**options, "stage": 0}, count)[0] for kind, options, count in plain]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_bits_are_those_of_step_and_the_bytes_those_of_the_formula(ranks, world_size):
    some = slice(None, None, 3 if world_size == 4 else 1)
    runs = every_run()[some]
    for results in ranks(world_size).run(stack_runs, runs):
        assert [digest for digest, _, _ in results] == updated_in_step()[some]
        wanted = [2 * (3 if world_size == 1 else spaces) for _, _, _, spaces in runs]
        assert [early for _, early, _ in results] == wanted
        assert all(exact for _, _, exact in results)


def zoo_run(name: str, stage: Any) -> tuple[str, int]:
    entry = ZOO[name]
    model = made(entry)
    optimizer = ss.optim.AdamW(trained(model), lr=0.05)
    sharded = ss.shard(model, optimizer, stage=stage, units=entry.units, prefetch=entry.prefetch, **ON)
    sharded.expect(entry.passes * LEAVES // sharded.world_size)
    for method in entry.entries:
        sharded.add_entry(method)
    with counting() as early:
        for step in range(STEPS):
            for leaf in range(sharded.rank, LEAVES, sharded.world_size):
                entry.backward(model, LEAVES * step + leaf)
            optimizer.step()
            optimizer.zero_grad()
    return ss.digest(model, optimizer), len(early)


def zoo_runs(runs: list[tuple[str, Any]]) -> list[tuple[str, int]]:
    return [zoo_run(*run) for run in runs]


DETACHED = "parameters of other units, used without gradients"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of checkpoints in checkpoints
@pytest.mark.parametrize(("world_size", "stage"), [(1, 2), (2, 3)])
def test_every_model_of_the_zoo_keeps_its_bits(ranks, world_size, stage):
    """Below stage 3 a rank can be harmed only by itself."""
    names = [name for name, entry in ZOO.items() if entry.passes == 1 and (stage == 3 or name != DETACHED)]
    results = ranks(world_size).run(zoo_runs, [(name, stage) for name in names])
    for answers in results:
        assert not [n for n, (digest, _) in zip(names, answers, strict=True) if digest != digest_of_one_rank(n)]
    early = {name for name, (_, count) in zip(names, results[0], strict=True) if count}
    checkpoints = {name for name in names if name.startswith("checkpoints") and "the model" not in name}
    assert early >= {"plain", "in another order each time", "called several times", *checkpoints}
    assert not early & {"sum of two forwards", "gradient penalty", "units that call themselves"}


def paths_run(options: dict[str, Any]) -> tuple[str, list[str]]:
    torch.manual_seed(5)
    model = Paths()
    optimizer = ss.optim.AdamW(model.parameters(), lr=0.01)
    sharded = ss.shard(model, optimizer, **options)
    sharded.expect(PATH_LEAVES // sharded.world_size)
    with counting() as early:
        for step in range(3):
            for leaf in range(sharded.rank, PATH_LEAVES, sharded.world_size):
                model(batch(step, leaf), *PATHS[leaf]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return ss.digest(model, optimizer), early


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_touch_different_parameters_decide_each_for_itself(ranks, stage):
    wanted, _ = paths_run({"stage": 0})
    results = ranks(2).run(paths_run, {"stage": stage, "prefetch": 0, **ON})
    assert [digest for digest, _ in results] == [wanted] * 2
    assert results[0][1] != results[1][1]


def two_leaves(paths: list[tuple[tuple[int, ...], int]]) -> tuple[str, list[str]]:
    """Each with its own path."""
    torch.manual_seed(5)
    model = Paths()
    optimizer = ss.optim.AdamW(model.parameters(), lr=0.01)
    sharded = ss.shard(model, optimizer, stage=3, **ON)
    sharded.expect(2 // sharded.world_size)
    with counting() as early:
        for leaf in range(sharded.rank, 2, sharded.world_size):
            model(batch(0, leaf), *paths[leaf]).backward()
        optimizer.step()
    return ss.digest(model, optimizer), early


ALL = ["blocks.3", "blocks.2", "blocks.1"]
WITHOUT_2 = ["blocks.3", "blocks.1"]


@pytest.mark.parametrize(
    ("first", "second", "updated"),
    [
        (((0, 1, 2, 2, 3), -1), ((0, 1, 2, 3), -1), [WITHOUT_2, WITHOUT_2]),
        (((0, 1, 2, 3), -1), ((0, 1, 2, 3), 2), [ALL, WITHOUT_2]),
    ],
    ids=["what one rank uses twice, none updates", "what one rank has not touched, the other updates"],
)
def test_ranks_whose_micro_batches_differ(ranks, first, second, updated):
    wanted, alone = two_leaves([first, second])  # the step's last micro-batch is the second one
    assert alone == ALL
    assert ranks(2).run(two_leaves, [first, second]) == [(wanted, early) for early in updated]


# - bytes


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("world_size", "leaves"), [(1, (1, 3)), (2, (1, 2, 3)), (4, (1,))])
def test_the_formulas_are_exact_to_the_byte(ranks, world_size, leaves, precision):
    options = [{"stage": stage} for stage in (0, 1, 2, 3, MIXED_GPT)] + [{"stage": 1, "schedule": "per step"}]
    runs = [
        (own, {**chosen, "precision": precision, **ON})
        for chosen in options
        for own in leaves
        if "schedule" not in chosen or own != 3
    ]
    for results in ranks(world_size).run(counted_runs, runs):
        rows = list(zip(runs, results, strict=True))
        assert not [(run, row.peak, row.formula) for run, row in rows if row.peak != row.formula]
        assert not [(run, row) for run, row in rows if row.sent != row.sent_formula]


def tower_gradients(stage: int) -> int:
    torch.manual_seed(1)
    model = Tower()
    optimizer = ss.optim.AdamW(model.parameters())
    sharded = ss.shard(model, optimizer, stage=stage, **ON)
    sharded.expect(1)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sharded.bytes.peak.gradients


@pytest.mark.parametrize("stage", [2, 3])
def test_no_sums_of_units_wait_for_each_other_by_hand(ranks, stage):
    # The root's leaf is open; floor 0's leaf travels, floor 1's memory is the spare, and of its sum nothing is left.
    assert ranks(2).run(tower_gradients, stage) == [4 * (PADDED_ROOT + (FLOOR + FLOOR_SHARD) + FLOOR)] * 2


# - one rank: what waits for step()


def stack(
    kind: Callable[[nn.Module], Any] = adamw, expected: int | None = 1, **options: Any
) -> tuple[Stack, Any, ss.Sharded]:
    torch.manual_seed(2)
    model = Stack()
    optimizer = kind(model)
    sharded = ss.shard(model, optimizer, **{"stage": 3, **ON, **options})
    if expected is not None:
        sharded.expect(expected)
    return model, optimizer, sharded


def digest_after(backward: Callable[[nn.Module], Any], **options: Any) -> tuple[str, list[str]]:
    model, optimizer, _ = stack(**options)
    with counting() as early:
        backward(model)
    optimizer.step()
    return ss.digest(model, optimizer), early


def keeping_the_graph(model: nn.Module) -> None:
    model(inputs()).backward(retain_graph=True)


def differentiating_twice(model: nn.Module) -> None:
    model(inputs()).backward(create_graph=True)


def calling_twice(model: nn.Module) -> None:
    (model(inputs()) + model(inputs(1))).backward()


def held(model: nn.Module) -> None:
    with ss.gathered(model):
        model(inputs()).backward()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("backward", [keeping_the_graph, differentiating_twice, calling_twice, held])
def test_what_may_be_needed_again_waits_for_step(backward, stage):
    wanted, _ = digest_after(backward, stage=stage, update_in_backward=False)
    assert digest_after(backward, stage=stage) == (wanted, [])


def test_the_pass_before_the_last_may_keep_its_graph():
    def twice(model: nn.Module) -> None:
        loss = model(inputs())
        loss.backward(retain_graph=True)
        loss.backward()

    wanted, _ = digest_after(twice, update_in_backward=False)
    assert digest_after(twice, expected=2) == (wanted, ["blocks.3", "blocks.2", "blocks.1"])


def test_evaluations_do_not_count_as_uses():
    def evaluating(model: nn.Module) -> None:
        loss = model(inputs())
        with torch.no_grad():
            model(inputs(1))
        loss.backward()

    wanted, _ = digest_after(evaluating, update_in_backward=False)
    assert digest_after(evaluating) == (wanted, ["blocks.3", "blocks.2", "blocks.1"])


def test_the_number_of_micro_batches_may_vary():
    digests = []
    for options in ({}, {"update_in_backward": False}):
        model, optimizer, sharded = stack(**options)
        with counting() as early:
            for count in (1, 3, 2):
                sharded.expect(count)
                for number in range(count):
                    model(inputs(number)).backward()
                optimizer.step()
                optimizer.zero_grad()
        digests.append(ss.digest(model, optimizer))
        assert len(early) == (0 if options else 9)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize(("after", "count"), [(0, 1), (1, 2)])
def test_an_evaluation_in_between_does_not_change_the_number(by_hand, after, count):
    """Its ``count`` micro-batches are dealt too, when ``after`` of the three of a step are done."""

    def trained(evaluates: bool) -> str:
        model, optimizer, sharded = stack(expected=3 if by_hand else None)
        dealt = sharded.micro_batches(Vectors(), global_batch=6, micro_batch=2, seed=5)
        for number in range(6):
            if evaluates and number % 3 == after:
                for micro in sharded.micro_batches(Vectors(), global_batch=2 * count, micro_batch=2, seed=1):
                    with torch.no_grad():
                        model(micro.batch)
            model(inputs(number) if by_hand else next(dealt).batch).backward()
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        return ss.digest(model, optimizer)

    assert trained(evaluates=True) == trained(evaluates=False)


def test_zero_grad_at_the_begin_of_a_step():
    digests = []
    for options in ({}, {"update_in_backward": False}):
        model, optimizer, sharded = stack(expected=None, **options)
        with counting() as early:
            for micro in sharded.micro_batches(Vectors(), global_batch=4, micro_batch=2, seed=5):
                if micro.index == 0:
                    optimizer.zero_grad()
                model(micro.batch).backward()
                if micro.last:
                    optimizer.step()
                if micro.step == 2:
                    break
        assert len(early) == (0 if options else 6)
        digests.append(ss.digest(model, optimizer))
    assert digests[0] == digests[1]


def test_what_is_not_finite_is_traced_in_backward_too():
    model, optimizer, _ = stack(trace_nonfinite=True)
    optimizer.param_groups[0]["lr"] = float("inf")
    with counting() as early:
        model(inputs()).backward()
    assert early
    with pytest.raises(ss.NonFiniteUpdateError, match=r"step 0 made .* parameter 'blocks.3.1.weight', element 0"):
        optimizer.step()


def test_a_closure():
    digests = []
    for options in ({}, {"update_in_backward": False}):
        model, optimizer, _ = stack(**options)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs())
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        digests.append(ss.digest(model, optimizer))
    assert digests[0] == digests[1]


def test_a_step_that_cannot_be_made_changes_nothing():
    wanted, _ = digest_after(lambda model: model(inputs()).backward())
    model, optimizer, _ = stack()
    betas = optimizer.param_groups[1]["betas"]
    optimizer.param_groups[1]["betas"] = (1.0, 0.999)
    with counting() as early:
        model(inputs()).backward()
    assert early == []
    with pytest.raises(ss.RuleError):
        optimizer.step()
    optimizer.param_groups[1]["betas"] = betas
    optimizer.step()
    assert ss.digest(model, optimizer) == wanted


# - what is refused


def keras_clipping(model: nn.Module) -> Any:
    return ss.optim.keras.Adam(model.parameters(), global_clipnorm=1.0)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any], str]] = {
    "clip_norm": (adamw, {"clip_norm": 1.0}, r"got clip_norm=1.0, which needs the norm over all"),
    "clipping optimizer": (keras_clipping, {}, "got an optimizer that clips by the norm"),
    "loss scale": (adamw, {"loss_scale": 2.0}, "got a loss scale"),
    "sums over tensors": (lambda m: ss.optim.LAMB(m.parameters()), {}, "got LAMB, no rule of which"),
    "counting optimizer": (lambda m: ss.optim.keras.SGD(m.parameters()), {}, "got SGD, no rule of which"),
    "schedule-free": (lambda m: ss.optim.AdamWScheduleFree(m.parameters()), {}, "got AdamWScheduleFree, no rule"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_needs_the_whole_step_is_refused_before_anything_is_changed(case):
    kind, options, text = REFUSED[case]
    model = Stack()
    with pytest.raises(ss.ConfigError, match=f"expected update_in_backward=True only where .* {text}"):
        ss.shard(model, kind(model), **options, **ON)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_loop_that_does_not_say_which_micro_batch_is_the_last():
    model, optimizer, sharded = stack(expected=None)
    with pytest.raises(ss.ConfigError, match=r"step's last micro-batch .* or call sharded.expect\(n\)"):
        model(inputs()).backward()
    optimizer.zero_grad()
    sharded.expect(1)
    model(inputs()).backward()
    optimizer.step()
    assert ss.digest(model, optimizer) == digest_after(lambda model: model(inputs()).backward())[0]


@pytest.mark.parametrize("count", [0, -1, True, 1.0])
def test_expect_takes_a_positive_number(count):
    with pytest.raises(ss.ConfigError, match="a positive number of micro-batches"):
        stack(expected=count)


def test_grad_scaler_is_refused():
    model, optimizer, _ = stack()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(inputs())).backward()
    with pytest.raises(ss.ConfigError, match=r"update_in_backward=True, got torch.amp.GradScaler"):
        scaler.step(optimizer)


def fresh_state() -> dict[str, Any]:
    """What an optimizer of the same parameters saves before its first step."""
    return stack()[1].state_dict()


AFTER: dict[str, Callable[[Stack, Any, ss.Sharded], Any]] = {
    "begins a forward pass": lambda model, *_: model(inputs(1)),
    "calls zero_grad()": lambda _, optimizer, __: optimizer.zero_grad(),
    "reads a full tensor by name": lambda *rest: rest[-1].full_grad("stem.weight"),
    "gathers whole parameters or states": lambda model, *_: model.state_dict(),
    "loads a state dict into the optimizer": lambda _, optimizer, __: optimizer.load_state_dict(fresh_state()),
    "updates an average": lambda model, *_: ss.Average(model, decay=0.9).update(),
}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("what", list(AFTER))
def test_only_step_may_follow(what, stage):
    wanted, _ = digest_after(lambda model: model(inputs()).backward(), stage=stage)
    model, optimizer, sharded = stack(stage=stage)
    model(inputs()).backward()
    expected = rf"expected optimizer.step\(\) after the last backward\(\) of step 0, .* rank {re.escape(what)}"
    with pytest.raises(ss.SequenceError, match=expected):
        AFTER[what](model, optimizer, sharded)
    optimizer.step()
    assert ss.digest(model, optimizer) == wanted
    optimizer.zero_grad()


def test_a_backward_more_than_was_said():
    wanted, _ = digest_after(lambda model: model(inputs()).backward(), stage=2)
    model, optimizer, _ = stack(stage=2)
    model(inputs()).backward()
    with pytest.raises(ss.SequenceError, match="this rank begins another backward pass"):
        model.head.weight.sum().backward()
    optimizer.step()
    assert ss.digest(model, optimizer) == wanted


def test_gradients_that_are_zeroed_behind_the_optimizers_back():
    model, optimizer, _ = stack()
    model(inputs()).backward()
    model.zero_grad()
    with pytest.raises(ss.SequenceError, match=r"this rank calls zero_grad\(\); a step cannot be left out"):
        optimizer.step()


def test_hyper_parameters_that_change_before_step():
    wanted, _ = digest_after(lambda model: model(inputs()).backward())
    model, optimizer, _ = stack()
    model(inputs()).backward()
    rate = optimizer.param_groups[1]["lr"]
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ss.SequenceError, match=r"group 1 to stay what they were .* but \['lr'\] are others"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = rate
    optimizer.step()
    assert ss.digest(model, optimizer) == wanted


def failing(model: nn.Module, name: str) -> None:
    def fail(_: Tensor) -> None:
        raise ValueError("in the middle")

    handle = model.get_parameter(name).register_hook(fail)
    with pytest.raises(ValueError, match="in the middle"):
        model(inputs()).backward()
    handle.remove()


@pytest.mark.parametrize("stage", [1, 3])
def test_an_exception_after_updates_leaves_a_model_that_says_so(stage):
    model, optimizer, _ = stack(stage=stage)
    failing(model, "blocks.0.1.weight")
    for call in (optimizer.step, optimizer.zero_grad, lambda: model(inputs()), lambda: ss.digest(model, optimizer)):
        with pytest.raises(ss.SequenceError, match=r"left by an exception when units were .* a checkpoint"):
            call()


def test_an_exception_before_any_update_is_one_as_ever():
    wanted, _ = digest_after(lambda model: model(inputs()).backward())
    model, optimizer, _ = stack()
    failing(model, "head.weight")
    optimizer.zero_grad()
    model(inputs()).backward()
    optimizer.step()
    assert ss.digest(model, optimizer) == wanted


@pytest.mark.parametrize("stage", [2, 3])
def test_a_unit_that_is_used_again_after_it_was_updated(stage):
    model, _, _ = stack(stage=stage)

    def again(_: Tensor) -> None:
        model.blocks[3](inputs())

    model.get_parameter("stem.weight").register_hook(again)
    with pytest.raises(ss.SequenceError, match=r"done with unit 'blocks.3' when .* used again in the same pass"):
        model(inputs()).backward()


def test_autograd_refuses_old_values_that_no_hook_has_seen_used():
    """Below stage 3, where nothing is gathered: another unit's matrix, detached."""
    model = External(detached=True).double()
    optimizer = ss.optim.AdamW(model.parameters())
    sharded = ss.shard(model, optimizer, stage=2, units="blocks.*", **ON)
    sharded.expect(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(inputs().double()).backward()


def test_a_discriminator_is_not_trained_by_its_generators_loss():
    model, optimizer, _ = stack()
    model(inputs()).backward()
    optimizer.step()
    model(inputs(1)).backward()  # before zero_grad(): gradients that are thrown away
    optimizer.zero_grad()
    assert ss.digest(model, optimizer) == digest_after(lambda model: model(inputs()).backward())[0]
