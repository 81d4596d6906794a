"""What a caller may choose: stages, precision, schedule. Checks the choice and says what is wrong with it.

Plain data only: nothing here knows modules' contents, ranks or optimizers.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from shardstep.errors import ConfigError

StageChoice = int | Mapping[str, int] | Callable[[str, nn.Module], int]
UnitChoice = Iterable[str | type[nn.Module]] | Callable[[str, nn.Module], bool]
Schedule = Literal["per leaf", "per step"]
Rounding = Literal["stochastic", "nearest"]

SCHEDULES: tuple[Schedule, ...] = ("per leaf", "per step")
ROUNDINGS: tuple[Rounding, ...] = ("stochastic", "nearest")
_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Stage:
    """What a unit shards. Stage 0 shards nothing; 1 the state; 2 also gradients; 3 also parameters."""

    shard_state: bool
    shard_grads: bool
    shard_params: bool

    @classmethod
    def numbered(cls, number: int, where: str) -> "Stage":
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= 3:
            raise ConfigError(f"expected a stage of 0, 1, 2 or 3 for {where}, got {number!r}")
        return cls(number >= 1, number >= 2, number >= 3)

    @property
    def number(self) -> int:
        return self.shard_state + self.shard_grads + self.shard_params


@dataclass(frozen=True)
class Precision:
    """The dtypes of a step.

    ``params``: what forward and backward compute in, and what is gathered. ``reduce``: what leaves travel in.
    ``master``: what the update rule reads and writes; beside narrower ``params`` it is kept as optimizer state.
    ``accumulate``: what leaves are summed in; by default the master's dtype, or float32 where that is narrower.
    Without a wider master, ``master`` is the dtype of ``params``, bfloat16 or float16; the rule still computes in
    float32 and keeps its states so, and ``rounding`` says how its result becomes a parameter: 'stochastic', with noise
    that is a function of ``seed``, the step and the place, or to the 'nearest', which loses small updates.
    """

    params: torch.dtype
    reduce: torch.dtype
    master: torch.dtype = torch.float32
    accumulate: torch.dtype | None = None
    rounding: Rounding | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("params", "reduce", "master", "accumulate"):
            dtype = getattr(self, field)
            if field == "accumulate" and dtype is None:
                continue
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise ConfigError(f"expected a floating-point torch.dtype for Precision.{field}, got {dtype!r}")
        self._check_master()
        if self.sums != self.reduce and self.sums.itemsize <= self.reduce.itemsize:
            raise ConfigError(
                f"expected Precision.accumulate to be reduce's dtype or a wider one, got reduce={self.reduce}, "
                f"accumulate={self.sums}; leaves are widened when they are summed, and never rounded"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"expected Precision.seed to be an integer, got {self.seed!r}")

    def _check_master(self) -> None:
        if self.master not in _LOW:
            if self.master.itemsize < max(self.params.itemsize, self.reduce.itemsize):
                raise ConfigError(
                    f"expected Precision.master to be no narrower than params and reduce, got params={self.params}, "
                    f"reduce={self.reduce}, master={self.master}"
                )
            if self.rounding is not None:
                raise ConfigError(
                    f"expected Precision.rounding for parameters without a wider master only, got {self.rounding!r} "
                    f"with master={self.master}; leave it out, or set master to {self.params}"
                )
            return
        if self.master != self.params:
            raise ConfigError(
                f"expected Precision.master to be torch.float32 or wider, or the dtype of params for parameters "
                f"without a master, got params={self.params}, master={self.master}"
            )
        if self.rounding not in ROUNDINGS:
            raise ConfigError(
                f"expected Precision.rounding to be one of {ROUNDINGS} for parameters in {self.params} without a wider "
                f"master, got {self.rounding!r}; choose 'stochastic', or give master=torch.float32"
            )

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Precision":
        """The precision of parameters that are taken as they are; low ones get a float32 master."""
        return cls(dtype, dtype, torch.float32 if dtype in _LOW else dtype)

    @property
    def compute(self) -> torch.dtype:
        """What the rule computes in, and keeps states in that are declared without a dtype."""
        return torch.float32 if self.master in _LOW else self.master

    @property
    def sums(self) -> torch.dtype:
        """What leaves are summed in."""
        return self.compute if self.accumulate is None else self.accumulate


PrecisionChoice = Precision | Mapping[str, Precision] | Callable[[str, nn.Module], Precision | None] | None


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name matches a pattern part by part ('blocks.*' has two); '*' alone matches every name."""
    parts, patterns = name.split("."), pattern.split(".")
    return pattern == "*" or (len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns)))


def resolve_stage(stage: StageChoice, name: str, module: nn.Module) -> Stage:
    """The stage of the unit ``name``. The first pattern of a mapping that matches the name decides."""
    where = f"unit {name!r}"
    if isinstance(stage, Mapping):
        for pattern, number in stage.items():
            if matches(name, pattern):
                return Stage.numbered(number, where)
        raise ConfigError(
            f"expected a stage for {where}, but none of the patterns {list(stage)} matches that name; "
            f"add a pattern for it ('*' matches every unit, '' is the root unit)"
        )
    return Stage.numbered(stage(name, module) if callable(stage) else stage, where)


def checked_schedule(schedule: str | None, stages: Mapping[str, Stage], overlap_grad_reduce: bool) -> Schedule:
    """The schedule to use; ``None`` is per leaf, which every stage and every number of leaves allows."""
    if not overlap_grad_reduce and schedule != "per step":
        raise ConfigError(
            f"expected schedule='per step' with overlap_grad_reduce=False, got schedule={schedule!r}: gradients that "
            f"stay where they are until optimizer.step() must be added up there"
        )
    if schedule is None or schedule == "per leaf":
        return "per leaf"
    if schedule != "per step":
        raise ConfigError(f"expected schedule to be one of {SCHEDULES} or None, got {schedule!r}")
    for name, stage in stages.items():
        if stage.shard_grads:
            raise ConfigError(
                f"expected every unit at stage 0 or 1 for schedule='per step' (it sums whole gradients locally), "
                f"but unit {name!r} is at stage {stage.number}; use schedule='per leaf' or another stage"
            )
    return "per step"
