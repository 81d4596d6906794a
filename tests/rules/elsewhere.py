"""An inline function in another file, for rules that import it."""

from shardstep.rules.language import inline

HALF = 0.5


@inline
def halved(x):
    return x * HALF
