"""What Keras does around every update, as equations that the rules of this room write out: clipping before, the moving
average of the parameters after. (Decoupled weight decay is one line of each rule.)
"""

from shardstep.rules.functions import clip, lerp, maximum, norm
from shardstep.rules.language import Elements, inline


@inline
def clipped(grad: Elements, grad_factor: float, clipnorm: float, clipvalue: float) -> Elements:
    """g · c / max(‖g‖, c) over one variable, or each element in ±c; ``grad_factor`` is what global_clipnorm made."""
    if clipnorm > 0:
        result = grad * clipnorm / maximum(norm(grad), clipnorm)
    elif clipvalue > 0:
        result = clip(grad, -clipvalue, clipvalue)
    else:
        result = grad * grad_factor
    return result


@inline
def averaged(
    param: Elements, average: Elements, iterations: int, use_ema: bool, ema_momentum: float, ema_overwrite: bool
) -> tuple[Elements, Elements]:
    """a ← ema_momentum · a + (1 − ema_momentum) · θ, or θ itself at first; in some steps θ ← a.

    (As a lerp, since in float32 the two weights would not add up to one.)
    """
    if use_ema:
        average = param if iterations == 0 else lerp(average, param, 1 - ema_momentum)
        if ema_overwrite:
            param = average
    return param, average
