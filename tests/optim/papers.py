"""The equations of papers that torch has no optimizer for, in plain torch, as the papers write them.

Each is ``step(state, param, grad, t, **hyperparameters)`` with the step count t from 1: it changes ``state``, which is
empty at first, and returns the new param. Nothing is taken over from shardstep, and nothing is rearranged for speed.
"""

from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def lion(state: State, param: Tensor, grad: Tensor, t: int, *, lr, betas=(0.9, 0.99), weight_decay=0.0) -> Tensor:
    m = state.get("exp_avg", torch.zeros_like(param))
    c = betas[0] * m + (1 - betas[0]) * grad
    state["exp_avg"] = betas[1] * m + (1 - betas[1]) * grad
    return param - lr * (torch.sign(c) + weight_decay * param)


def lamb(
    state: State, param: Tensor, grad: Tensor, t: int, *, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0
) -> Tensor:
    m = state["exp_avg"] = betas[0] * state.get("exp_avg", 0.0) + (1 - betas[0]) * grad
    v = state["exp_avg_sq"] = betas[1] * state.get("exp_avg_sq", 0.0) + (1 - betas[1]) * grad**2
    r = m / (1 - betas[0] ** t) / (torch.sqrt(v / (1 - betas[1] ** t)) + eps)
    update = r + weight_decay * param
    size, change = param.norm().item(), update.norm().item()
    return param - lr * (size / change if size and change else 1.0) * update


def lars(
    state: State, param: Tensor, grad: Tensor, t: int, *, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3
) -> Tensor:
    size, change = param.norm().item(), grad.norm().item()
    local = trust_coefficient * size / (change + weight_decay * size) if size and change else 1.0
    step = lr * local * (grad + weight_decay * param)
    state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0.0) + step
    return param - state["momentum_buffer"]


def adan(
    state: State, param: Tensor, grad: Tensor, t: int, *, lr, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0
) -> Tensor:
    """In the paper's letters, whose βs are what is new; with the bias corrections of the authors' code."""
    b1, b2, b3 = (1 - beta for beta in betas)
    before = state.get("pre_grad", grad)
    m = state["exp_avg"] = (1 - b1) * state.get("exp_avg", 0.0) + b1 * grad
    v = state["exp_avg_diff"] = (1 - b2) * state.get("exp_avg_diff", 0.0) + b2 * (grad - before)
    n = state["exp_avg_sq"] = (1 - b3) * state.get("exp_avg_sq", 0.0) + b3 * (grad + (1 - b2) * (grad - before)) ** 2
    state["pre_grad"] = grad
    eta = lr / (torch.sqrt(n / (1 - betas[2] ** t)) + eps)
    moved = param - eta * (m / (1 - betas[0] ** t) + (1 - b2) * v / (1 - betas[1] ** t))
    return moved / (1 + lr * weight_decay)


def adabelief(
    state: State, param: Tensor, grad: Tensor, t: int, *, lr, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0
) -> Tensor:
    m = state["exp_avg"] = betas[0] * state.get("exp_avg", 0.0) + (1 - betas[0]) * grad
    s = state["exp_avg_var"] = betas[1] * state.get("exp_avg_var", 0.0) + (1 - betas[1]) * (grad - m) ** 2 + eps
    m, s = m / (1 - betas[0] ** t), s / (1 - betas[1] ** t)
    return param - lr * weight_decay * param - lr * m / (torch.sqrt(s) + eps)


def schedule_free(
    state: State,
    param: Tensor,
    grad: Tensor,
    t: int,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    warmup_steps=0,
    r=0.0,
    weight_lr_power=2.0,
) -> Tensor:
    """With x and z, as in the paper, where shardstep keeps y and z; param is y."""
    x, z = state.get("x", param), state.get("z", param)
    gamma = lr * min(1.0, t / warmup_steps) if warmup_steps else lr
    state["lr_max"] = max(gamma, state.get("lr_max", 0.0))
    weight = t**r * state["lr_max"] ** weight_lr_power
    state["weight_sum"] = state.get("weight_sum", 0.0) + weight
    c = weight / state["weight_sum"]
    v = state["exp_avg_sq"] = betas[1] * state.get("exp_avg_sq", 0.0) + (1 - betas[1]) * grad**2
    z = state["z"] = z - gamma * (grad / (torch.sqrt(v / (1 - betas[1] ** t)) + eps) + weight_decay * param)
    x = state["x"] = (1 - c) * x + c * z
    return (1 - betas[0]) * z + betas[0] * x


def shampoo(
    state: State,
    param: Tensor,
    grad: Tensor,
    t: int,
    *,
    lr,
    momentum=0.0,
    weight_decay=0.0,
    eps=1e-4,
    update_freq=1,
) -> Tensor:
    """With a ridge of at least 1e-5 of the norm, decoupled decay, and the momentum of SGD."""
    for side, square in (("left", grad @ grad.T), ("right", grad.T @ grad)):
        total = state[side] = state.get(side, 0.0) + square
        if (t - 1) % update_freq == 0:
            values, vectors = torch.linalg.eigh(total)
            ridge = max(eps, 1e-5 * total.norm().item())
            state[f"{side}_root"] = (vectors * (values.clamp(min=0) + ridge) ** -0.25) @ vectors.T
    update = state["left_root"] @ grad @ state["right_root"]
    update = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0.0) + update
    return param - lr * weight_decay * param - lr * update
