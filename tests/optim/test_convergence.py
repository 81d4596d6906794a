"""Every optimizer of the table finds minima: of a quadratic, of Rosenbrock's function, of a classifier of digits."""

from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from shardstep.optim import AdamWScheduleFree, Optimizer
from tests.optim.table import ROWS, Row


def quadratic(x: Tensor) -> Tensor:
    scales = torch.tensor([1.0, 3.0, 10.0])
    return (scales * (x - torch.tensor([1.0, -2.0, 0.5])).square()).sum() / 2


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]).square() + 100 * (x[1] - x[0].square()).square()


def minimized(row: Row, function, start: list[float], lr: float, steps: int) -> tuple[float, float]:
    """The values at the start and at the end; the rate falls to zero. Rules of matrices get one of a single row."""
    param = nn.Parameter(torch.tensor([start] if row.locality == "matrix" else start))
    optimizer = row.kind([param], lr=lr, **(row.hyper or {}))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    first = function(param.flatten()).item()
    for _ in range(steps):
        optimizer.zero_grad()
        function(param.flatten()).backward()
        optimizer.step()
        scheduler.step()
    to_average(optimizer)
    return first, function(param.flatten()).item()


def to_average(optimizer: Optimizer) -> None:
    if isinstance(optimizer, AdamWScheduleFree):
        optimizer.eval()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_quadratic(row):
    first, last = minimized(row, quadratic, [3.0, 1.0, -2.0], row.rates[0], 200)
    assert last < 1e-3 * first


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rosenbrocks_valley(row):
    first, last = minimized(row, rosenbrock, [-1.2, 1.0], row.rates[1], 1000)
    assert last < 0.06 * first


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_digits(row):
    """Ten epochs of batches; Rprop, as it is meant, gets the whole data set in every step."""
    torch.manual_seed(0)
    images, labels = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = row.optimizer(model.parameters(), lr=row.rates[2], **(row.hyper or {}))
    batches = [torch.arange(len(labels))] if row.name == "Rprop" else torch.arange(len(labels)).split(128)
    for _ in range(150 // len(batches)):
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    to_average(optimizer)
    assert (model(images).argmax(1) == labels).float().mean() > 0.9
