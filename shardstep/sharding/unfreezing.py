"""Parameters that were frozen when the model was sharded, and are trained from some step on.

Their places are in the layout already, which does not change: their spaces gain what an update needs (gradients, a
master, state), and their gradients are awaited. A master begins with the stored values, so in low precision with what
rounding at `shard` has left of them.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from shardstep.collectives import Group
from shardstep.errors import ConfigError, OwnershipError, RankMismatchError, SequenceError
from shardstep.rules.ir import State
from shardstep.sharding.agreement import Act, Agreement
from shardstep.sharding.gradients import Gradients
from shardstep.sharding.hooks import Hooks
from shardstep.sharding.space import Space
from shardstep.sharding.states import make_states
from shardstep.sharding.unit import Unit


class Unfreezing:
    """Knows which parameters of a model are still frozen."""

    def __init__(
        self, units: list[Unit], gradients: Gradients, agreement: Agreement, hooks: Hooks, group: Group
    ) -> None:
        self._spaces = [space for unit in units for space in unit.spaces]
        self._gradients, self._agreement, self._hooks, self._group = gradients, agreement, hooks, group
        self._frozen = {
            id(parameter): (space, index)
            for space in self._spaces
            if not space.trained
            for index, parameter in enumerate(space.parameters)
        }

    def train(
        self,
        parameters: Sequence[nn.Parameter],
        states_of: Callable[[nn.Parameter], tuple[State, ...]],
        rule_of: Callable[[nn.Parameter], int],
    ) -> list[Space]:
        """Train these too; ``states_of``, ``rule_of``: those of a parameter. Returns all trained spaces.

        Collective. Raises a ConfigError, SequenceError or RankMismatchError before anything has changed.
        """
        self._check(parameters)
        found = [self._frozen[id(parameter)] for parameter in parameters]
        self._check_equal_on_all_ranks([space.layout.slots[index].name for space, index in found])
        for space, index in found:
            if not space.trained:
                space.train()
                self._agreement.flags += len(space.parameters)
            self._hooks.await_gradient(space, index)
            space.frozen.discard(index)
            del self._frozen[id(space.parameters[index])]
        trained = [space for space in self._spaces if space.trained]
        make_states(trained, states_of, rule_of, self._group.size)
        self._gradients.collect(trained)
        return trained

    def check_not_trained(self, owned: Mapping[int, int]) -> None:
        """Raise a SequenceError if a frozen parameter has got a gradient and the optimizer owns it."""
        for space, index in self._frozen.values():
            if id(space.parameters[index]) in owned and space.parameters[index].grad is not None:
                raise SequenceError(
                    f"expected {space.layout.slots[index].name!r} to stay frozen, as it was when shard() was called, "
                    f"got a gradient for it; leave it out of the optimizer, and give it to add_param_group() when it "
                    f"is to be trained"
                )

    def _check(self, parameters: Sequence[nn.Parameter]) -> None:
        known = {id(parameter) for space in self._spaces for parameter in space.parameters}
        for position, parameter in enumerate(parameters):
            if id(parameter) not in known:
                raise OwnershipError(
                    f"expected parameters that the model had when shard() was called, got another one of shape "
                    f"{tuple(parameter.shape)} at position {position} of the new group; build the model with it, and "
                    f"shard that"
                )
            if not parameter.requires_grad:
                raise ConfigError(
                    f"expected parameters with requires_grad=True to train after shard(), got position {position} of "
                    f"the new group without; call requires_grad_() on it before add_param_group()"
                )
        self._gradients.catch_up("add_param_group()")
        if self._gradients.leaves:
            raise SequenceError(
                f"expected add_param_group() between two steps, got it after {self._gradients.leaves} micro-batches of "
                f"step {self._gradients.step}; call it after optimizer.zero_grad()"
            )

    def _check_equal_on_all_ranks(self, own: list[str]) -> None:
        self._agreement.announce(Act.ADD_PARAMETERS, self._gradients.step, self._gradients.leaves)
        self._agreement.confirm()
        for rank, other in enumerate(self._group.exchange_json(own, label="comparison of added parameters")):
            if other != own:
                raise RankMismatchError(
                    f"expected every rank to add the same parameters, but rank {rank} adds {other} and rank "
                    f"{self._group.rank} adds {own}; call add_param_group() alike everywhere"
                )
