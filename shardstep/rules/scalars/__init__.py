"""The host's arithmetic: the uniform and tensor values of a rule, in float64, once per step or once per tensor.

`arithmetic` says what each operation gives; `evaluate` works it out, lazily and with good errors; `compiled` makes
one fast function of all the scalars of a phase; `wording` writes an expression as the rule has it. Nothing here sees
an element or a compute dtype.
"""

from shardstep.rules.scalars.compiled import Scalars, compile_scalars, uniform_values
from shardstep.rules.scalars.evaluate import evaluate
from shardstep.rules.scalars.wording import expression

__all__ = ["Scalars", "compile_scalars", "evaluate", "expression", "uniform_values"]
