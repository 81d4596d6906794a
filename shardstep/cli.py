"""The command line: reads arguments, calls a room, prints. Decides nothing that a library user could not."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shardstep import rules_cli
from shardstep.demo import show
from shardstep.demo.run import Outcome, Recipe, read_corpus, train_rank
from shardstep.demo.same_bits import compare
from shardstep.errors import ConfigError, ShardstepError
from shardstep.launch import run_local

DIFFERENT_BITS, FAILED, INTERRUPTED = 1, 2, 130
SAMPLE_BYTES = 320


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except ShardstepError as error:
        print(f"shardstep: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("shardstep: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardstep", description="Sharded training whose numbers never depend on how it was sharded."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a small GPT on real text and prove that sharding changed no bit",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(command=_demo)
    demo.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    demo.add_argument("--stage", type=int, default=Recipe.stage, choices=range(4), help="what is sharded")
    demo.add_argument("--steps", type=int, default=Recipe.steps, help="update steps")
    demo.add_argument("--micro-batches", type=int, default=Recipe.micro_batches, help="in a step, over all ranks")
    demo.add_argument("--seed", type=int, default=Recipe.seed, help="of the model and of the order of the text")
    demo.add_argument("--precision", choices=("fp32", "bf16"), default=Recipe.precision, help="of the parameters")
    demo.add_argument("--text", metavar="PATH", type=Path, help="learn this file or folder, not the standard library")
    demo.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    rules_cli.add_commands(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    recipe = _recipe(arguments)
    _check(recipe, arguments.ranks)
    return _demo_as_json(recipe, arguments.ranks) if arguments.json else _demo_shown(recipe, arguments.ranks)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return Recipe(
        stage=arguments.stage,
        steps=arguments.steps,
        micro_batches=arguments.micro_batches,
        seed=arguments.seed,
        precision=arguments.precision,
        text=arguments.text,
        sample_bytes=0 if arguments.json else SAMPLE_BYTES,
    )


def _check(recipe: Recipe, ranks: int) -> None:
    """Say what is wrong here, before any rank starts, rather than once on each of them."""
    if ranks < 1:
        raise ConfigError(f"expected --ranks to be at least 1, got {ranks}")
    if recipe.micro_batches % ranks:
        raise ConfigError(
            f"expected --micro-batches to be a multiple of --ranks, got {recipe.micro_batches} micro-batches "
            f"for {ranks} ranks; each rank must take the same number"
        )
    read_corpus(recipe)


def _demo_as_json(recipe: Recipe, ranks: int) -> int:
    outcomes = [Outcome(**values) for values in run_local(train_rank, ranks, recipe)]
    print(json.dumps(json_summary(outcomes)))
    return 0


def _demo_shown(recipe: Recipe, ranks: int) -> int:
    console = Console()
    show.print_start(console, recipe, ranks)
    show.print_outcome(console, [Outcome(**values) for values in run_local(show.train_shown, ranks, recipe)])
    proof = compare(recipe, ranks)
    show.print_same_bits(console, proof)
    return 0 if proof.identical else DIFFERENT_BITS


def json_summary(outcomes: list[Outcome]) -> dict[str, int | float | str]:
    """The figures of a run; bytes are the fullest rank's, losses are on the held-out text."""
    first = outcomes[0]
    fullest = max(outcomes, key=lambda outcome: outcome.held_bytes)
    return {
        "world_size": first.world_size,
        "stage": first.stage,
        "params": first.params,
        "steps": first.steps,
        "loss_first": first.loss_first,
        "loss_last": first.loss_last,
        "sha256": first.sha256,
        "peak_bytes": fullest.bytes["peak"]["total"],
        "formula_bytes": fullest.bytes["formula"]["total"],
        "step_s_median": first.step_s_median,
    }
