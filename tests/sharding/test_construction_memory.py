"""A model that no rank could hold whole: the operating system gives a rank no more than its share and a few units."""

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardstep as ss
from tests.conftest import Team

LAYERS, WIDTH = 16, 1600
LAYER_BYTES = 4 * WIDTH * WIDTH
MODEL_BYTES = LAYERS * LAYER_BYTES
CAP_BYTES = MODEL_BYTES // 2 + 4 * LAYER_BYTES

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's limits on memory")


class Large(nn.Module):
    """164 MB of parameters in 16 blocks."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(LAYERS))
        self.blocks = nn.ModuleList(blocks)
        with torch.no_grad():
            for block in self.blocks:
                block[0].weight.mul_(0.5)


@contextmanager
def capped() -> Iterator[None]:
    """Let this process have ``CAP_BYTES`` more of memory of its own than it has."""
    gc.collect()  # what earlier tests left
    status = Path("/proc/self/status").read_text()
    has = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (has + CAP_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def warm() -> None:
    """Let torch import what it needs to shard a model: 125 MB."""
    with torch.device("meta"):
        small = nn.Linear(1, 1)
    ss.shard(small, ss.optim.SGD(small.parameters()))


def built_whole() -> str:
    with capped(), pytest.raises(RuntimeError) as refused:
        Large()
    return str(refused.value)


def sharded(how: str, folder: str) -> tuple[float, int]:
    """The sum of one block's values, and the most bytes of parameters that the engine held."""
    torch.manual_seed(3)
    with capped():
        if how == "partitioned":
            with ss.partitioned():
                model: nn.Module = Large()
        else:
            with torch.device("meta"):
                model = Large()
        optimizer = ss.optim.SGD(model.parameters())
        handle = ss.shard(model, optimizer, weights=folder if how == "weights" else None)
        with ss.gathered(model.blocks[5]):
            total = model.blocks[5][0].weight.double().sum().item()
    return total, handle.bytes.peak.parameters


@pytest.fixture(scope="module")
def fresh() -> Iterator[Team]:
    """Two ranks without memory that earlier tests have freed, which a model could be built in."""
    team = Team(2)
    yield team
    team.stop()


def test_a_model_that_no_rank_could_hold_is_built(fresh, tmp_path):
    torch.manual_seed(3)
    model = Large()
    wanted = model.blocks[5][0].weight.double().sum().item()
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    fresh.run(warm)
    assert all("can't allocate memory" in refusal for refusal in fresh.run(built_whole))
    for how in ("partitioned", "meta", "weights"):
        for total, peak_bytes in fresh.run(sharded, how, str(tmp_path)):
            assert total == (2 * wanted if how == "meta" else wanted)
            assert MODEL_BYTES // 2 < peak_bytes < MODEL_BYTES // 2 + 2 * LAYER_BYTES
