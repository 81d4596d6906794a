"""Models built under partitioned(): the values of ordinary construction, and never more than a module whole."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardstep as ss
from shardstep.sharding.cut import CutParameter
from tests.conftest import RankFailed
from tests.sharding.models import BF16, train, two_groups

WIDTH = 40


class Half(nn.Module):
    """A module in a block, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) @ self.own)


class Block(nn.Module):
    """Reads its parts while it is built, replaces one, and throws one away."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Half(), Half()
        nn.Linear(WIDTH, 70)
        self.scale = nn.Parameter(self.first.own.norm(dim=0) + torch.rand(WIDTH))
        with torch.no_grad():
            self.second.own.copy_(self.first.own.t()).mul_(0.5)
        self.first.inner.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * self.second.inner.weight.detach().std())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.scale)


class Model(nn.Module):
    """A language model with what constructors do: ties, apply(), clones, initialisers, writes through .data."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.position = nn.Parameter(torch.zeros(60, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.blocks.append(copy.deepcopy(self.blocks[0]))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.table = nn.Parameter(torch.linspace(0, 1, 1600).view(WIDTH, WIDTH).t(), requires_grad=False)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight
        self.apply(self._initialise)
        nn.init.trunc_normal_(self.position, std=0.1)
        kept = self.blocks[1].first.own.data
        self.blocks[0].first.own.data.normal_(std=0.1)
        kept.mul_(0.25)
        assert torch.equal(kept, self.blocks[1].first.own)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.2)
            with torch.no_grad():
                module.weight[3].zero_()
        elif isinstance(module, nn.Linear) and not hasattr(module, "parametrizations"):
            nn.init.orthogonal_(module.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1]) + self.position[:8]
        for block in self.blocks:
            x = x + block(x)
        x = self.normed(x) @ self.table
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), tokens[:, 1:].flatten())


def built(seed: int = 1) -> Model:
    torch.manual_seed(seed)
    return Model()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def partitioned_values(options: dict[str, Any], seeds: list[int]) -> tuple[dict[str, Tensor], list[str], list[int]]:
    """Whole values after shard(), what stayed whole before it, and which elements this rank had then."""
    rank = torch.distributed.get_rank()
    with ss.partitioned():
        model = built(seeds[rank])
    whole = [name for name, p in model.named_parameters() if not isinstance(p, CutParameter)]
    kept = sum(p.shardstep_cut.run.numel() for p in model.parameters() if isinstance(p, CutParameter))
    ss.shard(model, ss.optim.AdamW(two_groups(model), lr=1e-2), **options)
    with ss.gathered(model):
        return values(model), whole, kept


SMALL = sorted(name for name, parameter in built().named_parameters() if parameter.numel() < 1024)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("seeds", [[1, 1, 1, 1], [1, 7, 8, 9]], ids=["same seed", "other seeds"])
@pytest.mark.parametrize("options", [{}, {"stage": 1}, {"units": [Half], "prefetch": 0}], ids=["3", "1", "units"])
def test_the_values_are_those_of_ordinary_construction(ranks, world_size, seeds, options):
    wanted = values(built())
    big = sum(value.nbytes for name, value in wanted.items() if name not in SMALL)
    for found, whole, kept in ranks(world_size).run(partitioned_values, options, seeds):
        assert [name for name, value in found.items() if not torch.equal(value, wanted[name])] == []
        assert sorted(whole) == SMALL
        assert abs(kept - big / world_size) < 4 * world_size * len(wanted)


class Tokens:
    """A map-style dataset of token windows."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(50, (9,), generator=torch.Generator().manual_seed(index))


def partitioned_model() -> Model:
    with ss.partitioned():
        return Model()


def digests(runs: list[dict[str, Any]]) -> list[str]:
    return [ss.digest(*train(partitioned_model, Tokens(), **run)[:2]) for run in runs]


def test_training_goes_on_with_the_bits_of_ordinary_construction(ranks):
    runs: list[dict[str, Any]] = [{}, {"stage": {"blocks.*": 3, "": 1}, "clip_norm": 0.1}, {"precision": BF16}]
    wanted = [ss.digest(*train(Model, Tokens(), **run)[:2]) for run in runs]
    for world_size in (1, 2, 4):
        assert ranks(world_size).run(digests, runs) == [wanted] * world_size


class Wide(nn.Sequential):
    """Ten blocks of one size, none of which may stay whole while the next ones are built."""

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(10)))
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)


def most_held_whole() -> int:
    """The most bytes of parameters that a rank held at once, looked at whenever any is made or initialised."""
    most, made = 0, []

    def note(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal most
        if parameter is not None:
            made.append(parameter)
        runs = [p.shardstep_cut.run.nbytes for p in made if isinstance(p, CutParameter)]
        most = max(most, sum(runs) + sum(p.untyped_storage().nbytes() for p in made))

    hook = nn.modules.module.register_module_parameter_registration_hook(note)
    seen = nn.init.normal_
    try:
        with ss.partitioned():
            nn.init.normal_ = lambda tensor, **options: (seen(tensor, **options), note(nn.Module(), "", None))[0]
            Wide()
    finally:
        nn.init.normal_ = seen
        hook.remove()
    return most


def test_a_rank_holds_its_runs_and_one_module(ranks):
    one = 4 * (64 * 64 + 64)
    small = 10 * 4 * 64
    for most in ranks(2).run(most_held_whole):
        assert 5 * 4 * 64 * 64 < most <= 5 * one + small + 2 * one


class Fails(nn.Module):
    """Raises when part of it has been cut."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        raise ValueError("no")


