"""Train with Hugging Face Accelerate, sharded. Copy this file and put your model and data in.

    python examples/train_accelerate.py
    torchrun --nproc-per-node 2 examples/train_accelerate.py --stage 3

There is no plugin, because none is needed: four things differ from any loop of Accelerate's.

- shard() comes first, and the model is prepared with `evaluation_mode=True`: that is Accelerate's way of saying
  that nothing is to be wrapped around it. Optimizer and loader are prepared as ever.
- `backward(loss * accelerator.gradient_accumulation_steps)`: Accelerate divides losses by the number of micro-batches,
  and the engine takes the mean of gradients; once is enough.
- shard(clip_norm=...) clips, and not accelerator.clip_grad_norm_(): gradients are spread over the ranks.
- The scheduler is not prepared, since Accelerate would have it make as many steps at a time as there are ranks.

Accelerate deals micro-batch k of a step to rank k mod N, as shardstep does. So the sha256 in the JSON line that rank 0
prints at the end is the same for 1, 2 and 4 ranks and for every stage, for models without dropout.

(Why this and not a Lightning strategy: that would be a subclass of DDPStrategy which overrides configure_ddp(),
setup_optimizers() and backward(), and a LightningModule is trained through training_step(), not through forward().
Here no class is needed, and transformers.Trainer, see train_trainer.py, stands on Accelerate.)
"""

import argparse
import json
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

import shardstep as ss
from shardstep.demo.gpt import GPT, GPTConfig
from shardstep.demo.text import load_corpus

CONTEXT, MICRO_BATCHES = 64, 4


def train(stage: int, steps: int, width: int, layers: int, seed: int) -> dict[str, object]:
    """Train and tell; the same on every rank but for the losses, which are rank 0's."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=MICRO_BATCHES // world_size,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # one shuffle for any number of ranks
    )
    set_seed(seed)
    text = load_corpus(None, context=CONTEXT, training_windows=16, held_out_windows=1).training
    loader = DataLoader(text, batch_size=4, shuffle=True, drop_last=True)
    model = GPT(GPTConfig(width=width, layers=layers, context=CONTEXT)).to(accelerator.device)
    optimizer = ss.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    sharded = ss.shard(model, optimizer, stage=stage, clip_norm=1.0)
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    optimizer, loader = accelerator.prepare(optimizer, loader)

    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss * accelerator.gradient_accumulation_steps)
            optimizer.step()  # which Accelerate lets through with a step's last micro-batch only
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            scheduler.step()
            losses.append(loss.item())
            accelerator.print(f"step {len(losses)}: loss {losses[-1]:.3f}, gradient norm {sharded.grad_norm:.3f}")
            if len(losses) == steps:
                break
    return {
        "world_size": sharded.world_size,
        "stages": sharded.stages,
        "losses": losses,
        "tensors": len(accelerator.get_state_dict(model)),  # whole, so on every rank, as is the digest
        "sha256": ss.digest(model, optimizer),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a byte-level GPT with Accelerate, sharded or not.")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)  # the same on every rank and in every run that is to give the same bits
    summary = train(**vars(parser.parse_args()))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary))
    if dist.is_initialized():
        dist.destroy_process_group()
