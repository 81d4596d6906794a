"""Sums of squares, block by block in a fixed order, so that no cut between blocks changes a bit."""

from typing import Final

import torch
from torch import Tensor

from shardstep.types import BLOCK_NUMEL

_TILE_BLOCKS: Final = 64
"""Blocks squared at a time: the float64 scratch stays in the cache."""


def block_sums(values: Tensor) -> Tensor:
    """The sum of squares of each block, float64; halves are added to halves, so every row is summed alike."""
    blocks = values.view(-1, BLOCK_NUMEL)
    sums = torch.empty(blocks.shape[0], dtype=torch.float64, device=values.device)
    for start in range(0, blocks.shape[0], _TILE_BLOCKS):
        squares = blocks[start : start + _TILE_BLOCKS].double().square()
        while squares.shape[1] > 1:
            half = squares.shape[1] // 2
            squares = squares[:, :half] + squares[:, half:]
        sums[start : start + _TILE_BLOCKS] = squares[:, 0]
    return sums
