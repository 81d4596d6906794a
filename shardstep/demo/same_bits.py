"""The proof: the same few steps, unsharded on one rank and sharded over several, compared by digest.

Both digests are computed each time. Nothing here is assumed from the run that was shown before.
"""

from dataclasses import dataclass, replace

from shardstep.demo.run import Outcome, Recipe, train_rank
from shardstep.launch import run_local

STEPS = 3


@dataclass(frozen=True)
class SameBits:
    """What the two runs left behind."""

    alone: Outcome
    sharded: Outcome

    @property
    def identical(self) -> bool:
        return self.alone.sha256 == self.sharded.sha256


def compare(recipe: Recipe, ranks: int) -> SameBits:
    """Run a short version of the recipe on one rank at stage 0, and again over ``ranks`` at its own stage.

    One rank has nothing to shard, so a recipe for one is compared with two ranks at stage 3.
    """
    if ranks == 1:
        ranks, recipe = 2, replace(recipe, stage=3)
    short = replace(recipe, steps=STEPS, micro_batches=2 * ranks, micro_batch=1, held_out_batches=1, sample_bytes=0)
    alone = run_local(train_rank, 1, replace(short, stage=0))[0]
    sharded = run_local(train_rank, ranks, short)[0]
    return SameBits(Outcome(**alone), Outcome(**sharded))
