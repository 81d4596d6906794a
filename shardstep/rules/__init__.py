"""Update rules: equations over elements, compiled to kernels over flat arrays.

In the order in which a rule flows: language (what a rule may say; `functions` for editors) → source, parse (to
`syntax`) → names, check, lower (all three by `meaning`) → ir → passes, scalars → backends → variants
(kernels by flags and dtypes) → elementwise, jobs, matrices or whole (four ways to update) → compiled. This room never
hears of modules, ranks or checkpoints, and imports no back end before a rule is first used.
"""

from shardstep.rules.language import Rule, inline, rule, state, zeros

__all__ = ["Rule", "inline", "rule", "state", "zeros"]
