"""Keras's optimizers: its names of arguments and its formulae, as rules of shardstep, one family a file.

    optimizer = shardstep.optim.keras.Adam(model.parameters(), learning_rate=1e-3, clipnorm=1.0)

They are ``torch.optim.Optimizer`` objects like all others here, and shard like them. Nothing here imports Keras.
"""

from shardstep.optim.keras.adafactor import Adafactor
from shardstep.optim.keras.adagrad import Adadelta, Adagrad
from shardstep.optim.keras.adam import Adam, AdamW
from shardstep.optim.keras.adamax import Adamax
from shardstep.optim.keras.ftrl import Ftrl
from shardstep.optim.keras.lamb import Lamb
from shardstep.optim.keras.lion import Lion
from shardstep.optim.keras.nadam import Nadam
from shardstep.optim.keras.rmsprop import RMSprop
from shardstep.optim.keras.sgd import SGD

__all__ = [
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lamb",
    "Lion",
    "Nadam",
    "RMSprop",
]
