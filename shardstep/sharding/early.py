"""Updates in the backward pass (``shard(update_in_backward=True)``): of which spaces, and when.

In the last micro-batch of a step a space is updated as soon as its sum of gradients is whole here and backward is done
with its unit, and the sum's memory is given back; so the sums of all units are never held together. step() updates the
rest, publishes and ends the step. This room decides; `Step` updates, `Gradients` and `Hooks` tell what has happened.

[Note: the numbers are those of step()] An update needs the sum over all leaves, their number, and which parameters any
rank has touched. Each rank announces with a backward pass how many it has made and whether this is the step's last;
the sum is whole when every rank's leaf of that pass is in it. A parameter is updated if any rank has touched it, and
where this rank has touched all of a space there is nothing to ask the others for, whatever they have touched: so each
rank decides for itself whether it updates its shard now or in step(), and nothing is sent for it. What does send in an
update must do so in one order on all ranks, and waits for step(): rules that look at whole tensors, and stage 0 on
several ranks. So do the root, and the first unit with trained parameters: their sums are whole at the end only.

[Note: nobody misses the old values]
*This rank*: all gradients of the space have arrived, and backward is done with its unit (the note in `calls`). A unit
that ran more than once since the last backward pass, or lent its parameters to another one, waits for step(). What no
hook sees below stage 3, a use without gradients outside the unit, autograd refuses: the parameters' versions go up.
*The others* read shards at stage 3 only; at stages 1 and 2 new values are published in step(), when all have finished.
A rank takes a shard before it runs a unit backward, and sends its leaf of the unit when all gradients of it have
arrived, or at the end of the pass: when its leaf is here, it takes the shard no more, unless it needs the unit twice.
Whoever may do so refuses the space in the announcement of the pass, and so does whoever keeps the graph for another
pass; what one rank refuses, none updates. If a unit is needed again all the same, after its leaf was sent, that raises
where it is needed, since peers may have new values already; and such units are not gathered ahead.
*Afterwards* some parameters are new and others old until step(): nothing else may follow, nor can the step be left out.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Protocol

from torch import Tensor
from torch.autograd.graph import increment_version

from shardstep.errors import ConfigError, SequenceError
from shardstep.optim import Combined, Optimizer
from shardstep.sharding.agreement import Act, Agreement, sentence_of
from shardstep.sharding.space import Space


class Updater(Protocol):
    """Who updates."""

    def is_computable(self) -> bool: ...

    def update(self, space: Space) -> None: ...


class EarlyUpdates:
    """Those of one model."""

    def __init__(
        self, updater: Updater, optimizer: Optimizer | Combined, agreement: Agreement, world_size: int
    ) -> None:
        self._updater, self._optimizer, self._agreement, self._size = updater, optimizer, agreement, world_size
        agreement.check = lambda act: self.check(sentence_of(act), is_step=act is Act.STEP)
        self._step = 0
        self._places: dict[int, int] = {}
        """By the tag of each space its place among the flags of the pass."""
        self._refused: list[bool] = []
        self._rules: dict[int, int] = {}
        self._whole: dict[int, Space] = {}
        """Spaces whose sums are whole, and that backward is not done with."""
        self._done: set[int] = set()
        self._given: set[int] = set()
        """The tags of spaces whose last leaf this rank has sent, so that peers may have updated theirs."""
        self._in_pass = False
        self._hypers: list[dict[str, Any]] | None = None
        """The hyper-parameters that the first update of this step was made with."""

    # - a backward pass

    def begin(self, spaces: Sequence[Space], repeated: Set[int], step: int, *, last: bool) -> list[bool]:
        """For each of the spaces whether this rank refuses to have it updated in the pass that begins.

        ``repeated``: the tags of those that backward may need again after all their gradients have arrived; ``last``:
        whether it is the step's last pass.
        """
        self.check("begins another backward pass")
        able = self._able(spaces) if last and not any(space.held or space.exchanged for space in spaces) else set()
        self._places = {space.tag: place for place, space in enumerate(spaces)}
        self._refused = [space.tag not in able or space.tag in repeated for space in spaces]
        self._step, self._in_pass, self._hypers = step, True, None
        return self._refused

    def _able(self, spaces: Sequence[Space]) -> set[int]:
        """The tags of the spaces whose updates need nothing but their own sums; the same on every rank."""
        rules = self._optimizer.elementwise
        units = [space.unit_name for space in spaces if space.unit_name]
        return {
            space.tag
            for space in spaces
            if space.unit_name not in ("", *units[:1])
            and (space.stage.shard_state or self._size == 1)
            and self._rule_of(space) in rules
        }

    def _rule_of(self, space: Space) -> int:
        if space.tag not in self._rules:
            self._rules[space.tag] = self._optimizer.rule_of(space.parameters[0])
        return self._rules[space.tag]

    def give(self, space: Space) -> None:
        """This rank sends its last leaf of a space, if this is the step's last pass."""
        if self._in_pass and not self._refused[self._places[space.tag]]:
            self._given.add(space.tag)

    def landed(self, space: Space) -> None:
        """The sum of a space is whole, if this is the step's last pass."""
        if self._is_allowed(space.tag) and len(space.leaves.touched) == len(space.parameters):
            self._whole[space.tag] = space
            self._update([space])

    def done(self, spaces: Iterable[Space]) -> None:
        """Backward is done with the unit of these spaces."""
        self._done.update(space.tag for space in spaces)
        self._update([space for space in spaces if space.tag in self._whole])

    def end(self) -> None:
        """The pass is over."""
        self._in_pass = False
        self._given = {tag for tag in self._given if self._is_allowed(tag)}
        self._whole.clear()
        self._done.clear()

    def forget(self) -> None:
        """The step is made, or given up before anything of it was."""
        self._in_pass, self._hypers = False, None
        for tags in (self._given, self._whole, self._done):
            tags.clear()

    def _is_allowed(self, tag: int) -> bool:
        """Whether no rank refuses it; known once the pass was agreed on, which is before any sum is whole."""
        return tag in self._given and not self._agreement.flags_of(Act.BACKWARD, self._refused)[self._places[tag]]

    def _update(self, spaces: Iterable[Space]) -> None:
        for space in [space for space in spaces if space.tag in self._done]:
            del self._whole[space.tag]
            if self._hypers is None:
                if not self._updater.is_computable():
                    continue  # step() says why, before it has changed anything
                self._hypers = _hypers(self._optimizer.param_groups)
            self._updater.update(space)
            space.leaves.updated = True
            increment_version(space.parameters)

    # - what may not follow

    def is_given(self, spaces: Iterable[Space]) -> bool:
        """Whether peers may have updated any of these already."""
        return any(space.tag in self._given for space in spaces)

    def check_use(self, spaces: Sequence[Space]) -> None:
        """Raise a SequenceError if backward needs the old values of these after they were let go."""
        for space in spaces:
            if space.leaves.updated or (space.tag in self._given and not space.is_whole):
                raise SequenceError(
                    f"expected backward to be done with {space.where} when all its gradients had arrived, but it is "
                    f"used again in the same pass, after it was updated; train this model without update_in_backward"
                )

    def check(self, sentence: str, *, is_step: bool = False) -> None:
        """Raise a SequenceError if what this rank does has no meaning since updates of this step began."""
        if not self._given or (is_step and not self._in_pass):
            return
        if self._in_pass:
            raise SequenceError(
                f"backward() of step {self._step} was left by an exception when units were updated in it already, "
                f"and now this rank {sentence}: some parameters are those before the step and others those after it, "
                f"which cannot be undone; build the model anew and load a checkpoint"
            )
        raise SequenceError(
            f"expected optimizer.step() after the last backward() of step {self._step}, which has updated units, but "
            f"this rank {sentence}; a step cannot be left out with update_in_backward, and the number of micro-batches "
            f"in a step is what sharded.micro_batches or sharded.expect() says"
        )

    def check_hypers(self) -> None:
        """Raise a SequenceError if hyper-parameters are others than those of the updates that were made already."""
        for index, now in enumerate(_hypers(self._optimizer.param_groups)):
            before = now if self._hypers is None else self._hypers[index]
            if now != before:
                names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
                raise SequenceError(
                    f"expected the hyper-parameters of group {index} to stay what they were in the last backward() of "
                    f"step {self._step}, which has updated units, but {names} are others in optimizer.step(); change "
                    f"them after it, as schedulers do"
                )


def check_possible(optimizer: Optimizer | Combined, clip_norm: float | None, loss_scale: object) -> None:
    """Raise a ConfigError for what ``update_in_backward`` cannot be combined with."""
    needs = {
        f"clip_norm={clip_norm!r}, which needs the norm over all gradients": clip_norm is not None,
        "an optimizer that clips by the norm over all gradients": optimizer.clip is not None,
        "a loss scale, which needs to know of every overflow": loss_scale is not None,
        f"{type(optimizer).__name__}, no rule of which updates single elements by itself": not optimizer.elementwise,
    }
    for reason in (reason for reason, given in needs.items() if given):
        raise ConfigError(
            f"expected update_in_backward=True only where a unit can be updated before all gradients are there, got "
            f"{reason}; leave one out"
        )


def _hypers(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All that groups hold beside their parameters; tensors by value."""
    return [
        {name: _by_value(value) for name, value in group.items() if name not in ("params", "param_names")}
        for group in groups
    ]


def _by_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return tuple(map(_by_value, value)) if isinstance(value, list | tuple) else value
