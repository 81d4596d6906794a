"""Ready-made optimizers, one family of rules a file. Each is a ``torch.optim.Optimizer``.

This room never hears of ranks: an optimizer works alone on one device, or is handed flat runs by a
``FlatSource``.
"""

from shardstep.optim.adafactor import Adafactor
from shardstep.optim.adamw import AdamW
from shardstep.optim.optimizer import Optimizer

__all__ = ["Adafactor", "AdamW", "Optimizer"]
