"""torch's database of optimizer tests, pointed at our classes: every configuration, error, state dict and scheduler.

A class of ours joins by having the name of one in the database. Each test below is one of torch's test_optim.py
(`TestOptimRenewed`), with torch's own optimizer beside ours. Of those, these do not apply:

- forloop/foreach/fused comparisons, peak memory, large tensors, meta tensors, `found_inf` of fused kernels: they
  compare torch's several implementations; here is one, and `foreach` and `fused` change nothing (tested below).
- differentiable (gradcheck): refused, since the update is one kernel that autograd cannot see into (tested below).
- capturable, CUDA graphs, torch.compile of the step: refused, since per-step scalars are the host's (tested below).
- rosenbrock_sparse: sparse gradients are refused; SparseAdam and LBFGS are torch's own classes.
- mixed devices and loading between devices: they need an accelerator.
- save_load_equality_with_weights_only: a state dict of ours has what torch's has, tensors and numbers.
"""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo, optim_db

import shardstep as ss

INFOS: dict[str, OptimizerInfo] = {
    info.name: info
    for info in optim_db
    if issubclass(getattr(ss.optim, info.name, object), ss.optim.Optimizer)  # SparseAdam and LBFGS are torch's
}
ONLY_MATRICES = {"Muon"}
WITHOUT_STEP = {"SGD", "Muon"}
"""torch's class keeps no step count; one that ours has brought stays as it is."""
FLOAT32_NUMBERS = {"ASGD", "NAdam", "Muon"}
"""torch's class keeps single numbers in float32 beside float64 parameters (Muon, a rate that is a tensor)."""
ACCEPTED = {
    "lr as Tensor doesn't work with foreach & not capturable": "foreach chooses no implementation here",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "the same",
    "betas must be either both floats or both Tensors": "each may be either",
}
"""What torch refuses and we need not, by the database's description."""
RAISED_INSTEAD = {"a param group cannot have duplicate parameters": ss.OwnershipError}
"""torch warns that this will be an error."""

TOLERANCES = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-13},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.complex64: {"rtol": 2e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},  # torch keeps state in bfloat16 and rounds every operation
}


