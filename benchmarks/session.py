"""The session: all contestants alive at once, one working at a time, in rounds of shuffled order.

The speed of a shared machine drifts by more than the differences that are looked for. Because every
contestant works a little in every round, a drift hits all of them, and ratios are taken within a round.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.config import SessionConfig
from benchmarks.machine import Usage
from benchmarks.team import ContestantFailed, Message, Team


def run(dtype: str, config: SessionConfig) -> dict[str, Any]:
    """Run all rounds in one dtype; the raw records of every contestant, and why some are missing."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        teams = _assemble(dtype, config, Path(folder), results)
        try:
            before = Usage.take()
            started_s = time.perf_counter()
            _rounds(teams, config, results)
            quality = Usage.take().since(before, time.perf_counter() - started_s)
            _finish(teams, results)
        finally:
            for team in teams.values():
                team.kill()
    return {"contestants": results, "quality": quality}


def _assemble(dtype: str, config: SessionConfig, folder: Path, results: dict[str, Any]) -> dict[str, Team]:
    teams: dict[str, Team] = {}
    for name in config.contestants:
        _say(f"{dtype}: starting {name}")
        try:
            teams[name] = Team(name, dtype, config, folder)
            results[name] = {"params_numel": teams[name].params_numel, "rounds": []}
        except ContestantFailed as error:
            results[name] = {"failed": str(error)}
            _say(f"{dtype}: {name} cannot run: {error}")
        except BaseException:
            for team in teams.values():
                team.kill()
            raise
    return teams


def _rounds(teams: dict[str, Team], config: SessionConfig, results: dict[str, Any]) -> None:
    """Round 0 warms up (buckets are rebuilt, state is allocated, orders are recorded) and is discarded."""
    for index in range(config.rounds + 1):
        order = list(teams)
        random.Random(1000 * config.seed + index).shuffle(order)
        for name in order:
            try:
                record = _turn(teams[name], config)
            except ContestantFailed as error:
                _say(f"{name} dropped out: {error}")
                teams.pop(name).kill()
                results[name] = {"failed": str(error)}
                continue
            if index > 0:
                results[name]["rounds"].append(record)
        _say(f"round {index} of {config.rounds} done")


def _finish(teams: dict[str, Team], results: dict[str, Any]) -> None:
    for name, team in teams.items():
        try:
            results[name]["memory"] = team.finish()
        except ContestantFailed as error:
            results[name] = {"failed": str(error)}
            _say(f"{name} failed at the end: {error}")


def _turn(team: Team, config: SessionConfig) -> Message:
    """One turn: the steps as one record each, and what the whole machine saw meanwhile."""
    before, started_s = Usage.take(), time.perf_counter()
    steps = [_combine(ranks) for ranks in team.turn(config.steps)]
    seen = Usage.take().since(before, time.perf_counter() - started_s)
    worked_s = sum(step["cpu_s"] for step in steps) * len(team.workers)
    return {
        "steps": steps,
        "wire_bytes": seen["loopback_bytes"] / len(team.workers) / len(steps),
        "foreign_cpu_s": max(0.0, seen["busy_s"] - worked_s),
    }


def _combine(ranks: list[Message]) -> Message:
    """A step is as slow as its slowest rank; everything else is the mean of the ranks."""
    mean = {key: sum(rank[key] for rank in ranks) / len(ranks) for key in ranks[0] if key != "wall_s"}
    user_s, sys_s = mean.pop("user_s"), mean.pop("sys_s")
    return {"wall_s": max(r["wall_s"] for r in ranks), "cpu_s": user_s + sys_s, "sys_s": sys_s} | mean


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
