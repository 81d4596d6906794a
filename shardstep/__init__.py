"""shardstep: you write the update step; it is sharded, and the numbers never depend on how.

    model = GPT(config)
    optimizer = shardstep.optim.AdamW(model.parameters(), lr=3e-4)
    sharded = shardstep.shard(model, optimizer, stage=3)

Nothing happens at import but imports.
"""

from shardstep import optim
from shardstep.averaging import Average
from shardstep.config import Precision
from shardstep.errors import (
    ArgumentTypeError,
    CollectiveError,
    ConfigError,
    FreedParameterError,
    MissingKeyError,
    NonFiniteGradientError,
    NonFiniteUpdateError,
    OwnershipError,
    RankMismatchError,
    RuleError,
    SequenceError,
    ShardstepError,
    UnsupportedError,
)
from shardstep.optim.define import rule
from shardstep.rules import inline, state, zeros
from shardstep.sharding import LossScaler, MicroBatch, Sharded, digest, gathered, megatron, partitioned, shard

__all__ = [
    "ArgumentTypeError",
    "Average",
    "CollectiveError",
    "ConfigError",
    "FreedParameterError",
    "LossScaler",
    "MicroBatch",
    "MissingKeyError",
    "NonFiniteGradientError",
    "NonFiniteUpdateError",
    "OwnershipError",
    "Precision",
    "RankMismatchError",
    "RuleError",
    "SequenceError",
    "Sharded",
    "ShardstepError",
    "UnsupportedError",
    "digest",
    "gathered",
    "inline",
    "megatron",
    "optim",
    "partitioned",
    "rule",
    "shard",
    "state",
    "zeros",
]
