"""Rules with mistakes. Each line that is wrong ends in ``# code: what the carets are under``, several with ``|``.

They are plain functions here; the tests put @rule above them.
"""
# ruff: noqa

import random
import time
from math import sqrt as c_sqrt

import torch

from shardstep.rules.language import inline, rule, state, zeros

ROUNDS = 65
HUGE = 10**400
TABLE = {"a": 1.0}
SCALES = (1.0, 2.0)


def helper(x):
    return x


@inline
def twice(x):
    return x + x


@inline
def again(x):
    return again(x) * 2  # E25: again(x)


@inline
def typo(x):
    return x * facter  # E02: facter


@rule
def inner(param, grad, m=zeros, *, step, lr=0.1):
    m = m + grad
    return param - lr * m / step, m


def unsupported_statements(param, grad):
    while True:  # E01: while True:
        param = grad
    try:  # E01: try:
        param = grad
    except ValueError:
        pass
    import math  # E01: import math

    assert True  # E01: assert True
    del grad  # E01: del grad
    return param - grad


def unsupported_expressions(param, grad):
    a = [grad]  # E01: [grad]
    b = (c := grad)  # E01: c := grad
    d = lambda x: x  # E01: lambda x: x
    e = None  # E01: None
    f = g = grad  # E01: f = g = grad
    param + grad  # E01: param + grad
    return a + b + d + e + f + g + param


def early_return(param, grad, *, flag=False):
    if flag:
        return param - grad  # E01: return param - grad
    return param + grad


def undefined(param, grad, exp_avg=zeros):
    exp_avg = exp_avg + gradd  # E02: gradd
    return param - exp_av * MOMENTUM, exp_avg  # E02: exp_av | E02: MOMENTUM


def captured_dictionary(param, grad):
    return param - grad * TABLE  # E02: TABLE


def one_branch(param, grad, *, nesterov=False):
    if nesterov:
        update = grad
    return param - update  # E03: update


def foreign_calls(param, grad, m=zeros):
    print(grad)  # E04: print
    m.add_(grad)  # E04: m.add_
    x = torch.sqrt(grad)  # E04: torch.sqrt(grad)
    y = c_sqrt(grad)  # E04: c_sqrt(grad)
    z = helper(grad)  # E04: helper(grad)
    w = grad.sum()  # E04: grad.sum
    v = sqroot(grad)  # E04: sqroot(grad)
    u = min(grad, x)  # E04: min(grad, x)
    t = param(grad)  # E04: param(grad)
    return param - x - y - z - w - v - u - t, m + sqrt  # E04: sqrt


def parts(param, grad):
    param[0] = 1.0  # E05: param[0]
    first = param[1:]  # E05: param[1:]
    second = grad[0]  # E05: grad[0]
    return param - first - second


def data_dependent(param, grad):
    if grad > 0:  # E06: grad > 0
        param = param - grad
    return param if norm(grad) > 1 else grad  # E06: norm(grad) > 1


def unknown_bounds(param, grad, *, rounds=5, betas=(0.1, 0.2)):
    for _ in range(rounds):  # E07: rounds
        param = param - grad
    for _ in range(0.5):  # E07: 0.5
        param = param - grad
    for x in param:  # E07: param
        param = x
    for i in range(2):
        param = param * betas[rounds]  # E07: betas[rounds]
    return param


def too_many_rounds(param, grad):
    for _ in range(ROUNDS):  # E08: ROUNDS
        param = param - grad
    for _ in range(9):
        for _ in range(8):  # E08: 8
            param = param - grad
    return param


def whole_numbers(param, grad, count=state(dtype="int64")):  # E09: count
    return param - grad, count + 1


def truth_and_numbers(param, grad, m=zeros, *, nesterov=False):
    a = grad // 2  # E10: grad // 2
    b = (grad > 0) * param  # E10: (grad > 0) * param
    c = grad & param  # E10: grad & param
    d = where(grad, a, b)
    e = not grad  # E10: not grad
    f = where(param, grad, 0)  # E10: where(param, grad, 0)
    g = 1 - nesterov  # E10: 1 - nesterov
    if nesterov == True:  # E10: nesterov == True
        g = param
    return param - c - d - f - where(e, 1, g), m > 0  # E10: m > 0


def truth_in_branches(param, grad, *, flag=False):
    if flag:  # E10: flag
        large = grad > 1
    else:
        large = grad > 2
    return where(large, param, grad)


def large_numbers(param, grad, *, lr=1e300):
    a = 1e39 * grad  # E11: 1e39
    b = 10**400 * lr + 1 / 0  # E11: 1 / 0
    c = lr * HUGE  # E11: HUGE
    return param - a - b - c


def large_start(param, grad, m=state(70_000, dtype="float16")):  # E11: m
    return param - grad, m + 1


def small_number(param, grad):
    return param - grad / (abs(grad) + 1e-60)  # E12: 1e-60


def small_start(param, grad, m=state(1e-8, dtype="float16")):  # E12: m
    return param - grad, m + 1


def too_early(param, grad):
    param = param - update  # E13: update
    update = grad
    return param - update


def idle_state(param, grad, m=zeros, anchor=state("param")):
    return param - grad + anchor, m, anchor  # E14: m


def unused_results(param, grad, m=zeros):
    update = grad * 2  # E14: update
    _kept = grad
    m = m + grad  # E14: m
    a, b = SCALES  # E14: b
    return param - grad * a, param


def starts_from_grad(param, grad, m=state("grad")):  # E15: m
    return param - grad, m + grad


def starts_from_param(param, grad, m=state("param", shape="row")):  # E15: m
    return param - grad, m + row_mean(grad)


