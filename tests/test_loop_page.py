"""The page docs/loop.md: its blocks are one script, which trains to the same bits on one rank and on two."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shardstep as ss
from shardstep.demo.gpt import GPT, GPTConfig

PAGE = Path(__file__).parent.parent / "docs" / "loop.md"


class Windows:
    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(256, (9,), generator=torch.Generator().manual_seed(index))


def run_page(folder: str, resumes: bool) -> dict[str, Any]:
    config = GPTConfig(width=32, layers=2, context=8)
    held_out = [Windows()[index][None] for index in range(2)]
    names: dict[str, Any] = {"GPT": GPT, "config": config, "dataset": Windows(), "held_out": held_out}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    if resumes:
        names["load"](os.path.join(folder, "checkpoint.pt"))
    else:
        names["save"](os.path.join(folder, "checkpoint.pt"))
    return {
        "sha256": ss.digest(names["model"], names["optimizer"]),
        "loss": names["evaluate"]().item(),
        "steps": names["sharded"].step_count,
        "lr": names["optimizer"].param_groups[0]["lr"],
    }


def test_the_script_of_the_page_trains_saves_and_loads_to_the_same_bits(ranks, tmp_path, capsys):
    alone = run_page(str(tmp_path), resumes=False)
    assert re.search(r"^step 2: loss \d\.\d+, norm \d\.\d+$", capsys.readouterr().out, re.MULTILINE)
    assert alone["steps"] == 2
    assert ranks(2).run(run_page, str(tmp_path), False) == [alone] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert run_page(str(tmp_path), resumes=True) == alone
