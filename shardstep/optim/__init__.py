"""Ready-made optimizers, one family of rules a file. Each is a ``torch.optim.Optimizer``.

This room never hears of ranks: an optimizer works alone on one device, or is handed flat runs by a
``FlatSource``.
"""

from shardstep.optim.adabelief import AdaBelief
from shardstep.optim.adadelta import Adadelta
from shardstep.optim.adagrad import Adagrad
from shardstep.optim.adam import Adam, AdamW
from shardstep.optim.adamax import Adamax
from shardstep.optim.adan import Adan
from shardstep.optim.asgd import ASGD
from shardstep.optim.lamb import LAMB
from shardstep.optim.lars import LARS
from shardstep.optim.lion import Lion
from shardstep.optim.nadam import NAdam
from shardstep.optim.optimizer import Optimizer
from shardstep.optim.radam import RAdam
from shardstep.optim.rmsprop import RMSprop
from shardstep.optim.rprop import Rprop
from shardstep.optim.schedule_free import AdamWScheduleFree
from shardstep.optim.sgd import SGD

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "AdaBelief",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "Adamax",
    "Adan",
    "Lion",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
]
