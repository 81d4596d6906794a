"""The engine: partitioned parameters, hooks, leaves and their reduction, and the sharded step.

    units      which modules are units                     space      one flat space on this rank
    hooks      when units are gathered and freed           gradients  leaves to their owners
    leaves     one space's gradients                       exchange   leaves on their way
    reduce     the fixed tree of sums                      entrances  where models are entered
    early      updates in the backward pass                clip       the global norm, and clipping by value
    calls      which modules run, which units are done     outputs    tensors that modules hand out
    freed      parameters without values                   stand_in   what .grad is between backward and zero_grad()
    step       what optimizer.step() runs on               buffers    BatchNorm and the like
    batches    which samples are micro-batch k             agreement  do all ranks do the same?
    whole      gathered, state dicts, digest               memory, formula  bytes counted, bytes foretold
    averages   where averages of parameters lie            statistics  BatchNorm's, over the ranks' micro-batches
    loans      shards that peers may take at any time      ownership  whole tensors, for products of matrices
    states     optimizer state, out and in again           handle     what shard() returns
    arriving   parameters that a step has left on their way  ranges   which part of them a rank owns
    presets    named choices of shard's arguments
    scaler     the scale of the loss                       nested     tensors in what modules take and return
    access     full tensors by name                        casts      where precisions meet
    construction, cut  models cut while they are built     materialise  models on the meta device
    first_values  from where a space is filled             weights    the door to files of weights

This room never mentions a particular optimizer.
"""

from shardstep.sharding.batches import MicroBatch
from shardstep.sharding.construction import partitioned
from shardstep.sharding.handle import Sharded
from shardstep.sharding.presets import megatron
from shardstep.sharding.scaler import LossScaler
from shardstep.sharding.shard import shard
from shardstep.sharding.whole import digest, gathered

__all__ = ["LossScaler", "MicroBatch", "Sharded", "digest", "gathered", "megatron", "partitioned", "shard"]
