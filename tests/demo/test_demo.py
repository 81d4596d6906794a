"""The demo: one JSON line, the same bits, and mistakes told before any rank starts."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from shardstep.cli import json_summary, main
from shardstep.demo import show
from shardstep.demo.gpt import GPTConfig
from shardstep.demo.run import Outcome, Recipe, read_corpus, train, train_rank
from shardstep.demo.same_bits import SameBits, compare
from shardstep.errors import ConfigError
from shardstep.launch import run_local

FIELDS = [
    "world_size",
    "stage",
    "params",
    "steps",
    "loss_first",
    "loss_last",
    "sha256",
    "peak_bytes",
    "formula_bytes",
    "step_s_median",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    text = tmp_path_factory.mktemp("text") / "poem.txt"
    text.write_text("the rain in spain falls mainly on the plain\n" * 60)
    return Recipe(
        steps=6,
        micro_batch=2,
        text=text,
        lr=1e-2,
        held_out_batches=1,
        model=GPTConfig(layers=2, width=16, heads=2, context=24),
    )


@pytest.fixture(scope="module")
def outcome(tiny: Recipe) -> Outcome:
    return Outcome(**run_local(train_rank, 1, replace(tiny, sample_bytes=12))[0])


def test_it_learns(outcome: Outcome) -> None:
    assert outcome.loss_last < outcome.loss_first - 0.5


def test_the_sample_continues_its_prompt(outcome: Outcome) -> None:
    assert outcome.sample.startswith("def ")


def test_the_books_agree_with_the_formula(outcome: Outcome) -> None:
    assert outcome.bytes["peak"] == outcome.bytes["formula"]


def test_every_step_is_reported(tiny: Recipe) -> None:
    reports = []
    train(replace(tiny, steps=3), reports.append)
    assert [report.step for report in reports] == [1, 2, 3]
    assert reports[0].lr < reports[1].lr


def test_more_steps_than_the_text_has(tiny: Recipe) -> None:
    steps_an_epoch = len(read_corpus(tiny).training) // tiny.global_batch
    reports = []
    train(replace(tiny, steps=steps_an_epoch + 1), reports.append)
    assert len(reports) == steps_an_epoch + 1


def test_the_short_rerun_compares_two_real_runs(tiny: Recipe) -> None:
    proof = compare(tiny, ranks=1)
    assert (proof.alone.world_size, proof.alone.stage) == (1, 0)
    assert (proof.sharded.world_size, proof.sharded.stage) == (2, 3)
    assert proof.identical


def test_the_word_follows_the_digests(outcome: Outcome) -> None:
    other = replace(outcome, sha256="0" * 64)
    assert "identical" in shown(lambda console: show.print_same_bits(console, SameBits(outcome, outcome)))
    assert "different" in shown(lambda console: show.print_same_bits(console, SameBits(outcome, other)))


def test_the_outcome_names_every_part(outcome: Outcome) -> None:
    noisy = replace(outcome, sample="def f\x1b[2J():")
    text = shown(lambda console: show.print_outcome(console, [noisy]))
    for word in ("validation loss", "parameters", "gradients", "optimizer state", "unsharded", "formula"):
        assert word in text
    assert "\x1b" not in text


def test_json_is_one_line_with_the_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 700)
    size = ["--ranks", "1", "--steps", "1", "--micro-batches", "1", "--text", str(text)]
    assert main(["demo", "--json", *size]) == 0
    line, rest = capsys.readouterr().out.split("\n", 1)
    assert rest == ""
    assert list(json.loads(line)) == FIELDS


def test_the_summary_takes_bytes_of_the_fullest_rank(outcome: Outcome) -> None:
    fuller = replace(outcome, bytes={**outcome.bytes, "peak": {"total": 10**9}, "formula": {"total": 10**9}})
    summary = json_summary([outcome, fuller])
    assert summary["peak_bytes"] == summary["formula_bytes"] == 10**9


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ranks", "0"], "expected --ranks to be at least 1, got 0"),
        (
            ["--ranks", "3"],
            "expected --micro-batches to be a multiple of --ranks, got 4 micro-batches for 3 ranks",
        ),
        (["--steps", "0"], "expected steps to be at least 1, got 0"),
        (["--text", "nowhere"], "expected --text to name a file or a folder, got 'nowhere'"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_recipe_refuses_nothing_to_do() -> None:
    with pytest.raises(ConfigError, match="expected micro_batches to be at least 1, got 0"):
        Recipe(micro_batches=0)


def shown(printed: Callable[[Console], None]) -> str:
    text = io.StringIO()
    printed(Console(file=text, width=100))
    return text.getvalue()
