"""From a rule to a kernel that can be called. Each rule is compiled once, when it is first used."""

from weakref import WeakKeyDictionary

from shardstep.rules.backends.reference import compile_program
from shardstep.rules.kernel import Kernel
from shardstep.rules.language import Rule
from shardstep.rules.trace import trace

_kernels: "WeakKeyDictionary[Rule, Kernel]" = WeakKeyDictionary()


def link(rule: Rule) -> Kernel:
    """The kernel of ``rule``, kept for as long as the rule lives.

    Raises RuleError if it cannot be compiled.
    """
    kernel = _kernels.get(rule)
    if kernel is None:
        kernel = _kernels[rule] = compile_program(trace(rule))
    return kernel
