"""What `shard` returns: where a user asks how the model is sharded, what it costs, and for its micro-batches.

Nothing here changes what training computes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from shardstep.collectives import Group, Traffic
from shardstep.config import Schedule
from shardstep.errors import ConfigError
from shardstep.sharding.access import Access
from shardstep.sharding.batches import BatchPlan, Collate, MapDataset, MicroBatch, micro_batches
from shardstep.sharding.formula import Formula
from shardstep.sharding.gradients import Gradients
from shardstep.sharding.hooks import Hooks
from shardstep.sharding.memory import Bytes, Ledger
from shardstep.sharding.ranges import Ranges, ranges_of
from shardstep.sharding.step import Step
from shardstep.sharding.unit import Unit


@dataclass(frozen=True)
class ByteReport:
    """Bytes on this rank: at the peak so far, by the formula for the steps so far, and for one unsharded rank."""

    peak: Bytes
    formula: Bytes
    unsharded: Bytes


class Sharded:
    """The handle of a sharded model and its optimizer."""

    def __init__(
        self,
        units: list[Unit],
        group: Group,
        ledger: Ledger,
        gradients: Gradients,
        step: Step,
        formula: Callable[[int], Formula],
        seeds: list[nn.Parameter],
        hooks: Hooks,
        access: Access,
    ) -> None:
        self._seeds, self._hooks, self._access = seeds, hooks, access
        self._units, self._group, self._ledger = units, group, ledger
        self._gradients, self._step, self._formula = gradients, step, formula

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def world_size(self) -> int:
        return self._group.size

    @property
    def schedule(self) -> Schedule:
        """'per leaf' or 'per step'."""
        return self._gradients.schedule

    @property
    def stages(self) -> dict[str, int]:
        """The stage of each unit by its name, in declared order; '' is the root unit."""
        return {unit.name: unit.stage.number for unit in self._units}

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's mean gradient before clipping; None when nothing clips."""
        return self._step.grad_norm

    @property
    def skipped(self) -> int:
        """Steps left out so far because gradients overflowed under the loss's scale."""
        return self._step.skipped

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied by now; None without ``shard(loss_scale=...)``."""
        scaling = self._gradients.scaling
        return None if scaling is None else scaling.present

    @property
    def step_count(self) -> int:
        """Optimizer steps taken."""
        return self._gradients.step

    @property
    def traffic(self) -> Traffic:
        """Bytes sent, calls and seconds waited since shard(), counted at the one door."""
        return self._group.traffic

    def expect(self, micro_batches: int) -> None:
        """Say how many backward passes this rank makes in each step from now on, in a loop of one's own.

        Then the schedule 'per step' sends in the last one, and ``update_in_backward`` updates in it.
        ``sharded.micro_batches`` says so itself. One more pass raises then. Raises ConfigError for what is no positive
        integer.
        """
        if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
            raise ConfigError(f"expected a positive number of micro-batches in each step, got {micro_batches!r}")
        self._gradients.expect_always(micro_batches)

    def add_entry(self, name: str) -> None:
        """Let a method of the model be called as the model itself is: ``sharded.add_entry("encode")``.

        Modules of the model may be called by themselves without this. It is for methods that read parameters.
        """
        self._hooks.add_entry(name)

    def step_bytes(self, own_leaves: int = 1) -> int:
        """Bytes that this rank sends in a step of ``own_leaves`` micro-batches on each rank, by the formula."""
        return self._formula(own_leaves).traffic()

    @property
    def bytes(self) -> ByteReport:
        """Parameters, gradients and optimizer state (averages are counted with it) in the engine's own buffers."""
        formula = self._formula(max(1, self._gradients.most_leaves))
        return ByteReport(self._ledger.peak, formula.peak(), formula.unsharded().peak())

    def ranges(self, rank: int | None = None) -> Ranges:
        """Which part of each parameter ``rank`` owns (by default this one): print it, or iterate over it."""
        return ranges_of(self._units, self.rank if rank is None else rank, self.world_size)

    def full_param(self, name: str) -> Tensor:
        """The whole parameter of that name, a copy: its master, if it has one. Every rank calls it, as all of these."""
        return self._access.param(name)

    def full_grad(self, name: str) -> Tensor | None:
        """The mean of its gradients, after the step's last backward(); None if no rank has one.

        Without the loss's scale and before clipping, in float32 or what leaves are summed in. optimizer.step() or
        zero_grad() must follow before the next backward().
        """
        return self._access.grad(name)

    def full_state(self, name: str, state_name: str) -> Tensor:
        """A state that the optimizer keeps of it, such as 'exp_avg', or 'step'; one in 8 bits is decoded."""
        return self._access.state(name, state_name)

    def set_full_param(self, name: str, values: Tensor) -> None:
        """Replace it by rank 0's ``values``: its master, and the low-precision copy that is computed with."""
        self._access.set_param(name, values)

    def set_full_grad(self, name: str, values: Tensor) -> None:
        """Have the step that follows, and its norm, use rank 0's ``values`` as its mean gradient."""
        self._access.set_grad(name, values)

    def set_full_state(self, name: str, state_name: str, values: Tensor) -> None:
        """Replace a state of it by rank 0's ``values``."""
        self._access.set_state(name, state_name, values)

    def micro_batches(
        self,
        dataset: MapDataset,
        *,
        global_batch: int,
        micro_batch: int,
        seed: int,
        epochs: int = 1,
        start_step: int = 0,
        collate: Collate | None = None,
    ) -> Iterator[MicroBatch]:
        """This rank's micro-batches of ``global_batch`` samples a step, cut into ``micro_batch`` samples each.

        The dataset is shuffled by the seed, the last partial global batch of an epoch is dropped, and the random
        generators are seeded for each (seed, step, micro-batch), so nothing depends on the world size.
        """
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ConfigError(
                f"expected a map-style dataset, with a length and samples by number, got {type(dataset).__name__}; "
                f"give a loader's dataset, or run a loader in a loop of your own (README: With your own loader)"
            )
        plan = BatchPlan(len(dataset), global_batch, micro_batch, seed, self.rank, self.world_size, self.schedule)
        return micro_batches(
            dataset, plan, plan.steps(epochs, start_step), collate, self._gradients.expect, self._seeds
        )
