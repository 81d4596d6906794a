"""A model that no rank could hold whole: the operating system gives a rank no more than its share and a few units."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardstep as ss

LAYERS, WIDTH = 16, 1600
LAYER_BYTES = 4 * WIDTH * WIDTH
MODEL_BYTES = LAYERS * LAYER_BYTES
CAP_BYTES = MODEL_BYTES // 2 + 5 * LAYER_BYTES

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
    status = Path("/proc/self/status").read_text()
    has = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (has + CAP_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


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
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """A file of a whole model, and the sum of one block's values."""
    torch.manual_seed(3)
    model, folder = Large(), tmp_path_factory.mktemp("weights")
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    return str(folder), model.blocks[5][0].weight.double().sum().item()


@pytest.mark.parametrize("how", ["partitioned", "meta", "weights"])
def test_a_model_that_no_rank_could_hold_is_built(ranks, whole, how):
    folder, wanted = whole
    assert all("can't allocate memory" in refusal for refusal in ranks(2).run(built_whole))
    for total, peak_bytes in ranks(2).run(sharded, how, folder):
        assert total == (2 * wanted if how == "meta" else wanted)
        assert MODEL_BYTES // 2 < peak_bytes < MODEL_BYTES // 2 + 2 * LAYER_BYTES
