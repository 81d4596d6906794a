"""The page about the optimizers is what their rules say."""

from pathlib import Path

from shardstep.cli import main
from shardstep.rules_docs import optimizer_classes
from tests.optim.table import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"


def test_the_committed_page_is_what_the_command_prints(capsys):
    assert main(["rules", "docs"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), "run: shardstep rules docs > docs/optimizers.md"


def test_it_tells_what_options_cost_and_fences_the_equations():
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"\n## {row.name}\n" in text for row in ROWS)
    assert "| [RMSprop](#rmsprop) | elementwise | 4 (+4 with momentum, +4 with centered) |" in text
    assert "| [AdamW8bit](#adamw8bit) | elementwise | 2.03 (+1.02 with amsgrad) |" in text
    assert "`max_exp_avg_sq` (from 0, with amsgrad)" in text
    assert "`z` (from a copy of the parameter)" in text
    assert text.count("```") == 2 * len(optimizer_classes())
    assert "\n```\ng ← g + weight_decay · θ\nv ← ρ v + (1 − ρ) g²\n" in text
