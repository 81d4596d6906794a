"""Ready-made optimizers, one family of rules a file. Each is a ``torch.optim.Optimizer``.

This room has the names of ``torch.optim``, so that ``import shardstep.optim as optim`` can stand for ``import
torch.optim as optim``. Schedulers, averaging, the global hooks, and the optimizers that are no rule (LBFGS, SparseAdam)
are torch's own objects.

This room never hears of ranks: an optimizer works alone on one device, or is handed flat runs by a
``FlatSource``.
"""

from torch.optim import LBFGS, SparseAdam, lr_scheduler, swa_utils, swap_in_optimizer_params_and_state
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from shardstep.optim import keras
from shardstep.optim.adabelief import AdaBelief
from shardstep.optim.adadelta import Adadelta
from shardstep.optim.adafactor import Adafactor
from shardstep.optim.adagrad import Adagrad
from shardstep.optim.adam import Adam, AdamW, AdamW8bit
from shardstep.optim.adamax import Adamax
from shardstep.optim.adan import Adan
from shardstep.optim.asgd import ASGD
from shardstep.optim.combined import Combined
from shardstep.optim.lamb import LAMB
from shardstep.optim.lars import LARS
from shardstep.optim.lion import Lion
from shardstep.optim.muon import Muon
from shardstep.optim.nadam import NAdam
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.radam import RAdam
from shardstep.optim.rmsprop import RMSprop
from shardstep.optim.rprop import Rprop
from shardstep.optim.schedule_free import AdamWScheduleFree
from shardstep.optim.sgd import SGD
from shardstep.optim.shampoo import Shampoo

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "LBFGS",
    "SGD",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamW8bit",
    "AdamWScheduleFree",
    "Adamax",
    "Adan",
    "Combined",
    "Lion",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Shampoo",
    "SparseAdam",
    "keras",
    "lr_scheduler",
    "register_optimizer_step_post_hook",
    "register_optimizer_step_pre_hook",
    "swa_utils",
    "swap_in_optimizer_params_and_state",
]
