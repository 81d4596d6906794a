"""Train a Hugging Face transformers model, sharded, in a plain loop. Copy this file and put your model and data in.

    python examples/train_transformers.py --model llama
    torchrun --nproc-per-node 2 examples/train_transformers.py --model mixtral --checkpointing reentrant --stage 3

Nothing is downloaded: models are built from a config with random weights, and the text is the source of your Python's
standard library, whose bytes are the tokens. Rank 0 prints the loss of each step's first micro-batch and, at the end,
what the model writes and one JSON line. Its sha256 is the same for 1, 2 and 4 ranks and for every stage.

Nothing in the loop is peculiar to transformers. The layers become the units that are gathered and freed; tied
embeddings, outputs of any kind and checkpointed activations need no care. Every rank calls generate(), for every rank
keeps a part of the model; inside `gathered` it is whole, and not gathered again for each token.
"""

import argparse
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import shardstep as ss
from shardstep.demo.text import load_corpus

CONTEXT = 64
BYTES = 256
MASK = BYTES
"""What BERT is shown instead of the bytes that it is to guess."""

OPTIONS = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "bert": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True},
}


def make_model(name: str, width: int, layers: int) -> PreTrainedModel:
    """A model of that architecture with random weights."""
    config = AutoConfig.for_model(
        name,
        vocab_size=BYTES + 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=2 * CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,  # which is for generate()
        **OPTIONS[name],
    )
    return (AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM).from_config(config)


def loss_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """How well the model continues the text, or guesses the bytes that are masked."""
    if model.config.model_type != "bert":
        return model(input_ids=tokens, labels=tokens).loss
    masked = torch.rand(tokens.shape, device=tokens.device) < 0.15  # seeded for each micro-batch, as dropout is
    return model(input_ids=tokens.masked_fill(masked, MASK), labels=tokens.masked_fill(~masked, -100)).loss


def train(
    model: str, checkpointing: str, stage: int, steps: int, width: int, layers: int, seed: int
) -> dict[str, object]:
    """Train and tell; the same on every rank but for the losses, which rank 0 knows."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    corpus = load_corpus(None, context=CONTEXT, training_windows=16, held_out_windows=1)
    torch.manual_seed(seed)
    net = make_model(model, width, layers).to(device).train()
    if checkpointing != "none":  # in older versions, gradient_checkpointing_enable(gradient_checkpointing_kwargs=...)
        net.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    optimizer = ss.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sharded = ss.shard(net, optimizer, stage=stage, clip_norm=1.0)

    losses = []
    for micro in sharded.micro_batches(corpus.training, global_batch=16, micro_batch=4, seed=seed, epochs=1000):
        loss = loss_of(net, micro.batch.to(device))
        loss.backward()
        if micro.index == 0:  # always rank 0's
            losses.append(loss.item())
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if sharded.rank == 0:
                print(f"step {micro.step}: loss {losses[-1]:.3f}, gradient norm {sharded.grad_norm:.3f}")
            if micro.step == steps - 1:
                break

    written = None if model == "bert" else write(net, corpus.held_out[0][None, : CONTEXT // 2].to(device))
    return {
        "model": model,
        "world_size": sharded.world_size,
        "stage": stage,
        "units": list(sharded.stages),
        "params": net.num_parameters(),
        "losses": losses,
        "written": written,
        "sha256": ss.digest(net, optimizer),  # on every rank, because it gathers
    }


def write(net: PreTrainedModel, prompt: Tensor) -> str:
    """The prompt as the model goes on with it."""
    net.eval()
    with ss.gathered(net):
        tokens = net.generate(prompt, max_new_tokens=CONTEXT // 2, do_sample=False, use_cache=True)
    return bytes(token for token in tokens[0].tolist() if token < BYTES).decode("latin-1")


def connect() -> None:
    """Join the ranks that torchrun started, if it did."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(1)  # the same on every rank and in every run that is to give the same bits
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if gpu else "gloo")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a transformers model, sharded or not.")
    parser.add_argument("--model", choices=OPTIONS, default="llama")
    parser.add_argument("--checkpointing", choices=["none", "reentrant", "non-reentrant"], default="non-reentrant")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    connect()
    summary = train(**vars(options))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary))
    if dist.is_initialized():
        dist.destroy_process_group()
