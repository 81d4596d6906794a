"""From raw records to figures: medians, quartiles, ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Contestant = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A sample in four numbers."""

    median: float
    q1: float
    q3: float
    low: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """One value is its own quartiles."""
        sample = sorted(values)
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0], sample[0])
        q1, median, q3 = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, q1, q3, sample[0])


def ran(contestant: Contestant | None) -> bool:
    """Whether there is at least one measured round."""
    return bool(contestant and contestant.get("rounds"))


def steps(contestant: Contestant, key: str) -> list[float]:
    """One figure of every measured step; empty where the contestant does not have it."""
    records = (step for turn in contestant["rounds"] for step in turn["steps"])
    return [step[key] for step in records if key in step]


def ratio(ours: Contestant, peer: Contestant, key: str) -> Spread:
    """Within each round the ratio of the medians over the turn's steps; then the spread over the rounds."""
    return Spread.of(a / b for a, b in zip(_by_round(ours, key), _by_round(peer, key), strict=True) if b > 0)


def _by_round(contestant: Contestant, key: str) -> list[float]:
    return [statistics.median(step[key] for step in turn["steps"]) for turn in contestant["rounds"]]


def peak_rss_bytes(contestant: Contestant) -> int:
    """Of the rank that needed most."""
    return max(int(rank["rss_peak_bytes"]) for rank in contestant["memory"])
