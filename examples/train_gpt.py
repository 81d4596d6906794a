"""Train a byte-level GPT under your own launcher. Copy this file and put your model, data and optimizer in.

    python examples/train_gpt.py
    torchrun --nproc-per-node 2 examples/train_gpt.py --stage 3

Rank 0 prints the loss of each step's first micro-batch, and at the end one JSON line. Its sha256 is the same
for 1, 2 and 4 ranks and for every stage.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist

import shardstep as ss
from shardstep.demo.gpt import GPT, GPTConfig
from shardstep.demo.text import load_corpus


def main(stage: int, steps: int, seed: int) -> None:
    device = connect()
    dataset = load_corpus(None, context=128, training_windows=16, held_out_windows=1).training

    torch.manual_seed(seed)
    model = GPT(GPTConfig(context=128)).to(device)
    params = sum(parameter.numel() for parameter in model.parameters())
    optimizer = ss.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sharded = ss.shard(model, optimizer, stage=stage, clip_norm=1.0)

    losses, step_s = [], []
    begin = time.perf_counter()
    for micro in sharded.micro_batches(dataset, global_batch=16, micro_batch=4, seed=seed, epochs=1000):
        loss = model(micro.batch.to(device))
        loss.backward()
        if micro.index == 0:  # always rank 0's
            losses.append(loss.item())
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step_s.append(time.perf_counter() - begin)
            if sharded.rank == 0:
                print(f"step {micro.step}: loss {losses[-1]:.3f}, gradient norm {sharded.grad_norm:.3f}")
            if len(step_s) == steps:
                break
            begin = time.perf_counter()

    held, formula = sharded.bytes.peak, sharded.bytes.formula
    sha256 = ss.digest(model, optimizer)  # on every rank, because it gathers
    if sharded.rank == 0:
        summary = {
            "world_size": sharded.world_size,
            "stage": stage,
            "params": params,
            "steps": steps,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "sha256": sha256,
            "peak_bytes": held.total,
            "formula_bytes": formula.total,
            "step_s_median": statistics.median(step_s),
        }
        print(json.dumps(summary))
    if dist.is_initialized():
        dist.destroy_process_group()


def connect() -> torch.device:
    """Join the ranks that torchrun started, if it did. Returns this rank's device."""
    gpu = torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if gpu else "gloo")
    if not gpu:
        torch.set_num_threads(1)  # the same on every rank and in every run that is to give the same bits
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a byte-level GPT, sharded or not.")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
