"""The table of optimizers that drives the tests of all of them: a new one joins by a row."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch import optim as torch_optim

from shardstep import optim, shard
from shardstep.errors import ConfigError
from shardstep.rules.compiled import compile_rule
from tests.optim import papers

Hypers = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One optimizer.

    ``configs``: hyper-parameters by a word for them. ``torch``: torch's class; ``paper``: the equations where torch has
    none. ``rates``: the lr that finds the minimum of a quadratic, of Rosenbrock's function, and learns digits;
    ``hyper``: what else it needs there. ``build``: what makes it for all parameters of a model, if not the class.
    """

    kind: type[optim.Optimizer]
    rates: tuple[float, float, float]
    configs: dict[str, Hypers]
    torch: type[torch_optim.Optimizer] | None = None
    paper: Callable[..., Tensor] | None = None
    hyper: Hypers | None = None
    build: Callable[..., torch_optim.Optimizer] | None = None

    def optimizer(self, params: Iterable[nn.Parameter], **hyper: Any) -> Any:
        """One for all parameters of a model."""
        return (self.build or self.kind)(params, **hyper)

    @property
    def name(self) -> str:
        return self.kind.__name__

    @property
    def shards(self) -> bool:
        """Whether shard() takes it."""
        model = nn.Linear(2, 2)
        try:
            shard(model, self.optimizer(model.parameters()))
        except ConfigError:
            return False
        return True

    @property
    def has_single_numbers(self) -> bool:
        """Whether it has states of one number for each tensor, which torch keeps in float32."""
        return any(state.shape == "tensor" for state in self.kind.rule.declared)

    @property
    def locality(self) -> str:
        return compile_rule(self.kind.rule).locality


def muon_for_matrices(params: Iterable[nn.Parameter], **hyper: Any) -> torch_optim.Optimizer:
    """And AdamW for the rest, if there is any."""
    given = list(params)
    matrices, rest = ([p for p in given if (p.ndim == 2) == which] for which in (True, False))
    muon = optim.Muon(matrices, **hyper)
    return optim.Combined(muon, optim.AdamW(rest, lr=0.01)) if rest else muon


ROWS = (
    Row(
        optim.SGD,
        (0.05, 1e-3, 0.3),
        {
            "plain": {"lr": 0.1},
            "momentum": {"lr": 0.1, "momentum": 0.9},
            "dampened": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.05},
            "maximizing": {"lr": 0.1, "momentum": 0.8, "maximize": True},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        },
        torch=torch_optim.SGD,
        hyper={"momentum": 0.9},
    ),
    Row(
        optim.ASGD,
        (0.1, 2e-3, 0.5),
        {
            "plain": {"lr": 0.1},
            "averaging": {"lr": 0.1, "lambd": 0.01, "t0": 5, "alpha": 0.5, "weight_decay": 0.05},
        },
        torch=torch_optim.ASGD,
    ),
    Row(
        optim.Adam,
        (0.3, 0.05, 0.01),
        {
            "plain": {"lr": 0.01},
            "loss decay": {"lr": 0.01, "weight_decay": 0.1},
            "decoupled": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
            "small betas": {"lr": 0.01, "betas": (0.3, 0.9), "eps": 1e-3},
            "amsgrad": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
        },
        torch=torch_optim.Adam,
    ),
    Row(
        optim.AdamW,
        (0.3, 0.05, 0.01),
        {"plain": {"lr": 0.01}, "amsgrad": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}},
        torch=torch_optim.AdamW,
    ),
    Row(
        optim.Adamax,
        (0.3, 0.2, 0.01),
        {"plain": {"lr": 0.01}, "decaying": {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}},
        torch=torch_optim.Adamax,
    ),
    Row(
        optim.NAdam,
        (0.3, 0.05, 0.01),
        {
            "plain": {"lr": 0.01},
            "decaying": {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.01},
            "decoupled": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
        },
        torch=torch_optim.NAdam,
    ),
    Row(
        optim.RAdam,
        (0.3, 5e-3, 0.01),
        {
            "plain": {"lr": 0.01},
            "decaying": {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)},
            "decoupled": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
        },
        torch=torch_optim.RAdam,
    ),
    Row(
        optim.Adagrad,
        (1.0, 1.0, 0.05),
        {
            "plain": {"lr": 0.1},
            "decaying": {"lr": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.1, "weight_decay": 0.1},
        },
        torch=torch_optim.Adagrad,
    ),
    Row(
        optim.Adadelta,
        (50.0, 5.0, 2.0),
        {"plain": {"lr": 1.0}, "decaying": {"lr": 0.5, "rho": 0.5, "weight_decay": 0.1}},
        torch=torch_optim.Adadelta,
    ),
    Row(
        optim.RMSprop,
        (0.03, 0.01, 3e-3),
        {
            "plain": {"lr": 0.01},
            "momentum": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
            "centered": {"lr": 0.01, "momentum": 0.5, "alpha": 0.9, "centered": True, "weight_decay": 0.1, "eps": 1e-3},
        },
        torch=torch_optim.RMSprop,
    ),
    Row(
        optim.Rprop,
        (0.1, 0.01, 1e-3),
        {"plain": {"lr": 0.01}, "bounded": {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (0.01, 0.2)}},
        torch=torch_optim.Rprop,
    ),
    Row(
        optim.Lion,
        (0.1, 0.01, 5e-3),
        {"plain": {"lr": 0.01}, "decaying": {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}},
        paper=papers.lion,
    ),
    Row(
        optim.LAMB,
        (0.05, 0.05, 0.02),
        {"plain": {"lr": 0.01}, "decaying": {"lr": 0.01, "weight_decay": 0.1}},
        paper=papers.lamb,
    ),
    Row(
        optim.Adafactor,
        (0.3, 0.05, 0.05),
        {"plain": {"lr": 0.05}, "decaying": {"lr": 0.1, "weight_decay": 0.1, "beta2_decay": -0.5, "d": 1.5}},
        torch=torch_optim.Adafactor,
    ),
    Row(
        optim.LARS,
        (1.0, 0.1, 0.5),
        {"plain": {"lr": 0.1}, "decaying": {"lr": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.01}},
        paper=papers.lars,
        hyper={"trust_coefficient": 0.02},
    ),
    Row(
        optim.Adan,
        (1.0, 0.05, 0.01),
        {"plain": {"lr": 0.01}, "decaying": {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.8, 0.95)}},
        paper=papers.adan,
    ),
    Row(
        optim.AdaBelief,
        (0.3, 0.05, 0.01),
        {"plain": {"lr": 0.01}, "decaying": {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-8}},
        paper=papers.adabelief,
    ),
    Row(
        optim.AdamWScheduleFree,
        (0.5, 0.1, 0.03),
        {"plain": {"lr": 0.01}, "warming up": {"lr": 0.01, "warmup_steps": 7, "r": 0.5, "weight_decay": 0.1}},
        paper=papers.schedule_free,
    ),
    Row(
        optim.Muon,
        (0.1, 0.01, 0.02),
        {"plain": {"lr": 0.01}, "decaying": {"lr": 0.02, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}},
        torch=torch_optim.Muon,
        hyper={"weight_decay": 0.0},
        build=muon_for_matrices,
    ),
)

CASES = [(row, word) for row in ROWS if row.locality != "matrix" for word in row.configs]
"""Without the rules of matrices: products have no bits of their own and are torch's within bfloat16 (test_muon.py)."""

CASE_NAMES = [f"{row.name} {word}" for row, word in CASES]
