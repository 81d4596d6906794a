"""Equations that families share: averages of the gradient, and weight decay as a part of it."""

from shardstep.rules.functions import fma, lerp
from shardstep.rules.language import Elements, inline


@inline
def average(old: Elements, new: Elements, beta: float) -> Elements:
    """β old + (1 − β) new: exact where β is 0 or 1, which either form alone is not. For β > ½ rounded as torch.lerp."""
    return lerp(old, new, 1 - beta) if beta > 0.5 else lerp(new, old, beta)


@inline
def average_of_squares(old: Elements, new: Elements, beta: float) -> Elements:
    """β old + (1 − β) new², rounded as torch's fused kernels do."""
    return fma((1 - beta) * new, new, beta * old)


@inline
def with_decay(grad: Elements, param: Elements, weight_decay: float) -> Elements:
    """The gradient of the loss with weight_decay · θ² / 2 added to it."""
    direction = grad
    if weight_decay != 0:
        direction = fma(weight_decay, param, grad)
    return direction
