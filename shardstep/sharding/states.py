"""Optimizer state: how it begins, and its way between whole tensors, as state dicts have them, and what ranks own.

Collective, all of it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from shardstep.collectives import Group
from shardstep.rules.ir import State
from shardstep.sharding.ownership import places_by_rule
from shardstep.sharding.space import Space

States = Mapping[nn.Parameter, Mapping[str, Tensor]]


def make_states(
    spaces: Sequence[Space],
    states_of: Callable[[nn.Parameter], tuple[State, ...]],
    rule_of: Callable[[nn.Parameter], int],
    world_size: int,
) -> None:
    """Let all trained ``spaces`` have the states of their parameters; those that are there already stay."""
    described = [(rule_of(space.parameters[0]), space.layout, space.stage) for space in spaces]
    for space, places in zip(spaces, places_by_rule(described, world_size), strict=True):
        space.make_state([states_of(parameter) for parameter in space.parameters], places)


def gather_states(spaces: Sequence[Space]) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Every parameter's whole state in its own shape, on every rank, with its ``step``; none before it was updated."""
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for space in spaces:
        whole = {name: space.whole(run, f"state {name!r}") for name, run in space.state.items()}
        for slot, parameter, steps in zip(space.layout.slots, space.parameters, space.steps, strict=True):
            if steps:
                cut = {name: space.of_slot(slot, name, flat).clone() for name, flat in whole.items()}
                states[parameter] = {"step": torch.tensor(float(steps)), **cut}
        for declared in space.by_tensor.declared:
            for index, values in space.by_tensor.whole(declared, f"state {declared.name!r} of {space.where}"):
                if space.steps[index]:
                    states[space.parameters[index]][declared.name] = values
    return states


def scatter_states(spaces: Sequence[Space], state: States, group: Group) -> None:
    """Cut rank 0's whole states into what each rank owns; a parameter without one starts anew."""
    for space in spaces:
        steps = torch.tensor([int(state[p]["step"]) if p in state else 0 for p in space.parameters])
        steps = steps.to(space.master.device)
        group.broadcast(steps, label=f"broadcast of the step counts of {space.where}")
        space.steps = steps.tolist()
        space.set_states.clear()
        for declared in space.declared:
            space.start_state(declared)
        for name, run in space.state.items() if any(space.steps) else ():
            flat = _from_rank_0(space, name, state, group)
            run.copy_(flat[space.entries(name, space.owned.start, space.owned.stop)])
        for declared in space.by_tensor.declared:
            space.by_tensor.start(declared)
            if any(space.steps):
                found = ((index, state.get(p, {}).get(declared.name)) for index, p in enumerate(space.parameters))
                given = {index: values for index, values in found if values is not None}
                space.by_tensor.adopt(declared, given, f"broadcast of state {declared.name!r} of {space.where}")


def _from_rank_0(space: Space, name: str, state: States, group: Group) -> Tensor:
    """The whole flat space of a state; what rank 0 has no values for stays as it is."""
    flat = space.whole(space.state[name], f"state {name!r}").clone()
    for slot, parameter in zip(space.layout.slots, space.parameters, strict=True):
        if name in state.get(parameter, {}):  # groups may differ in which states they have
            space.of_slot(slot, name, flat).copy_(state[parameter][name])
    group.broadcast(flat, label=f"broadcast of state {name!r} of {space.where}")
    return flat
