"""Stochastic rounding as the host sees it: which segments are rounded so, and the key that their noise is made with.

The noise of an element is a function of (seed, step, its place in the flat space): it does not depend on who owns the
element, where the memory is cut, or which back end runs. Kernels know the low word of the place; the high word is
part of the key, so a segment is cut where the low word begins anew (not those of rules that see whole tensors: there
the key of the first element serves). `passes.stochastic` makes the noise.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from typing import Final

import torch

from shardstep.rules.binding import compute_dtype, cut_states
from shardstep.types import Segment

KEY: Final = "rounding_key"
"""A reserved name: the hyper-parameter that the kernels get the key in."""

PIECES: Final = 4
"""Entries of the key, of 16 bits each. Scalars are reals: an entry is 2^23 plus its bits, so that they are the last
ones of its float32."""

TURN: Final = 2**32
"""Places after which their low word begins anew."""


def rounded_dtype(segment: Segment) -> torch.dtype | None:
    """What the new param is rounded to stochastically; None if it is not."""
    if segment.seed is None or segment.param.dtype == compute_dtype(segment.param):
        return None
    return segment.param.dtype


def key_of(segment: Segment, seed: int) -> tuple[float, ...]:
    """The value of ``rounding_key`` up to the next turn."""
    return _key(seed, segment.step, segment.offset // TURN)


@lru_cache(maxsize=256)
def _key(seed: int, step: int, high: int) -> tuple[float, ...]:
    mixed = blake2b(f"{seed} {step} {high}".encode(), digest_size=2 * PIECES).digest()
    return tuple(float(2**23 + int.from_bytes(mixed[i : i + 2], "little")) for i in range(0, len(mixed), 2))


def with_one_key(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The segments, those that are rounded stochastically in parts that share their key."""
    for segment in segments:
        if segment.seed is None:
            yield segment
        else:
            yield from between_turns(segment)


def between_turns(segment: Segment) -> Iterator[Segment]:
    """The segment in parts that share their key."""
    numel, start = segment.param.numel(), 0
    param, grad = segment.param.view(-1), segment.grad.view(-1)
    while start < numel:
        stop = min(numel, start + TURN - (segment.offset + start) % TURN)
        part = slice(start, stop)
        yield replace(
            segment,
            param=param[part],
            grad=grad[part],
            state=cut_states(segment.state, start, stop),
            low=None if segment.low is None else segment.low.view(-1)[part],
            offset=segment.offset + start,
            start=segment.start + start,
        )
        start = stop