def configurations(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(description, keyword arguments) of the database for a class."""
    return [(one.desc, one.kwargs) for one in INFOS[name].optim_inputs_func(device="cpu")]


EVERY = [pytest.param(name, kw, id=f"{name}-{desc}") for name in INFOS for desc, kw in configurations(name)]
CLASSES = [pytest.param(name, id=name) for name in INFOS]


def parameters(name: str, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(7, 5), (4, 6)] if name in ONLY_MATRICES else [(7, 5), (6,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups with different rates."""
    return [{"params": params[:1], "lr": 3e-3}, {"params": params[1:]}]


def theirs_of(name: str, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    cls = getattr(torch.optim, name)
    loop = {"foreach": False} if "foreach" in inspect.signature(cls).parameters else {}
    return cls(params, **{**loop, **copy.deepcopy(kwargs)})


def ours_of(name: str, params: Any, **kwargs: Any) -> ss.optim.Optimizer:
    return getattr(ss.optim, name)(params, **copy.deepcopy(kwargs))


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """The last parameter has none in every third step."""
    generator = torch.Generator().manual_seed(50 + step)
    for index, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        if param.is_complex():
            grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        param.grad = None if step % 3 == 2 and index == len(params) - 1 else grad


def go(optimizer: torch.optim.Optimizer, steps: range) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def owned(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_alike(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    """Parameters, and every state that torch's class has too."""
    name = type(ours).__name__
    tight = TOLERANCES[torch.float32 if name in FLOAT32_NUMBERS and dtype == torch.float64 else dtype]
    for mine, other in zip(owned(ours), owned(theirs), strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), **tight)
        for key, value in theirs.state[other].items():
            if value is not None and not (key == "step" and name in WITHOUT_STEP):
                torch.testing.assert_close(ours.state[mine][key], value, **tight, check_dtype=False)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("name", "kwargs"), EVERY)
def test_a_configuration_goes_the_way_of_torchs(name, kwargs, dtype):
    if dtype.is_complex and not INFOS[name].supports_complex:
        with pytest.raises(ss.UnsupportedError, match="real parameters"):
            ours_of(name, parameters(name, dtype), **kwargs)
        return
    for grouped in (False, True):
        mine, other = parameters(name, dtype), parameters(name, dtype)
        ours = ours_of(name, groups_of(mine) if grouped else mine, **kwargs)
        theirs = theirs_of(name, groups_of(other) if grouped else other, **kwargs)
        for optimizer in (ours, theirs):
            go(optimizer, range(3 if dtype == torch.bfloat16 else 7))
        assert_alike(ours, theirs, dtype)


@pytest.mark.parametrize(("name", "kwargs"), EVERY)
def test_state_dicts_go_from_one_to_the_other(name, kwargs):
    kinds = [ours_of, theirs_of]
    for source, target in (kinds, kinds[::-1]):
        first = source(name, groups_of(parameters(name)), **kwargs)
        go(first, range(4))
        second = target(name, [{"params": g["params"]} for g in groups_of(copied(owned(first)))])
        saved = copy.deepcopy(first.state_dict())
        second.load_state_dict(saved)
        for optimizer in (first, second):
            go(optimizer, range(4, 7))
        ours, theirs = (first, second) if source is ours_of else (second, first)
        assert_alike(ours, theirs, torch.float64)
        names = {key for group in first.state_dict()["param_groups"] for key in group}
        assert names <= {key for group in second.state_dict()["param_groups"] for key in group}


def copied(params: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


@pytest.mark.parametrize(("name", "kwargs"), EVERY)
def test_older_state_dicts_load(name, kwargs):
    """Without the flags that came later, with steps that are numbers, and without names."""
    first = ours_of(name, parameters(name), **kwargs)
    go(first, range(3))
    older = copy.deepcopy(first.state_dict())
    for group in older["param_groups"]:
        for flag in INFOS[name].not_og_supported_flags:
            if not group.get(flag):
                group.pop(flag, None)
    for state in older["state"].values():
        state["step"] = state["step"].item()
    named = [(f"p{index}", param) for index, param in enumerate(copied(owned(first)))]
    second = ours_of(name, named, **kwargs)
    second.load_state_dict(older)
    assert second.param_groups[0]["param_names"] == [each for each, _ in named]
    assert first.param_groups[0].keys() <= second.param_groups[0].keys()
    for optimizer in (first, second):
        go(optimizer, range(3, 5))
    assert all(map(torch.equal, owned(first), owned(second)))


ERRORS = [
    pytest.param(name, one, id=f"{name}-{one.optimizer_error_input.desc}")
    for name, info in INFOS.items()
    for one in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


@pytest.mark.parametrize(("name", "case"), ERRORS)
def test_errors_have_torchs_types_and_our_texts(name, case):
    given = case.optimizer_error_input
    params = parameters(name, torch.float32) if given.params is None else given.params

    def attempt() -> None:
        optimizer = ours_of(name, params, **given.kwargs)
        if case.error_on is OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()

    if given.desc in ACCEPTED:
        attempt()
        return
    with pytest.raises(RAISED_INSTEAD.get(given.desc, case.error_type), match=r"expected .*, got") as raised:
        attempt()
    assert isinstance(raised.value, ss.ShardstepError)


@pytest.mark.parametrize("name", CLASSES)
def test_options_that_choose_an_implementation_change_nothing(name):
    known = inspect.signature(getattr(torch.optim, name)).parameters
    plain = ours_of(name, parameters(name))
    go(plain, range(3))
    for option in ("foreach", "fused"):
        if option in known:
            optimizer = ours_of(name, parameters(name), **{option: True})
            go(optimizer, range(3))
            assert all(map(torch.equal, owned(plain), owned(optimizer)))
            assert optimizer.param_groups[0][option] is True
            assert optimizer.defaults[option] is True
    refused = [{option: True} for option in ("differentiable", "capturable")]
    refused += [{"fused": True, other: True} for other in ("foreach", "differentiable")]
    for options in refused:
        if options.keys() <= known.keys():
            with pytest.raises(RuntimeError, match=f"{list(options)[-1]}.* in parameter group 0, got"):
                ours_of(name, parameters(name), **options)


@pytest.mark.parametrize("name", CLASSES)
def test_schedulers_of_the_database(name):
    for makers in INFOS[name].scheduler_inputs:
        pair = [kind(name, parameters(name), lr=0.01) for kind in (ours_of, theirs_of)]
        schedulers = [[make(optimizer) for make in makers] for optimizer in pair]
        for step in range(12):
            for optimizer, own in zip(pair, schedulers, strict=True):
                go(optimizer, range(step, step + 1))
                for scheduler in own:
                    metric = [1.0] if isinstance(scheduler, ss.optim.lr_scheduler.ReduceLROnPlateau) else []
                    scheduler.step(*metric)
        assert [g["lr"] for g in pair[0].param_groups] == [g["lr"] for g in pair[1].param_groups]
        assert_alike(*pair, torch.float64)


@pytest.mark.parametrize("name", CLASSES)
def test_copies_go_on_alike(name):
    optimizer = ours_of(name, groups_of(parameters(name)))
    go(optimizer, range(2))
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]  # noqa: S301
    public = {attribute for attribute in vars(optimizer) if not attribute.startswith("_")}
    for twin in twins:
        assert public == {attribute for attribute in vars(twin) if not attribute.startswith("_")}
    for each in (optimizer, *twins):
        go(each, range(2, 4))
    for twin in twins:
        assert all(map(torch.equal, owned(optimizer), owned(twin)))
        assert repr(twin) == repr(optimizer)


@pytest.mark.parametrize("name", CLASSES)
def test_a_pickle_of_an_older_version_gains_what_it_lacks(name):
    optimizer = ours_of(name, parameters(name))
    go(optimizer, range(2))
    older = copy.deepcopy(optimizer)
    for group in older.param_groups:
        group.pop("maximize", None)  # Muon has none
    for state in older.state.values():
        state["step"] = int(state["step"])
    older = copy.deepcopy(older)
    for each in (optimizer, older):
        go(each, range(2, 4))
    assert all(map(torch.equal, owned(optimizer), owned(older)))
    assert not older.param_groups[0].get("maximize")
    assert ("maximize" in older.param_groups[0]) is ("maximize" in optimizer.param_groups[0])


def closure_of(optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((param.square().sum() for param in owned(optimizer)), torch.zeros(()))
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("name", CLASSES)
def test_closures_steps_without_gradients_and_zeroed_ones(name):
    ours, theirs = (kind(name, parameters(name), lr=0.01) for kind in (ours_of, theirs_of))
    with torch.no_grad():
        losses = [[float(optimizer.step(closure_of(optimizer))) for _ in range(3)] for optimizer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_alike(ours, theirs, torch.float64)
    for optimizer in (ours, theirs):
        optimizer.zero_grad(set_to_none=False)
        assert all(param.grad is not None and not param.grad.any() for param in owned(optimizer))
        optimizer.step()
    assert_alike(ours, theirs, torch.float64)
    before = copied(owned(ours))
    ours.zero_grad()
    ours.step()
    assert all(map(torch.equal, owned(ours), before))


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_and_gradients_of_other_strides(name):
    def strided() -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(5, 6, 2, generator=torch.Generator().manual_seed(1))[..., 0].t())]

    ours, theirs = ours_of(name, strided()), theirs_of(name, strided())
    for optimizer in (ours, theirs):
        go(optimizer, range(3))
    assert_alike(ours, theirs, torch.float32)


@pytest.mark.parametrize("name", CLASSES)
def test_an_unsharded_optimizer_under_the_grad_scaler(name):
    pair = [kind(name, parameters(name, torch.float32), lr=0.01) for kind in (ours_of, theirs_of)]
    for optimizer in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
        for step in range(4):
            optimizer.zero_grad()
            loss = sum((param.square().sum() for param in owned(optimizer)), torch.zeros(()))
            scaler.scale(loss * (float("inf") if step == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**6
    assert_alike(*pair, torch.float32)


@pytest.mark.parametrize("name", CLASSES)
def test_hooks_run_in_torchs_order_and_may_change_what_is_passed(name):
    logs = []
    for kind in (ours_of, theirs_of):
        log: list[str] = []
        logs.append(log)
        optimizer = kind(name, parameters(name))
        note = functools.partial(_note, log)
        handles = [
            ss.optim.register_optimizer_step_pre_hook(note("global pre")),
            ss.optim.register_optimizer_step_post_hook(note("global post")),
            optimizer.register_step_pre_hook(note("pre")),
            optimizer.register_step_post_hook(note("post")),
            optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], lambda: 5.0), kwargs)),
            optimizer.register_state_dict_pre_hook(note("save")),
            optimizer.register_state_dict_pre_hook(note("save first"), prepend=True),
            optimizer.register_state_dict_post_hook(note("saved")),
            optimizer.register_state_dict_post_hook(note("saved first"), prepend=True),
            optimizer.register_load_state_dict_pre_hook(note("load")),
            optimizer.register_load_state_dict_pre_hook(note("load first"), prepend=True),
            optimizer.register_load_state_dict_post_hook(note("loaded")),
            optimizer.register_load_state_dict_post_hook(note("loaded first"), prepend=True),
        ]
        set_gradients(owned(optimizer), 0)
        log.append(optimizer.step(lambda: 1.0))
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        optimizer.step()
        optimizer.state_dict()
    assert logs[0] == logs[1]
    assert logs[0][:5] == ["global pre", "pre", "post", "global post", 5.0]
    assert len(logs[0]) == 13


def _note(log: list[Any], text: str) -> Callable[..., None]:
    return lambda *_: log.append(text)
