"""What people do with models beside training one: several in a process, parts attached, copied, generated with.

What trains alike is in the zoo (`test_zoo`).
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import shardstep as ss
from shardstep.sharding.whole import whole_of
from tests.sharding.zoo import ZOO, Method, ReturnsParameters, Stack, batch, frozen_first, plain

LEAVES = 4


def stack(make: Callable[[], nn.Module] = Stack, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return make().double()


def sgd(model: nn.Module, ours: bool = True) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (ss.optim.SGD if ours else torch.optim.SGD)(parameters, lr=0.1, momentum=0.5)


def sharded(make: Callable[[], nn.Module] = Stack, seed: int = 3, **options: Any) -> tuple[Any, Any, ss.Sharded]:
    model = stack(make, seed)
    optimizer = sgd(model)
    return model, optimizer, ss.shard(model, optimizer, **{"units": "blocks.*", "stage": 3, **options})


def freed(model: nn.Module) -> bool:
    return not any(unit.is_whole for unit in whole_of(model).units)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=1e-9, atol=1e-11)


# - several models


def adversaries(shard: bool, clearing: str) -> list[float]:
    """The usual loop of a generator and a discriminator, whose gradients pass through one another."""
    generator, discriminator = stack(seed=1), stack(seed=2)
    generator.forward = lambda x: generator.trunk(x, 0)  # an image, not a loss
    optimizers = [sgd(generator, shard), sgd(discriminator, shard)]
    if shard:
        for model, optimizer in zip((generator, discriminator), optimizers, strict=True):
            ss.shard(model, optimizer, units="blocks.*")
    clear = {"optimizer": [o.zero_grad for o in optimizers], "model": [generator.zero_grad, discriminator.zero_grad]}
    clear_generator, clear_discriminator = clear[clearing]
    for step in range(3):
        clear_discriminator()
        fake = generator(batch(step))
        (discriminator(batch(step + 9)) - discriminator(fake.detach())).backward()
        optimizers[1].step()
        clear_generator()
        discriminator(fake).backward()
        optimizers[0].step()
    return [
        value.double().sum().item() for model in (generator, discriminator) for value in model.state_dict().values()
    ]


@pytest.mark.parametrize("clearing", ["optimizer", "model"])
def test_two_models_whose_losses_pass_through_each_other(ranks, clearing):
    wanted = pytest.approx(adversaries(False, "model"), rel=1e-9)
    assert adversaries(True, clearing) == wanted
    assert ranks(2).run(adversaries, True, clearing) == [wanted] * 2


def distilled(shard: bool) -> list[float]:
    """A frozen teacher, one loss of both, and a third model inside another's forward."""
    teacher, student, helper = stack(seed=1), stack(seed=2), stack(seed=4)
    teacher.requires_grad_(False)
    student.run = lambda block, x: block(x) + 0.1 * helper.blocks[0](x)
    optimizers = [sgd(student, shard), sgd(helper, shard)]
    if shard:
        models = ((student, optimizers[0]), (helper, optimizers[1]), (teacher, ss.optim.SGD(teacher.parameters())))
        for model, optimizer in models:
            ss.shard(model, optimizer, units="blocks.*")
    for step in range(3):
        with torch.no_grad():
            wanted = teacher.trunk(batch(step), 0)
        ((student.trunk(batch(step), 0) - wanted).square().mean() + plain(helper, step)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not shard or all(map(freed, (teacher, student, helper)))
    return [value.double().sum().item() for model in (student, helper) for value in model.state_dict().values()]


def test_a_frozen_sharded_teacher_and_two_models_in_one_loss(ranks):
    assert ranks(2).run(distilled, True) == [pytest.approx(distilled(False), rel=1e-9)] * 2


@pytest.mark.parametrize("stage", [0, 3])
def test_gradients_pass_through_a_model_that_is_frozen_altogether(stage):
    """As through a network that a loss is made with; some of it may be trained later."""
    model, plainly = stack(), stack()
    found = []
    for critic in (model, plainly):
        critic.requires_grad_(False)
        if critic is model:
            optimizer = ss.optim.SGD(critic.stem.parameters(), lr=0.1)
            handle = ss.shard(critic, optimizer, stage=stage, units="blocks.*")
        x = batch(0).requires_grad_()
        critic(x).backward()
        found.append(x.grad)
    assert torch.equal(*found)
    assert stage < 3 or freed(model)
    with pytest.raises(ss.ConfigError, match="all were frozen"):
        ss.Average(model.requires_grad_())
    optimizer.step()
    optimizer.zero_grad()
    model.requires_grad_(False)
    optimizer.add_param_group({"params": list(model.head.requires_grad_().parameters())})
    plain(model, 0).backward()
    optimizer.step()
    assert handle.step_count == 1


# - gradients that are zeroed


def zeroed(how: str) -> dict[str, Tensor]:
    model, optimizer, _ = sharded()
    clear = {"model": model.zero_grad, "optimizer": optimizer.zero_grad}[how]
    plain(model, 5).backward()
    clear()
    for step in range(2):
        plain(model, step).backward()
        optimizer.step()
        clear()
    return model.state_dict()


def test_zeroing_by_the_model_is_zeroing_by_the_optimizer():
    assert_same(zeroed("model"), zeroed("optimizer"))


def test_a_step_after_the_models_zero_grad_does_nothing():
    model, optimizer, handle = sharded()
    plain(model, 0).backward()
    model.zero_grad()
    optimizer.step()
    assert handle.step_count == 0
    assert_same(model.state_dict(), stack().state_dict())


def zeroed_where_no_hook_sees_backward_begin(how: str) -> list[float]:
    entry = ZOO["outputs: closure"]
    model, optimizer, _ = sharded(entry.make, stage=1)
    for step in range(3):
        entry.backward(model, step)
        optimizer.step()
        {"model": model.zero_grad, "optimizer": optimizer.zero_grad}[how]()
    return [value.sum().item() for value in model.state_dict().values()]


def test_zeroing_by_the_model_before_a_gradient_that_arrives_unannounced():
    wanted = zeroed_where_no_hook_sees_backward_begin("optimizer")
    assert zeroed_where_no_hook_sees_backward_begin("model") == wanted


def test_zeroing_a_part_is_refused():
    model, optimizer, _ = sharded()
    plain(model, 0).backward()
    model.head.zero_grad()
    with pytest.raises(ss.SequenceError, match="2 of 20 gradients were set to None"):
        optimizer.step()
    optimizer.zero_grad()
    plain(model, 0).backward()
    optimizer.step()


# - memory


def most_whole(make: Callable[[], nn.Module], backward: Callable[[Any, int], Tensor], prefetch: int) -> int:
    """The most units but the root that are whole, or on their way, at a time in the second of two steps."""
    model, optimizer, _ = sharded(make, prefetch=prefetch)
    most, units = 0, whole_of(model).units
    for step in range(2):
        most = 0
        handles = [
            module.register_forward_hook(lambda *_: look())
            for unit in units[1:]
            for module in unit.modules[0].children()
        ]

        def look(*_: Any) -> None:
            nonlocal most
            most = max(most, sum(unit.spaces[0].flat.untyped_storage().nbytes() > 0 for unit in units[1:]))

        loss = backward(model, step)
        with Watching(look):
            loss.backward()
        for handle in handles:
            handle.remove()
        optimizer.step()
        optimizer.zero_grad()
    return most


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    """Calls a function before every operation, those of backward too."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look()
        return func(*args, **(kwargs or {}))


def checkpointed(reentrant: bool) -> Callable[[Any, int], Tensor]:
    def loss(model: Any, number: int) -> Tensor:
        model.run = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
        return plain(model, number)

    return loss


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (Stack, plain),
        (frozen_first, plain),
        (Stack, checkpointed(True)),
        (Stack, checkpointed(False)),
        (frozen_first, checkpointed(False)),
    ],
    ids=["plain", "mostly frozen", "checkpoints, reentrant", "checkpoints, not reentrant", "both"],
)
@pytest.mark.parametrize("prefetch", [0, 1])
def test_no_more_units_are_whole_than_are_gathered_ahead(make, loss, prefetch):
    assert most_whole(make, loss, prefetch) == 1 + prefetch


# - generation


class Greedy(Stack):
    def generate(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = torch.tanh(self.trunk(x, 0))
        return x


def generated(grad_mode: Callable[[], Any]) -> tuple[int, float, bool]:
    model, optimizer, handle = sharded(Greedy)
    plain(model, 0).backward()
    with grad_mode(), ss.gathered(model):
        calls = handle.traffic.calls
        x = model.generate(batch(1), 5)
        gathers = handle.traffic.calls - calls
    optimizer.step()
    return gathers, x.sum().item(), freed(model)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_generation_with_whole_parameters_gathers_nothing(ranks, grad_mode):
    wanted = stack(Greedy).generate(batch(1), 5).sum().item()
    for gathers, value, all_freed in ranks(2).run(generated, grad_mode):
        assert (gathers, all_freed) == (0, True)
        assert value == pytest.approx(wanted, rel=1e-12)


def generated_without() -> float:
    model, _, _ = sharded(Greedy)
    with torch.no_grad():
        return model.generate(batch(1), 3).sum().item()


def test_generation_without_it_gathers_as_it_goes(ranks):
    wanted = stack(Greedy).generate(batch(1), 3).sum().item()
    assert ranks(2).run(generated_without) == [pytest.approx(wanted, rel=1e-12)] * 2


def evaluated(stage: int) -> tuple[float, float, bool]:
    """Blocks give out views of their parameters; before and after a step of training."""
    model, optimizer, _ = sharded(ReturnsParameters, stage=stage, prefetch=0)
    losses = []
    for number in range(2):
        with torch.no_grad():
            losses.append(plain(model, number).item())
        plain(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[1], freed(model)


def test_evaluation_of_blocks_that_give_out_views_of_their_parameters(ranks):
    wanted = evaluated(0)
    assert ranks(2).run(evaluated, 3) == [wanted] * 2


# - entries


def test_a_method_that_reads_parameters_names_the_way_out():
    model, _, handle = sharded(Method)
    with pytest.raises(ss.FreedParameterError, match=r"'scale', which are freed.* sharded.add_entry\('<method>'\)"):
        model.encode(batch(0))
    handle.add_entry("encode")
    torch.testing.assert_close(model.encode(batch(0)), stack(Method).encode(batch(0)))


@pytest.mark.parametrize("write", [lambda p: p.mul_(2), lambda p: p.__setitem__(0, 1), lambda p: setattr(p, "data", p)])
def test_writing_a_parameter_of_another_unit_in_forward_is_refused(write):
    model, _, _ = sharded(prefetch=0)
    model.run = lambda block, x: write(model.blocks[3].up.weight) if block is model.blocks[0] else block(x)
    with torch.no_grad(), pytest.raises(ss.FreedParameterError, match=r"'blocks\.3\.up\.weight'"):
        plain(model, 0)


# - modules that are attached later, copies


@pytest.mark.parametrize("stage", [0, 3])
def test_modules_attached_later(stage):
    model, optimizer, _ = sharded(stage=stage)
    model.dropout = model.blocks[1].act = nn.Identity()
    model.blocks[2] = model.blocks[2]
    plain(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.blocks[1].extra = nn.Linear(2, 3)
    with pytest.raises(
        ss.SequenceError, match=r"'blocks.1.extra.weight', of shape \(3, 2\), is new: .* then call shard"
    ):
        plain(model, 0)
    del model.blocks[1].extra
    model.head.gain = nn.Parameter(torch.ones(3))
    with pytest.raises(ss.SequenceError, match=r"'head.gain', of shape \(3,\), is new"):
        plain(model, 0)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps, lambda model: copy.deepcopy(model.blocks[1].up.weight)])
def test_a_sharded_model_is_not_copied(stage, way):
    model, _, _ = sharded(stage=stage)
    if stage < 3 and not isinstance(
        way(nn.Linear(1, 1)) if way in (copy.deepcopy, pickle.dumps) else 0, nn.Module | bytes
    ):
        return
    with pytest.raises(ss.ConfigError, match=r"not sharded to copy or pickle.* save model.state_dict\(\)"):
        way(model)


def gone(stage: int, zeroed: bool) -> bool:
    """Whether nothing is left of a model that was sharded and trained, once nobody refers to it."""
    model, optimizer, handle = sharded(stage=stage)
    plain(model, 0).backward()
    optimizer.step()
    if zeroed:
        optimizer.zero_grad()
    left = [weakref.ref(thing) for thing in (model, optimizer, handle, *model.parameters())]
    del model, optimizer, handle
    gc.collect()
    return not any(ref() is not None for ref in left)


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_that_nobody_refers_to_is_gone(stage, zeroed):
    assert gone(stage, zeroed)


# - exceptions


def failed_in_backward(where: str) -> dict[str, Tensor]:
    """An exception in the second block's recomputation, or in a hook of backward; then a step as if nothing was."""
    model, optimizer, _ = sharded(prefetch=0)
    if where == "recompute":
        model.run = lambda block, x: checkpoint(block, x, use_reentrant=False)
    loss = plain(model, 5)
    failing = _Failing()
    if where == "recompute":
        handle = model.blocks[1].up.register_forward_pre_hook(failing)
    else:
        handle = model.blocks[1].up.register_full_backward_hook(failing)
        loss = plain(model, 5)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    with torch.no_grad():
        plain(model, 1)
    refused = plain(model, 1)
    with pytest.raises(ss.SequenceError, match=r"zero_grad\(\) after a backward\(\) that was left by an exception"):
        refused.backward()
    optimizer.zero_grad()
    for step in range(2):
        plain(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert freed(model)
    return {name: value.sum().item() for name, value in model.state_dict().items()}


class _Failing:
    def __call__(self, *_: Any) -> None:
        raise ZeroDivisionError


def failing_backward(model: nn.Module, where: str) -> None:
    """An exception before any gradient of a parameter, between two, or after all of them."""
    x = batch(5).requires_grad_()
    handle = model.blocks[1].register_forward_hook(lambda *args: args[2].register_hook(_Failing()) and None)
    if where != "between":
        handle.remove()
    loss = model(x, 5)
    handle.remove()
    if where != "between":
        {"before": loss, "after": x}[where].register_hook(_Failing())
    with pytest.raises(ZeroDivisionError):
        loss.backward()


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_nothing_goes_on_from_what_a_failed_backward_has_left(where):
    """The gradients of an earlier micro-batch were given up silently, if the exception came before all others."""
    model, optimizer, handle = sharded()
    plain(model, 0).backward()
    failing_backward(model, where)
    text = r"zero_grad\(\) after a backward\(\) that was left by an exception, got "
    with pytest.raises(ss.SequenceError, match=text + "optimizer.step"):
        optimizer.step()
    with pytest.raises(ss.SequenceError, match=text + "full_grad"):
        handle.full_grad("head.weight")
    with pytest.raises(ss.SequenceError, match=text + "another backward"):
        plain(model, 1).backward()
    assert handle.step_count == 0
    optimizer.zero_grad()
    plain(model, 0).backward()
    optimizer.step()
    assert handle.step_count == 1


@pytest.mark.parametrize("where", ["between", "after"])
def test_the_models_zero_grad_recovers_from_a_failed_backward_too(where):
    wanted, optimizer, _ = sharded()
    plain(wanted, 0).backward()
    optimizer.step()
    model, optimizer, handle = sharded()
    failing_backward(model, where)
    model.zero_grad()
    handle.full_param("head.weight")
    plain(model, 0).backward()
    optimizer.step()
    assert_same(model.state_dict(), wanted.state_dict())


def test_a_step_from_within_backward_is_refused():
    model, optimizer, _ = sharded()
    model.stem.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(ss.SequenceError, match=r"expected optimizer.step\(\) outside backward"):
        plain(model, 0).backward()


@pytest.mark.parametrize("where", ["recompute", "hook"])
def test_an_exception_in_backward_is_recovered_from_by_zero_grad(ranks, where):
    wanted = stack()
    optimizer = sgd(wanted, ours=False)
    for step in range(2):
        plain(wanted, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    sums = {name: pytest.approx(value.sum().item(), rel=1e-9) for name, value in wanted.state_dict().items()}
    assert ranks(2).run(failed_in_backward, where) == [sums] * 2


# - torch.func, torch.compile


def test_functional_calls_are_refused():
    model, _, _ = sharded()
    values = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    with pytest.raises(ss.SequenceError, match="another object is there now"):
        torch.func.functional_call(model, values, (batch(0),))


@pytest.mark.parametrize("stage", [0, 3])
def test_transforms_of_functions_are_right_or_refused(stage):
    model, _, _ = sharded(stage=stage)
    wanted = torch.func.grad(stack())(batch(0))
    try:
        got = torch.func.grad(model)(batch(0))
    except RuntimeError as refused:
        print("REFUSED", refused)
        return
    torch.testing.assert_close(got, wanted)


def compiled_run(backend: str, when: str | None) -> tuple[str, tuple[int, ...], set[int]]:
    """The digest of three steps; the graphs compiled after each; and how often hooks interrupted them."""
    torch._dynamo.reset()
    counters.clear()
    model = stack()
    optimizer = sgd(model)
    for block in model.blocks if when == "before" else ():
        block.compile(backend=backend)
    ss.shard(model, optimizer, units="blocks.*")
    for block in model.blocks if when == "after" else ():
        block.compile(backend=backend)
    graphs = []
    for step in range(3):
        plain(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    return ss.digest(model, optimizer), tuple(graphs), set(counters["recompiles"].values())


@pytest.mark.parametrize(("backend", "when"), [("eager", "after"), ("aot_eager", "before")])
def test_units_may_be_compiled(ranks, backend, when):
    """One graph serves all blocks, which are alike, and is not compiled again although parameters come and go."""
    (wanted, *_), *_ = ranks(1).run(compiled_run, backend, None)
    assert ranks(2).run(compiled_run, backend, when) == [(wanted, (1, 1, 1), set())] * 2


def tags_of_two() -> list[int]:
    models = [sharded(seed=seed)[0] for seed in (1, 2)]
    spaces = [space for model in models for unit in whole_of(model).units for space in unit.spaces]
    return [space._group._tag(2 * space.tag + kind) for space in spaces for kind in (0, 1)]


def test_messages_of_two_models_cannot_be_taken_for_each_other(ranks):
    for tags in ranks(2).run(tags_of_two):
        assert len(tags) == len({*tags}) == 20
