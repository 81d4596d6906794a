"""Ready-made optimizers, one family of rules a file. Each is a ``torch.optim.Optimizer``.

This room has the names of ``torch.optim``, so that ``import shardstep.optim as optim`` can stand for ``import
torch.optim as optim``. Schedulers, averaging, the global hooks, and the optimizers that are no rule (LBFGS, SparseAdam)
are torch's own objects.

This room never hears of ranks: an optimizer works alone on one device, or is handed flat runs by a
``FlatSource``.
"""

from torch.optim import LBFGS, SparseAdam, lr_scheduler, swa_utils, swap_in_optimizer_params_and_state
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from shardstep.optim.adamw import AdamW
from shardstep.optim.optimizer import Optimizer

__all__ = [
    "LBFGS",
    "AdamW",
    "Optimizer",
    "SparseAdam",
    "lr_scheduler",
    "register_optimizer_step_post_hook",
    "register_optimizer_step_pre_hook",
    "swa_utils",
    "swap_in_optimizer_params_and_state",
]
