"""Update rules: equations over elements, traced to a program and compiled to kernels over flat arrays.

In the order in which a rule flows: language, symbols, trace, program, backends, link. This room never hears
of modules, ranks or checkpoints.
"""

from shardstep.rules.language import Rule, rule, zeros

__all__ = ["Rule", "rule", "zeros"]
