"""What the demo shows a person: a bar while it trains, then losses, a sample, bytes and the same-bits line.

Only prints. Every figure comes from an outcome; the word *identical* comes from two digests.
"""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from shardstep.demo.run import Outcome, Recipe, StepReport, peak_rss_bytes, train
from shardstep.demo.same_bits import SameBits

_PARTS = {"parameters": "parameters", "gradients": "gradients", "state": "optimizer state", "total": "total"}


class StepBar:
    """A progress bar that appears with the first step it hears of."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("", total=recipe.steps)

    def __enter__(self) -> "StepBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, report: StepReport) -> None:
        tokens = self._recipe.global_batch * self._recipe.model.context
        figures = (
            f"loss {report.loss:.3f}",
            f"lr {report.lr:.1e}",
            f"{tokens / report.step_s:,.0f} tokens/s",
            f"{_megabytes(peak_rss_bytes())}/rank",
        )
        self._bar.start()
        self._bar.update(self._task, completed=report.step, description=" ".join(figures))
        if report.step == self._recipe.steps:
            self._bar.stop()


def train_shown(recipe: Recipe) -> dict[str, Any]:
    """Train on this rank, with a bar if it is rank 0."""
    with StepBar(recipe) as bar:
        return asdict(train(recipe, bar))


def print_start(console: Console, recipe: Recipe, ranks: int) -> None:
    source = "the Python standard library's source" if recipe.text is None else str(recipe.text)
    console.print(
        f"A byte-level GPT learns {source}: {ranks} rank{'s' * (ranks > 1)}, stage {recipe.stage}, "
        f"{recipe.precision}, {recipe.steps} steps of {recipe.micro_batches} micro-batches.",
        highlight=False,
    )


def print_outcome(console: Console, outcomes: list[Outcome]) -> None:
    first = outcomes[0]
    console.print(
        f"{first.params:,} parameters, median step {first.step_s_median:.2f} s; "
        f"validation loss {first.loss_first:.3f} → [bold]{first.loss_last:.3f}[/bold]",
        highlight=False,
    )
    console.print(Panel(Text(_printable(first.sample)), title="what it writes", title_align="left"))
    console.print(_table_of_bytes(outcomes))
    rss = max(outcome.peak_rss_bytes for outcome in outcomes)
    console.print(f"a whole rank, with Python, torch and activations: {_megabytes(rss)}\n", highlight=False)


def print_same_bits(console: Console, proof: SameBits) -> None:
    word = "[bold green]identical[/]" if proof.identical else "[bold red]different[/]"
    console.print(f"same bits after {proof.alone.steps} steps? {word}", highlight=False)
    for run in (proof.alone, proof.sharded):
        ranks = f"{run.world_size} rank{'s' * (run.world_size > 1)}"
        console.print(f"  {ranks:8} stage {run.stage}  {run.sha256[:24]}…", highlight=False)


def _table_of_bytes(outcomes: list[Outcome]) -> Table:
    """The fullest rank's books, part by part."""
    fullest = max(outcomes, key=lambda outcome: outcome.held_bytes)
    table = Table(title="bytes per rank, at the peak", title_justify="left")
    table.add_column("")
    for heading in ("unsharded", "sharded", "formula"):
        table.add_column(heading, justify="right")
    for part, name in _PARTS.items():
        books = (fullest.bytes[book][part] for book in ("unsharded", "peak", "formula"))
        table.add_row(name, *(f"{count:,}" for count in books), end_section=part == "state")
    return table


def _printable(text: str) -> str:
    """Without what would steer a terminal; an untrained model writes any byte."""
    return "".join(char if char.isprintable() or char in "\n\t" else "·" for char in text)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
