"""What the command lines of the benchmarks take; anything else is named before a process starts."""

from __future__ import annotations

import argparse

from benchmarks.names import KNOWN


def positive(text: str) -> int:
    """A number of things."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def names(text: str) -> tuple[str, ...]:
    """Contestants, with commas between."""
    chosen = tuple(dict.fromkeys(name for name in text.split(",") if name))
    unknown = [name for name in chosen if name not in KNOWN]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"expected names from {', '.join(KNOWN)}; got {text!r}")
    return chosen
