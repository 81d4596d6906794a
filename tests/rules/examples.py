"""Rules of every locality, as a user would write them."""
# ruff: noqa: F821, SIM108

import math

from shardstep.rules.language import inline, rule, state, zeros

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 2


@rule
def lion(param, grad, exp_avg=zeros, *, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    update = sign(betas[0] * exp_avg + (1 - betas[0]) * grad)
    exp_avg = betas[1] * exp_avg + (1 - betas[1]) * grad
    param = param - lr * (update + weight_decay * param)
    return param, exp_avg


@rule
def sgd(
    param,
    grad,
    momentum_buffer=zeros,
    *,
    step,
    lr=1e-3,
    momentum=0.9,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
):
    direction = -grad if maximize else grad
    if weight_decay != 0:
        direction = direction + weight_decay * param
    if momentum != 0:
        if step == 1:
            momentum_buffer = direction
        else:
            momentum_buffer = momentum * momentum_buffer + (1 - dampening) * direction
        direction = direction + momentum * momentum_buffer if nesterov else momentum_buffer
    return param - lr * direction, momentum_buffer


@inline
def moment(old, new, beta, power=1):
    """The moving average of new ** power."""
    if power == 1:
        value = new
    else:
        value = new * new
    return beta * old + (1 - beta) * value


@inline
def corrected(value, beta, step):
    return value / (1 - beta**step)


@rule
def lamb(
    param, grad, exp_avg=zeros, exp_avg_sq=zeros, *, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0
):
    beta1, beta2 = betas
    exp_avg = moment(exp_avg, grad, beta1)
    exp_avg_sq = moment(exp_avg_sq, grad, beta2, power=2)
    update = corrected(exp_avg, beta1, step) / (sqrt(corrected(exp_avg_sq, beta2, step)) + eps)
    update += weight_decay * param
    size, change = norm(param), norm(update)
    trust = where((size > 0) and (change > 0), size / change, 1.0)
    return param - lr * trust * update, exp_avg, exp_avg_sq


@rule
def rows_in_8_bits(
    param, grad, exp_avg=state(dtype="dynamic8"), row=state(shape="row"), *, lr=1e-2, beta=0.9, eps=1e-8
):
    """Elements that share a scale are in several rows, and rows have parts of several scales."""
    row = beta * row + (1 - beta) * row_mean(grad * grad)
    exp_avg = beta * exp_avg + (1 - beta) * grad / (sqrt(row) + eps)
    return param - lr * (exp_avg - 0.5 * col_mean(exp_avg)), exp_avg, row


@rule
def adafactor(
    param,
    grad,
    row=state(shape="row"),
    column=state(shape="column"),
    *,
    step,
    lr=1e-2,
    decay=-0.8,
    eps=(1e-30, 1e-3),
    clip_at=1.0,
):
    beta = 1 - step**decay
    square = grad**2 + eps[0]
    row = lerp(row_mean(square), row, beta)
    column = lerp(col_mean(square), column, beta)
    update = grad * rsqrt(row / mean(row)) * rsqrt(column)
    scale = maximum(1.0, sqrt(mean(update**2)) / clip_at)
    return param - lr * maximum(eps[1], sqrt(mean(param**2))) * update / scale, row, column


@inline
def newton_schulz(x, rounds):
    a, b, c = COEFFICIENTS
    x = x / (norm(x) + 1e-7)
    for _ in range(rounds):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


@rule
def muon(param, grad, momentum_buffer=zeros, *, lr=0.02, momentum=0.95, weight_decay=0.1):
    momentum_buffer = momentum * momentum_buffer + grad
    update = newton_schulz(grad + momentum * momentum_buffer, ROUNDS)
    return param * (1 - lr * weight_decay) - lr * math.tau * update, momentum_buffer
