"""Our Keras optimizers against Keras's own on its torch back end, over 100 steps with every option."""

import inspect
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

os.environ["KERAS_BACKEND"] = "torch"

import keras
from keras.src.backend.common import dtypes

import shardstep as ss
from shardstep.optim.keras.optimizer import Common, CommonButDecay

STEPS = 100
SHAPES = [(6, 4), (5,)]
NAMES = ss.optim.keras.__all__

ALL = [(name, {}) for name in NAMES]
OWN = [
    ("Adam", {"amsgrad": True, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3}),
    ("AdamW", {"weight_decay": 0.1, "amsgrad": True}),
    ("Adamax", {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}),
    ("Nadam", {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "epsilon": 1e-3}),
    ("RMSprop", {"momentum": 0.5, "rho": 0.8}),
    ("Adagrad", {"initial_accumulator_value": 0.5, "epsilon": 1e-2}),
    ("Adadelta", {"rho": 0.8, "epsilon": 1e-3}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"nesterov": True}),
    ("Lion", {"beta_1": 0.8, "beta_2": 0.95}),
    ("Lamb", {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}),
    ("Adafactor", {"beta_2_decay": -0.5, "epsilon_2": 1e-2, "clip_threshold": 0.5, "relative_step": False}),
    ("Ftrl", {"learning_rate_power": -0.7, "l2_regularization_strength": 0.1, "beta": 0.2}),
    ("Ftrl", {"l1_regularization_strength": 0.05, "l2_shrinkage_regularization_strength": 0.02}),
]
EMA = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 7, "weight_decay": 0.05}
SHARED = [
    ("Adam", {"weight_decay": 0.1, "clipnorm": 0.5}),
    ("SGD", {"weight_decay": 0.1, "clipvalue": 0.3}),
    ("SGD", {"global_clipnorm": 0.7}),
    ("RMSprop", {"use_ema": True}),
    ("Lamb", {**EMA, "global_clipnorm": 0.7}),
    ("Adafactor", {**EMA, "clipvalue": 0.3}),
    ("Ftrl", {**EMA, "clipnorm": 2.0}),
    ("Nadam", EMA),
    ("Adagrad", EMA),
]


def gradients(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Random, of sizes from 1e-5 to 1."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) * 10.0 ** -(step % 6)
            for shape in SHAPES
        ]
        for step in range(STEPS)
    ]


def rate(step: int) -> float:
    """Decays, in numbers that float32 holds."""
    return 2.0**-8 * 0.5 ** (step // 30)


def starts(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in SHAPES]


def ours(name: str, options: dict[str, Any], dtype: torch.dtype) -> list[np.ndarray]:
    params = [nn.Parameter(start.clone()) for start in starts(dtype)]
    optimizer = getattr(ss.optim.keras, name)(params, learning_rate=rate, **options)
    for grads in gradients(dtype):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    before = [param.detach().numpy().copy() for param in params]
    optimizer.finalize_variable_values()
    return before + [param.detach().numpy().copy() for param in params]


def theirs(name: str, options: dict[str, Any], dtype: torch.dtype) -> list[np.ndarray]:
    keras.config.set_floatx(str(dtype).removeprefix("torch."))
    try:
        variables = [keras.Variable(start.numpy()) for start in starts(dtype)]
        optimizer = getattr(keras.optimizers, name)(learning_rate=rate(0), **options)
        for step, grads in enumerate(gradients(dtype)):
            optimizer.learning_rate = rate(step)
            optimizer.apply(grads, variables)
        before = [variable.value.detach().numpy().copy() for variable in variables]
        optimizer.finalize_variable_values(variables)
        return before + [variable.value.detach().numpy().copy() for variable in variables]
    finally:
        keras.config.set_floatx("float32")


def assert_alike(name: str, options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    for mine, wanted in zip(ours(name, options, dtype), theirs(name, options, dtype), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=tolerance, atol=tolerance)


# Keras's Nadam converts tensors to numpy in a way that numpy 2 warns about.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("name", "options"), ALL + OWN + SHARED, ids=str)
def test_a_hundred_steps_give_what_keras_gives(monkeypatch, name, options, dtype, tolerance):
    # Without this, some of Keras's operations (mean, maximum, minimum) compute float64 in float32: see the next test.
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    assert_alike(name, options, dtype, tolerance)


@pytest.mark.parametrize(
    ("name", "options"), [("Adafactor", {}), ("Adam", {"clipnorm": 0.5}), ("SGD", {"global_clipnorm": 0.7})], ids=str
)
def test_keras_itself_leaves_float64_in_means_and_norms(name, options):
    assert_alike(name, options, torch.float64, 1e-7)
    with pytest.raises(AssertionError):
        assert_alike(name, options, torch.float64, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_defaults_are_keras_own(name):
    own = inspect.signature(getattr(ss.optim.keras, name)).parameters
    wanted = inspect.signature(getattr(keras.optimizers, name).__init__).parameters
    shared = {*Common.__annotations__, *CommonButDecay.__annotations__}
    left_out = {"self", "name", "kwargs", "loss_scale_factor", "gradient_accumulation_steps"}
    expected = {n: p.default for n, p in wanted.items() if n not in left_out | shared or n in own}
    assert {n: p.default for n, p in own.items() if n not in ("params", "common")} == expected
    assert {n for n in wanted if n in shared} == shared
