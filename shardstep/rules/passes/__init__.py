"""What happens to a rule's program between the front end and the back ends. One pure function a pass.

Every pass is Program -> Program, shows before → after in its docstring, and keeps the bits of every number that is
stored, but for `gradient` and `stochastic`, which put in what rules leave unsaid. `pipeline` runs them in order with
the verifier between; `split` or `steps` comes last and makes what back ends run. Nothing here knows a back end or an
optimizer; only `stochastic` knows a dtype that an array is stored in.
"""

from shardstep.rules.passes.dead import drop_dead
from shardstep.rules.passes.pipeline import compile_phases, cut, cut_steps, stages
from shardstep.rules.passes.specialise import (
    compile_truths,
    conditions,
    fixed_conditions,
    specialise,
    used_arrays,
    used_values,
)

__all__ = [
    "compile_phases",
    "compile_truths",
    "conditions",
    "cut",
    "cut_steps",
    "drop_dead",
    "fixed_conditions",
    "specialise",
    "stages",
    "used_arrays",
    "used_values",
]
