"""Train with `transformers.Trainer`, sharded. Copy `ShardedTrainer`, and put your model, data and arguments in.

    python examples/train_trainer.py
    torchrun --nproc-per-node 2 examples/train_trainer.py --stage 3 --folder out
    python examples/train_trainer.py --folder out2 --resume out/checkpoint-10

Trainer keeps its loop, its data, its schedules, evaluation, logging and saving. Four of its public methods are
overridden, each for a reason that stands with it. Two of TrainingArguments must be as they are here:

- `max_grad_norm=0`: gradients are spread over the ranks, so shard(clip_norm=...) clips them, and Trainer must not;
- `save_only_model=True`: Trainer would have rank 0 alone ask the optimizer for its state, and all ranks must ask.
  `SaveOptimizer` has them ask together, and writes the files that Trainer looks for when it resumes.

Accelerate deals micro-batch k of a step to rank k mod N, as shardstep does. So runs that have the same number of
micro-batches in a step, over all ranks, have the same bits: the sha256 in the JSON line that rank 0 prints at the end.
(That is for models without dropout: Trainer seeds each rank once, and not each micro-batch.)
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import shardstep as ss
from shardstep.demo.text import Windows, load_corpus

CONTEXT, MICRO_BATCHES = 64, 4


class ShardedTrainer(Trainer):
    """Trainer with ``shard={"stage": 3, ...}``, the options of shard(); ``sharded`` is its handle once it trains."""

    sharded: ss.Sharded | None = None

    def __init__(self, *args, shard: dict[str, object], **kwargs) -> None:
        self.shard_options = shard
        super().__init__(*args, **kwargs)
        self.add_callback(SaveOptimizer())

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Shard as soon as there is an optimizer. A model that Accelerate has prepared once, as if for evaluation, is
        left as it is when it is prepared again, where DistributedDataParallel would be put around it.
        """
        optimizer = super().create_optimizer(model)
        if self.sharded is None:
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self.accelerator.clip_grad_norm_ = self.clip_nothing
            self.sharded = ss.shard(self.model, optimizer, **self.shard_options)
        return optimizer

    @staticmethod
    def clip_nothing(parameters, max_norm: float, norm_type: float = 2) -> None:
        """Trainer asks for the norm even where it clips nothing; see log()."""
        if max_norm != float("inf"):
            raise ValueError(f"expected max_grad_norm=0, got {max_norm}; clip with shard={{'clip_norm': {max_norm}}}")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer divides losses by the number of micro-batches, and the engine takes the mean of gradients: once is
        enough. The loss itself stays as it is, for logging.
        """
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if loss.requires_grad:
            loss.register_hook(lambda grad: grad * self.current_gradient_accumulation_steps)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The norm is known when the step is made."""
        if "loss" in logs and self.sharded is not None and self.sharded.grad_norm is not None:
            logs["grad_norm"] = self.sharded.grad_norm
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Every rank asks for the whole state dict, and one of them writes it."""
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder, is_main_process=self.args.should_save)
        if self.processing_class is not None and self.args.should_save:
            self.processing_class.save_pretrained(folder)


class SaveOptimizer(TrainerCallback):
    """Adds the states of optimizer and scheduler to a checkpoint. A run may be resumed on another number of ranks."""

    def on_save(self, args, state, control, *, optimizer, lr_scheduler, **_) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for name, saved in ((OPTIMIZER_NAME, optimizer), (SCHEDULER_NAME, lr_scheduler)):
            values = saved.state_dict()  # whole, on every rank
            if args.should_save:
                torch.save(values, folder / name)


class Text(Dataset[dict[str, Tensor]]):
    """Windows of a text, as Trainer wants them. Labels are shifted by the model."""

    def __init__(self, windows: Windows, count: int) -> None:
        self._windows, self._count = windows, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


def train(
    stage: int, steps: int, width: int, layers: int, seed: int, folder: Path, resume: Path | None = None
) -> dict[str, object]:
    """Train, evaluate, save into ``folder`` and tell."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    corpus = load_corpus(None, context=CONTEXT, training_windows=512, held_out_windows=16)
    torch.manual_seed(seed)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, max_position_embeddings=128, **size))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=MICRO_BATCHES // world_size,
        activation_checkpointing=True,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        max_grad_norm=0,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="steps",
        save_steps=max(1, steps // 2),
        save_only_model=True,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    trainer = ShardedTrainer(
        model,
        arguments,
        train_dataset=Text(corpus.training, 512),
        eval_dataset=Text(corpus.held_out, 16),
        optimizer_cls_and_kwargs=(ss.optim.AdamW, {"lr": arguments.learning_rate}),
        shard={"stage": stage, "clip_norm": 1.0},
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.save_model()
    return {
        "world_size": trainer.sharded.world_size,
        "stages": trainer.sharded.stages,
        "log": trainer.state.log_history,
        "sha256": ss.digest(model, trainer.optimizer),  # on every rank, because it gathers
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small Llama with transformers.Trainer, sharded or not.")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to save the model; by default a folder that is removed")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    options = vars(parser.parse_args())
    torch.set_num_threads(1)  # the same on every rank and in every run that is to give the same bits
    with tempfile.TemporaryDirectory() as scratch:
        summary = train(**{**options, "folder": options["folder"] or Path(scratch)})
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary))
    if dist.is_initialized():
        dist.destroy_process_group()