def left_behind() -> list[Any]:
    with pytest.raises(ValueError, match="no"), ss.partitioned():
        Fails()
    hooks = nn.modules.module
    found = [dict(hooks._global_parameter_registration_hooks), dict(hooks._global_module_registration_hooks)]
    found += [CutParameter.builder]
    with ss.partitioned():
        after = nn.Sequential(nn.Linear(64, 64))
    return [*found, type(after[0].weight).__name__, type(nn.Sequential(nn.Linear(64, 64))[0].weight).__name__]


def test_an_exception_leaves_nothing_behind(ranks):
    assert ranks(2).run(left_behind) == [[{}, {}, None, "CutParameter", "Parameter"]] * 2


def several() -> list[Any]:
    """Two models in one block, one thrown away, one sharded inside, and a second block for the first."""
    torch.manual_seed(1)
    with ss.partitioned():
        one, other, _ = nn.Sequential(nn.Linear(40, 40)), nn.Sequential(nn.Linear(40, 40)), nn.Linear(99, 99)
        with torch.no_grad():
            other[0].weight.copy_(one[0].weight)
        one.double()
        ss.shard(other, ss.optim.AdamW(other.parameters()))
    with ss.partitioned():
        copied = copy.deepcopy(one)
        same = torch.equal(one[0].weight, copied[0].weight)
        one[0].weight.data.mul_(2)
    kinds = [type(model[0].weight).__name__ for model in (one, other, copied)]
    ss.shard(one, ss.optim.AdamW(one.parameters()), stage=2)
    with ss.gathered(other):
        doubled = torch.equal(one[0].weight, 2 * other[0].weight.double())
    return [same, kinds, doubled]


def test_several_models_in_one_block(ranks):
    kinds = ["CutParameter", "FreedParameter", "CutParameter"]
    assert ranks(2).run(several) == [[True, kinds, True]] * 2


def same_as_ordinary(make: Callable[[], nn.Module]) -> list[str]:
    torch.manual_seed(1)
    with ss.partitioned():
        model = make()
        found = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    return [name for name, value in make().state_dict().items() if not torch.equal(value, found[name])]


def transformer() -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 64)


def recurrent() -> nn.Module:
    return nn.Sequential(nn.LSTM(40, 40, 2), nn.utils.parametrizations.orthogonal(nn.Linear(40, 40)))


def frozen_views() -> nn.Module:
    """Parameters that are views of one tensor, one that numpy owns, and one in another memory format."""
    shared = torch.randn(2, 64, 64)
    owned = nn.Parameter(torch.from_numpy(shared.numpy().copy()), requires_grad=False)
    last = nn.Conv2d(32, 32, 3).to(memory_format=torch.channels_last)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    first.weight, second.weight = nn.Parameter(shared[0]), nn.Parameter(shared[1])
    model = nn.Sequential(first, second, last)
    model.register_parameter("owned", owned)
    return model


@pytest.mark.parametrize("make", [transformer, recurrent, frozen_views])
def test_modules_of_torch_are_built_as_they_are(ranks, make):
    assert ranks(2).run(same_as_ordinary, make) == [[], []]


def misused() -> list[str]:
    with ss.partitioned():
        model = nn.Sequential(nn.Linear(64, 64))
        with pytest.raises(ss.SequenceError) as nested, ss.partitioned():
            pass
    with pytest.raises(ss.FreedParameterError) as read:
        model(torch.zeros(1, 64))
    return [str(nested.value), str(read.value), repr(model[0].weight)]


def test_misuse_says_what_to_do(ranks):
    for nested, read, shown in ranks(2).run(misused):
        assert nested == "expected one 'with shardstep.partitioned():' at a time, got one inside another"
        assert read.startswith("linear needs the values of a parameter of shape (64, 64) of a model that was built")
        assert read.endswith("call shard(model, optimizer) first, or do it on every rank inside another "
                             "'with shardstep.partitioned():'")  # fmt: skip
        assert shown == "Parameter of shape (64, 64), torch.float32, cut over 2 ranks while its model is built"


def built_differently() -> None:
    with ss.partitioned():
        nn.Sequential(nn.Linear(64, 64 + torch.distributed.get_rank()))


def test_ranks_that_build_different_models_are_named(ranks):
    with pytest.raises(RankFailed) as failed:
        ranks(2).run(built_differently)
    for name, text in failed.value.failures:
        assert name == "RankMismatchError"
        assert "rank 1 cuts parameters of [[65, 64, 'torch.float32']] while rank 0 cuts parameters of [[64, 64" in text


def test_below_stage_3_nothing_is_cut():
    with ss.partitioned(stage=2):
        assert type(nn.Sequential(nn.Linear(64, 64))[0].weight) is nn.Parameter
    with pytest.raises(ss.ConfigError, match=r"expected a stage of 0, 1, 2 or 3 for partitioned\(\), got 4"):
        ss.partitioned(stage=4).__enter__()