def assigned_gradient(param, grad, *, maximize=False):
    if maximize:
        grad = -grad  # E16: grad
    grad += param  # E16: grad
    grad[0] = 0  # E16: grad[0]
    grad.mul_(2)  # E16: grad.mul_
    return param - grad


def assigned_hyperparameter(param, grad, *, lr=0.1):
    lr = lr * 2  # E17: lr
    return param - lr * grad


def unchanged_param(param, grad, m=zeros):
    new = param - grad
    param = param
    return param, m + new  # E18: param


def stored_twice(param, grad, m=zeros):
    m = m + grad  # E19: m
    m = grad * grad
    return param - grad, m


def stored_in_branches(param, grad, m=zeros, *, flag=False):
    if flag:
        m = m + grad  # E19: m
    else:
        m = m - grad  # E19: m
    m = grad * 2
    return param - grad, m


def returned_twice(param, grad, m=zeros, v=zeros):
    m = m + grad
    return param - m - v, m, m  # E19: m


def swapped(param, grad, m=zeros, v=zeros):
    m, v = m + grad, v + grad
    return param - m, v, m  # E19: v | E19: m


def shapes(param, grad, row=state(shape="row"), total=state(shape="tensor")):
    a = param @ param  # E20: param @ param
    b = param + param.T  # E20: param + param.T
    c = row_mean(row)  # E20: row_mean(row)
    d = SCALES * grad  # E20: SCALES * grad
    e = row.T  # E20: row.T
    return param - a - b - c - d - e, grad, row_mean(grad)  # E20: grad | E20: row_mean(grad)


def squares(param, grad, left=state(shape="row_pair"), right=state(shape="column_pair")):
    a = left + right  # E20: left + right
    b = identity(grad)  # E20: identity(grad)
    c = left @ right  # E20: left @ right
    d = left % 2 + grad % 2  # E20: left % 2 | E20: grad % 2
    return param - a - b - c - d, right, param  # E20: right | E20: param


def coded_square(param, grad, left=state(shape="row_pair", dtype="dynamic8")):  # E20: left
    return param - left @ grad, left + 1


def square_of_param(param, grad, left=state("param", shape="row_pair")):  # E15: left
    return param - left @ grad, left + 1


def remainders(param, grad, *, step, lr=0.1):
    if step % 0 == 1 % 0:  # E11: 1 % 0
        param = param - lr * grad
    return param - grad


def unknown_shape(param, grad, m=state(shape="block")):  # E20: m
    return param - grad, m + 1


def reduced_scalar(param, grad, *, lr=0.1):
    a = mean(lr)  # E21: mean(lr)
    b = norm(norm(grad))  # E21: norm(norm(grad))
    return param - a * b


def chains_and_text(param, grad):
    a = 0 < grad < 1  # E22: 0 < grad < 1
    b = grad is param  # E22: grad is param
    c = "l2"  # E22: "l2"
    return where(a or b, param, grad) + c


def number_as_condition(param, grad, *, weight_decay=0.1):
    if weight_decay:  # E23: weight_decay
        param = param - weight_decay * param
    return param - grad


def wrong_arguments(param, grad, m=zeros, *, lr=0.1):
    a = sqrt()  # E24: sqrt()
    b = clip(grad, 1)  # E24: clip(grad, 1)
    c = maximum(grad, y=2)  # E24: maximum(grad, y=2)
    d = twice(grad, grad)  # E24: twice(grad, grad)
    e = twice(y=grad) + twice(grad, x=grad)  # E24: twice(y=grad) | E24: twice(grad, x=grad)
    f, m = inner(param, grad, m)  # E24: inner(param, grad, m)
    g = sqrt(*SCALES)  # E24: *SCALES
    return param - a - b - c - d - e - f - g, m


def recursive(param, grad):
    return param - again(grad)


def wrong_count(param, grad, *, betas=(0.1, 0.2)):
    a, b, c = betas  # E26: a, b, c = betas
    d, e = grad  # E26: d, e = grad
    f = betas[2]  # E26: betas[2]
    return param - a - b - c - d - e - f


def too_few_returned(param, grad, m=zeros):
    m = m + grad
    return param - m  # E26: return param - m


def no_return(param, grad):  # E26: def no_return(param, grad):
    param = param - grad  # E14: param


def starred(param, grad, *states):  # E27: *states
    return param - grad


def mutable(param, grad, *, betas=[0.9]):  # E27: betas
    return param - grad


def generator(param, grad):  # E27: def generator(param, grad):
    yield param


def wrong_inputs(weights, grad):  # E27: def wrong_inputs(weights, grad):
    return weights


def state_as_number(param, grad, m=0.0):  # E27: m
    return param, m


def reserved(param, grad, step=zeros):  # E28: step
    return param - grad, step


def shadowing_argument(param, grad, *, clip=1.0):  # E28: clip
    return param - grad


def named_as_a_group(param, grad, *, params=1.0):  # E28: params
    return param - params * grad


def given_step(param, grad, *, step=1):  # E28: step
    return param - grad / step


def shadowing(param, grad):
    norm = grad * grad  # E28: norm
    step = 1.0  # E28: step
    return param - step * norm(grad) - grad


def chance(param, grad):
    a = torch.rand(3)  # E29: torch.rand(3)
    b = random.random() * time.time()  # E29: random.random() | E29: time.time()
    return param - a - b * grad


def text_default(param, grad, *, mode="l2"):  # E30: mode
    return param - grad


def nan_default(param, grad, *, lr=float("nan")):  # E30: lr
    return param - lr * grad


def inside_a_call(param, grad):
    return param - typo(grad) - typo(param)
