"""``@rule`` as users have it: a rule that also makes an optimizer of itself."""

from collections.abc import Callable
from typing import Any

from shardstep.optim.optimizer import Optimizer
from shardstep.rules import Rule
from shardstep.rules import rule as plain_rule


class OptimizerRule(Rule):
    """The equations of one update step; see `shardstep.rules.Rule`."""

    def optimizer(self) -> type[Optimizer]:
        """A class of optimizers that update by this rule: ``Lion = lion.optimizer()``, then ``Lion(params, lr=1e-4)``.

        Its keyword arguments are the rule's hyper-parameters. It is named after the rule.
        """
        name = "".join(word[:1].upper() + word[1:] for word in self.name.split("_"))
        module = self.function.__module__
        return type(name, (Optimizer,), {"rule": self, "__doc__": self.function.__doc__, "__module__": module})


def rule(function: Callable[..., Any]) -> OptimizerRule:
    """Make a rule of a pure function ``(param, grad, state=zeros, ..., *, step, hyper=default, ...)``.

    It returns the new param and the new states in order. A hyper-parameter is a number, a tuple of numbers, or a truth
    value: a flag. Raises RuleErrors for a signature of another form. The body is read when the rule is first used.
    """
    made = plain_rule(function)
    return OptimizerRule(made.name, made.function, made.declared, made.hyperparameters)
