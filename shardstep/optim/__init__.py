"""Ready-made optimizers, one family of rules a file. Each is a ``torch.optim.Optimizer``.

This room never hears of ranks: an optimizer works alone on one device, or is handed flat runs by a
``FlatSource``.
"""

from shardstep.optim.adamw import AdamW, AdamW8bit
from shardstep.optim.optimizer import Optimizer

__all__ = ["AdamW", "AdamW8bit", "Optimizer"]
