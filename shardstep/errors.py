"""The exception tree. Every text says what was expected, what was got, where, and what to do.

    ShardstepError
    ├── ConfigError (ValueError)            an argument that cannot be honoured
    │   ├── OwnershipError                  a parameter without an owner, or with two
    │   ├── ArgumentTypeError (TypeError)   an argument of another kind than the one expected
    │   ├── MissingKeyError (KeyError)      a parameter group or a state dict without an entry that it needs
    │   └── UnsupportedError (RuntimeError) what torch's optimizers refuse so too, or do and ours do not
    ├── RuleError                           an update rule that cannot be compiled
    ├── FreedParameterError (RuntimeError)  a value read while its unit is freed
    ├── SequenceError (RuntimeError)        calls in an order that has no meaning
    ├── NonFiniteGradientError (ArithmeticError)
    ├── NonFiniteUpdateError (ArithmeticError)
    └── CollectiveError (RuntimeError)      a collective failed: a peer died, or time ran out
        └── RankMismatchError               the ranks do not do the same thing

This room never imports another one and never catches anything.
"""


class ShardstepError(Exception):
    """Root of every error that shardstep raises on purpose."""


class ConfigError(ShardstepError, ValueError):
    """An argument, or a combination of arguments, that cannot be honoured."""


class OwnershipError(ConfigError):
    """A parameter that the optimizer does not own, or owns twice."""


class ArgumentTypeError(ConfigError, TypeError):
    """An argument of another kind than the one expected."""


class MissingKeyError(ConfigError, KeyError):
    """A parameter group or a state dict without an entry that it needs."""

    def __str__(self) -> str:
        """The sentence as it is: KeyError would quote it."""
        return Exception.__str__(self)


class UnsupportedError(ConfigError, RuntimeError):
    """What torch's optimizers refuse with a RuntimeError, or can do and ours cannot."""


class RuleError(ShardstepError):
    """An update rule that cannot be compiled."""


class FreedParameterError(ShardstepError, RuntimeError):
    """The value of a parameter was needed while its unit was freed."""


class SequenceError(ShardstepError, RuntimeError):
    """A call that has no meaning at this point of the training loop."""


class NonFiniteGradientError(ShardstepError, ArithmeticError):
    """The gradients hold NaN or Inf, so their norm cannot clip anything."""


class NonFiniteUpdateError(ShardstepError, ArithmeticError):
    """An update made an infinity or NaN; raised by ``shard(..., trace_nonfinite=True)``."""


class CollectiveError(ShardstepError, RuntimeError):
    """A collective failed: a peer died or did not arrive in time."""


class RankMismatchError(CollectiveError):
    """The ranks differ in what they hold or in what they do next."""
