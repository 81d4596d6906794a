"""Models on the meta device: made module by module, with the values of ordinary construction."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import shardstep as ss
from tests.sharding.models import Convolutions, Images, Tokens, train


class Plain(nn.Module):
    """Nothing but torch's modules, a table that reset_parameters() makes, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 40), nn.Tanh()) for _ in range(3))
        self.turn = Turn()
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.turn(self.embed(tokens[:, :-1]))
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


class Turn(nn.Module):
    """Writes a buffer that is not saved, and its child's weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(40, 40)
        self.register_buffer("table", torch.empty(40), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.table.copy_(torch.arange(40) / 40)
            self.inner.weight.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.table


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Plain()


def digests(runs: list[dict[str, Any]]) -> list[str]:
    return [ss.digest(*train(on_meta, Tokens(), **run)[:2]) for run in runs]


def test_the_bits_of_ordinary_construction(ranks):
    runs: list[dict[str, Any]] = [{"stage": 0}, {"stage": 1}, {"stage": 3}, {"stage": 3, "units": [nn.Linear]}]
    wanted = [ss.digest(*train(Plain, Tokens(), **run)[:2]) for run in runs]
    for world_size in (1, 2, 4):
        assert ranks(world_size).run(digests, runs) == [wanted] * world_size


def test_attributes_and_identity_stay():
    model = on_meta()
    weight = model.embed.weight
    weight.no_decay = True
    optimizer = ss.optim.AdamW(model.parameters())
    ss.shard(model, optimizer, stage=2)
    assert model.embed.weight is weight is model.head.weight is optimizer.param_groups[0]["params"][0]
    assert weight.no_decay
    assert type(weight) is nn.Parameter


def test_batch_norm_is_reset():
    def make() -> nn.Module:
        with torch.device("meta"):
            return Convolutions()

    found, wanted = (train(one, Images(), steps=1)[0].state_dict() for one in (make, Convolutions))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Forgets(nn.Module):
    """Fills its weight and not its table."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.register_buffer("table", torch.empty(4), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Bare(nn.Module):
    """Has no reset_parameters()."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            Bare,
            r"expected Bare '1' to have reset_parameters\(\), which fills what it has on the meta device \(weight\),",
        ),
        (
            Forgets,
            r"reset_parameters\(\) of Forgets '1' to fill all that it has on .* but it left 'table'",
        ),
        (
            lambda: nn.LSTM(4, 4),
            r"nothing to refer weakly to 'weight_ih_l0' of '1' .* build LSTM under",
        ),
    ],
)
def test_what_cannot_be_filled_is_named(make, sentence):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(ss.ConfigError, match=sentence):
        ss.shard(model, ss.optim.AdamW(model.parameters()))


def test_tables_that_no_file_has_are_named_too(tmp_path):
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = Forgets()
    with pytest.raises(ss.ConfigError, match=r"of Forgets '' to fill all .* left 'table' as it was"):
        ss.shard(model, ss.optim.AdamW(model.parameters()), weights=tmp_path)
