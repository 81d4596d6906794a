"""Which modules are units, and that every parameter lies in exactly one of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shardstep.config import matches
from shardstep.errors import ConfigError
from shardstep.sharding.units import UnitPlan, plan_units
from tests.sharding.models import BF16, Convolutions, Tied


def planned(model: nn.Module, units=None, stage=3, precision=None) -> dict[str, UnitPlan]:
    return {plan.name: plan for plan in plan_units(model, units, stage, lambda _: precision, lambda _: 0)}


def names_in(plan: UnitPlan) -> list[str]:
    return [slot.name for space in plan.spaces for slot in space.layout.slots]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))


def deep(blocks: int = 2) -> nn.Module:
    """Blocks in a list, each with a list of blocks of its own, in a container with a head."""
    outer = [nn.Sequential(nn.Sequential(block(), block()), nn.LayerNorm(3)) for _ in range(blocks)]
    return nn.ModuleDict({"trunk": nn.ModuleDict({"layers": nn.ModuleList(outer)}), "head": nn.Linear(3, 2)})


def test_repeated_blocks_are_units_and_the_rest_is_the_root():
    plans = planned(Tied(blocks=3))
    assert list(plans) == ["", "blocks.0", "blocks.1", "blocks.2"]
    assert names_in(plans[""]) == ["embed.weight"]
    assert all(name.startswith("blocks.1.") for name in names_in(plans["blocks.1"]))


def test_the_outermost_repeated_blocks_are_units_and_inner_ones_are_not():
    assert list(planned(deep())) == ["", "trunk.layers.0", "trunk.layers.1"]


def test_blocks_in_several_containers():
    stages = [f"stages.{stage}.{number}" for stage in ("early", "late") for number in (0, 1)]
    assert list(planned(Convolutions())) == ["", *stages]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)),
        nn.Sequential(block(), nn.Linear(3, 3)),
        nn.ModuleList([block()]),
        nn.ModuleDict({"a": block(), "b": block()}),
        nn.Linear(3, 3),
    ],
    ids=["layers", "layers with an activation", "of different classes", "a single one", "not in a sequence", "a leaf"],
)
def test_what_are_no_repeated_blocks(model):
    assert list(planned(model)) == [""]


def test_blocks_without_parameters_between_blocks_do_not_matter():
    model = nn.Sequential(block(), nn.Dropout(), block())
    assert list(planned(model)) == ["", "0", "2"]


def test_a_parameter_belongs_to_the_innermost_unit():
    plans = planned(Tied(blocks=2), ["blocks.*", "blocks.*.up"])
    assert list(plans) == ["", "blocks.0", "blocks.0.up", "blocks.1", "blocks.1.up"]
    assert names_in(plans["blocks.0.up"]) == ["blocks.0.up.weight", "blocks.0.up.bias"]
    assert not [name for name in names_in(plans["blocks.0"]) if ".up." in name]


def test_a_parameter_tied_across_units_belongs_to_the_root():
    model = Tied(blocks=3)
    model.blocks[2].up.weight = model.blocks[0].up.weight
    assert names_in(planned(model)[""]) == ["embed.weight", "blocks.0.up.weight"]


def test_a_parameter_tied_within_a_unit_stays_there():
    model = Tied(blocks=2)
    model.blocks[0].sometimes.bias = model.blocks[0].down.bias = model.blocks[0].norm.bias
    assert names_in(planned(model)["blocks.0"]).count("blocks.0.norm.bias") == 1
    assert names_in(planned(model)[""]) == ["embed.weight"]


def test_a_parameter_tied_between_a_unit_and_the_root_belongs_to_the_root():
    model = Tied(width=15, blocks=2)
    model.blocks[1].sometimes.weight = model.blocks[1].up.weight
    model.extra = nn.Linear(15, 15)
    model.extra.weight = model.blocks[1].up.weight
    assert "blocks.1.up.weight" in names_in(planned(model)[""])


def test_a_unit_that_keeps_no_parameter_is_none():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    assert list(planned(model, ["a", "b"])) == [""]


def test_a_parameter_of_its_own_in_the_model_is_in_the_root():
    model = deep()
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    assert "scale" in names_in(planned(model)[""])


def test_units_by_class_by_function_by_one_pattern():
    assert list(planned(deep(), [nn.LayerNorm])) == ["", "trunk.layers.0.1", "trunk.layers.1.1"]
    assert list(planned(deep(), lambda name, module: name == "head")) == ["", "head"]
    assert list(planned(deep(), "head")) == ["", "head"]
    assert list(planned(deep(), ["head", nn.LayerNorm])) == ["", "trunk.layers.0.1", "trunk.layers.1.1", "head"]


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("blocks.0", "blocks.*", True),
        ("blocks.0.up", "blocks.*", False),
        ("blocks", "blocks.*", False),
        ("blocks.12", "blocks.?", False),
        ("blocks.1", "blocks.[01]", True),
        ("blocks.0.up", "*", True),
        ("", "*", True),
        ("", "", True),
        ("blocks", "", False),
        ("Blocks.0", "blocks.*", False),
    ],
)
def test_patterns_match_part_by_part(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_the_first_matching_pattern_gives_the_stage():
    plans = planned(Tied(blocks=3), stage={"blocks.1": 0, "blocks.*": 2, "*": 1})
    assert {name: plan.stage.number for name, plan in plans.items()} == {
        "": 1,
        "blocks.0": 2,
        "blocks.1": 0,
        "blocks.2": 2,
    }


def test_a_function_gives_the_stage_of_name_and_module():
    plans = planned(Tied(blocks=2), stage=lambda name, module: 0 if isinstance(module, Tied) else int(name[-1]) + 2)
    assert {name: plan.stage.number for name, plan in plans.items()} == {"": 0, "blocks.0": 2, "blocks.1": 3}


def test_spaces_split_trained_from_frozen_and_dtype_from_dtype():
    model = Tied(blocks=2)
    model.blocks[0].up.double()
    spaces = planned(model)["blocks.0"].spaces
    kinds = [(space.parameters[0].requires_grad, space.layout.dtype) for space in spaces]
    assert kinds == [(True, torch.float32), (True, torch.float64), (False, torch.float32)]
    assert names_in(planned(model)["blocks.0"])[-1] == "blocks.0.frozen"
    assert [space.layout.dtype for space in planned(model, precision=BF16)["blocks.0"].spaces] == [torch.bfloat16] * 2


def test_integer_parameters_are_refused_by_name():
    model = Tied(blocks=1)
    model.blocks[0].counts = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ConfigError, match=r"floating-point parameters, got torch.int64 for 'blocks.0.counts'"):
        planned(model)


@st.composite
def random_models(draw: st.DrawFn) -> nn.Module:
    """Nested containers of linear layers, some of which share a parameter, some of which are frozen."""

    def grow(depth: int) -> nn.Module:
        if depth == 0 or draw(st.booleans()):
            return nn.Linear(2, 2)
        return nn.Sequential(*(grow(depth - 1) for _ in range(draw(st.integers(1, 3)))))

    model = nn.Sequential(*(grow(3) for _ in range(draw(st.integers(1, 3)))))
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for _ in range(draw(st.integers(0, 3))):
        first, second = draw(st.sampled_from(layers)), draw(st.sampled_from(layers))
        second.weight = first.weight
    draw(st.sampled_from(layers)).bias.requires_grad_(draw(st.booleans()))
    return model


@given(random_models(), st.integers(0, 2**20))
def test_every_parameter_is_in_exactly_one_space_of_a_unit_around_all_its_uses(model, chosen):
    names = [name for name, _ in model.named_modules()]
    some = {name for bit, name in enumerate(names) if chosen >> bit & 1} or {""}
    plans = planned(model, lambda name, module: name in some)
    placed = [(slot.name, plan) for plan in plans.values() for slot in space_slots(plan)]
    assert sorted(name for name, _ in placed) == sorted(name for name, _ in model.named_parameters())
    uses = list(model.named_parameters(remove_duplicate=False))
    for name, plan in placed:
        parameter = model.get_parameter(name)
        around = [use.startswith(f"{plan.name}.") for use, other in uses if other is parameter]
        assert all(around) or plan.name == ""


def space_slots(plan: UnitPlan):
    return [slot for space in plan.spaces for slot in space.layout.slots]


def test_a_space_has_one_rule():
    """What two optimizers update lies apart, also if it is alike otherwise; frozen parameters have no rule."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).requires_grad_(False))
    (plan,) = plan_units(model, None, 3, lambda _: None, lambda parameter: parameter.ndim)
    assert [[slot.name for slot in space.layout.slots] for space in plan.spaces] == [
        ["0.weight"],
        ["0.bias"],
        ["1.weight", "1.bias"],
    ]
