"""torch's learning-rate schedulers drive ours as they drive torch's own, step for step."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from shardstep.optim import AdamW

SCHEDULERS = {
    "StepLR": lambda o: lrs.StepLR(o, 3, gamma=0.5),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=15),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rates_and_the_parameters_are_torchs(name):
    runs = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        param = nn.Parameter(torch.linspace(-1, 1, 9))
        optimizer = optimizer_class([param], lr=0.05)
        scheduler = SCHEDULERS[name](optimizer)
        rates = []
        for step in range(12):
            param.grad = torch.cos(torch.arange(9.0) + step)
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        runs.append((rates, param.detach()))
    (ours, param), (theirs, reference) = runs
    assert ours == theirs
    assert len({rate for rate, _ in ours}) > 1
    torch.testing.assert_close(param, reference, rtol=1e-6, atol=1e-7)
