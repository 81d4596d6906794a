"""Train a Keras 3 model (torch back end), sharded, in a plain loop. Copy this file and put your model and data in.

    python examples/train_keras.py
    torchrun --nproc-per-node 2 examples/train_keras.py --stage 3

Rank 0 prints the loss of each step's first micro-batch, and at the end one JSON line. Its sha256 is the same for 1, 2
and 4 ranks and for every stage. Four things differ from a torch model: KERAS_BACKEND must be set before the import,
the model must be built (an Input does that), the optimizer takes the trainable variables' values, and layers such as
Dropout and BatchNormalization train only when the model is called with training=True.
"""

import argparse
import json
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
import torch.distributed as dist
from keras import layers

import shardstep as ss

WORDS, LENGTH, CLASSES = 100, 12, 4


class Sums:
    """A map-style dataset: random words, and the remainder of their sum."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.randint(WORDS, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return words, words[0] % CLASSES


def make_model(width: int, blocks: int) -> keras.Model:
    """Residual blocks: each is a unit, gathered and freed by itself."""
    words = keras.Input((LENGTH,), dtype="int32")
    x = layers.Dense(width)(layers.Flatten()(layers.Embedding(WORDS, 8)(words)))
    for _ in range(blocks):
        inner = [layers.BatchNormalization(), layers.Dense(4 * width, activation="gelu"), layers.Dropout(0.1)]
        x = layers.add([x, keras.Sequential([keras.Input((width,)), *inner, layers.Dense(width)])(x)])
    return keras.Model(words, layers.Dense(CLASSES)(x))


def main(stage: int, steps: int, width: int, blocks: int) -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)  # the same on every rank and in every run that is to give the same bits

    keras.utils.set_random_seed(0)
    model = make_model(width, blocks)
    optimizer = ss.optim.keras.AdamW(
        [variable.value for variable in model.trainable_variables],
        learning_rate=keras.optimizers.schedules.CosineDecay(3e-3, steps),
        global_clipnorm=1.0,
    )
    sharded = ss.shard(model, optimizer, stage=stage)

    losses = []
    for micro in sharded.micro_batches(Sums(), global_batch=64, micro_batch=16, seed=0, epochs=1000):
        words, labels = micro.batch
        loss = torch.nn.functional.cross_entropy(model(words, training=True), labels)
        loss.backward()
        if micro.index == 0:  # always rank 0's
            losses.append(loss.item())
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            if sharded.rank == 0:
                print(f"step {micro.step}: loss {losses[-1]:.3f}, gradient norm {sharded.grad_norm:.3f}")
            if micro.step == steps - 1:
                break

    sha256 = ss.digest(model, optimizer)  # on every rank, because it gathers
    if sharded.rank == 0:
        summary = {
            "world_size": sharded.world_size,
            "stages": sharded.stages,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "sha256": sha256,
        }
        print(json.dumps(summary))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small Keras model, sharded or not.")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=3)
    main(**vars(parser.parse_args()))
