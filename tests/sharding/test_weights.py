"""Weights from safetensors straight into shards, onto ordinary models and onto models on the meta device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import shardstep as ss
from tests.sharding.models import BF16, Convolutions, Tied, two_groups


class Rotary(nn.Module):
    """A table that no file has, and one that a file has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 40)
        self.register_buffer("table", torch.empty(6), persistent=False)
        self.register_buffer("kept", torch.ones(3, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.table.copy_(torch.arange(6) / 7)


def reference(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    torch.manual_seed(11)
    model = make()
    with torch.no_grad():
        for buffer in model.state_dict().values():
            if not buffer.is_floating_point():
                buffer.add_(5)
    return {name: value.clone() for name, value in model.state_dict().items()}


def written(folder: Path, make: Callable[[], nn.Module]) -> str:
    """One file, in which a tied parameter is under its second name."""
    state = reference(make)
    state.pop("embed.weight", None)
    save_file(state, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def loaded(make: Callable[[], nn.Module], meta: bool, path: str, options: dict[str, Any]) -> list[str]:
    """The names of what is not as in the file."""
    torch.manual_seed(2)
    with torch.device("meta" if meta else "cpu"):
        model = make()
    sharded = ss.shard(model, ss.optim.AdamW(two_groups(model), lr=1e-2), weights=path, **options)
    wanted, precision = reference(make), options.get("precision")
    with ss.gathered(model):
        found = {name: value.detach().clone() for name, value in model.state_dict().items()}
    assert found.keys() == wanted.keys()
    assert sharded.bytes.peak.parameters
    params = precision.params if precision else None
    stored = {name: value.to(params) if params and value.ndim else value for name, value in wanted.items()}
    return [name for name in wanted if not torch.equal(found[name], stored[name])]


MODELS = [Tied, Convolutions, Rotary]


@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("options", [{}, {"stage": 2}, {"stage": 0}], ids=["3", "2", "0"])
def test_every_stage_begins_with_the_file(ranks, tmp_path, make, meta, options):
    path = written(tmp_path, make)
    if make is Convolutions and meta:
        options = {**options, "units": ["stages.*.*"]}
    for world_size in (1, 2):
        assert ranks(world_size).run(loaded, make, meta, path, options) == [[]] * world_size


def master_run(path: str) -> list[str]:
    """One step in bf16 from the file, whose values the masters must have in full; then the digest."""
    with torch.device("meta"):
        model = Rotary()
    optimizer = ss.optim.SGD(model.parameters(), lr=0.0)
    ss.shard(model, optimizer, weights=path, precision=BF16)
    digest = {name: values for name, what, values in model._shardstep.tensors() if what == "master"}
    wanted = reference(Rotary)
    return [name for name, values in digest.items() if not torch.equal(values, wanted[name])] + [model.table.tolist()]


def test_masters_have_the_files_precision_and_tables_are_computed(ranks, tmp_path):
    assert ranks(2).run(master_run, written(tmp_path, Rotary)) == [[(torch.arange(6) / 7).tolist()]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_floating_point_is_converted(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in nn.Linear(40, 40).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    model = nn.Linear(40, 40)
    ss.shard(model, ss.optim.AdamW(model.parameters()), weights=tmp_path)
    with ss.gathered(model):
        assert torch.equal(model.weight, state["weight"].float())


def index(folder: Path, **changes: str) -> Path:
    """A model in two files with an index."""
    state = reference(Tied)
    state.pop("head.weight")
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(state))}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {**files, **changes}}))
    return path


def test_an_index_of_several_files(ranks, tmp_path):
    index(tmp_path)
    assert ranks(2).run(loaded, Tied, True, str(tmp_path), {}) == [[], []]


def header(changes: dict[str, Any]) -> bytes:
    text = json.dumps({"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}} | changes).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


def overlapping(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(
        header({"bias": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}})
    )


def save(**tensors: Tensor) -> Callable[[Path], None]:
    good = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    kept = {name: tensor for name, tensor in {**good, **tensors}.items() if tensor.numel()}
    return lambda folder: save_file(kept, folder / "model.safetensors")


def write(content: bytes, name: str = "model.safetensors") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None  # type: ignore[return-value]


def truncated(folder: Path) -> None:
    save()(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])


def two_files(folder: Path) -> None:
    save()(folder)
    write(b"", "other.safetensors")(folder)


def index_of(files: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save()(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(files))

    return make


REFUSED = {
    "missing": (save(bias=torch.zeros(0)), r"nothing else; missing: 'bias'$"),
    "superfluous": (save(more=torch.zeros(1)), r"nothing else; not of the model: 'more'$"),
    "both": (save(bias=torch.zeros(0), more=torch.zeros(1)), r"missing: 'bias'; not of the model: 'more'$"),
    "shape": (save(bias=torch.zeros(3)), r"expected 'bias' of shape \(2,\), got \(3,\) in .*model.safetensors"),
    "dtype": (save(bias=torch.zeros(2).long()), r"'bias' in torch.float32 or another floating point, got I64 in"),
    "truncated": (truncated, r"to be a whole safetensors file, but: .*incomplete metadata"),
    "empty": (write(b""), r"to be a whole safetensors file, but: .*header too small"),
    "long header": (write(b"\xff" * 99), r"to be a whole safetensors file, but: .*header too large"),
    "no json": (write((9).to_bytes(8, "little") + b"{" * 9), r"whole safetensors file, but: .*invalid JSON"),
    "overlap": (overlapping, r"to be a whole safetensors file, but: "),
    "two files": (two_files, r"found \['model.safetensors', 'other.safetensors'\]; name the file that is meant"),
    "no file": (lambda folder: None, r"expected one file \*.safetensors.index.json or one file .* found \[\]"),
    "no map": (index_of({"weight_map": [1]}), r"to have a 'weight_map' of names of tensors to names of files"),
    "no index": (write(b"[[", "x.safetensors.index.json"), r"to be an index in JSON, but it cannot be read: "),
    "elsewhere": (index_of({"weight_map": {"bias": "../m.safetensors"}}), r"that lie beside it, got '../m.safet"),
    "wrong file": (
        index_of({"weight_map": {"weight": "model.safetensors", "b": "model.safetensors"}}),
        r"model.safetensors to hold 'b', as model.safetensors.index.json says, but it does not",
    ),
    "no such file": (index_of({"weight_map": {"weight": "m.safetensors"}}), r"m.safetensors .*: No such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_one_sentence_and_changes_nothing(tmp_path, case):
    make, sentence = REFUSED[case]
    make(tmp_path)
    model = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = ss.optim.AdamW(model.parameters())
    with pytest.raises(ss.ConfigError, match=sentence):
        ss.shard(model, optimizer, weights=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ss.shard(model, optimizer)


@pytest.mark.parametrize("path", [7, "nowhere.safetensors"])
def test_paths(path):
    model = nn.Linear(2, 2)
    with pytest.raises(ss.ConfigError, match=r"expected weights to be"):
        ss.shard(model, ss.optim.AdamW(model.parameters()), weights=path)


def only_rank_0_has_it(folder: str) -> str:
    rank, model = torch.distributed.get_rank(), nn.Linear(2, 2)
    optimizer = ss.optim.AdamW(model.parameters())
    with pytest.raises(ss.RankMismatchError, match=r"file of weights of rank 1 \(None\) differs from rank 0's \("):
        ss.shard(model, optimizer, weights=None if rank else Path(folder) / "model.safetensors")
    path = Path(folder) / f"model{rank or ''}.safetensors"
    with pytest.raises(ss.ConfigError) as refused:
        ss.shard(model, optimizer, weights=path)
    return str(refused.value)


def test_a_file_that_one_rank_lacks_is_an_error_on_all(ranks, tmp_path):
    save()(tmp_path)
    one, other = ranks(2).run(only_rank_0_has_it, str(tmp_path))
    assert (
        one
        == other
        == "rank 1: expected weights to be a file or a folder, but there is nothing at "
        + str(tmp_path / "model1.safetensors")
    )


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    save()(tmp_path)
    path = tmp_path / "model.safetensors"
    model = nn.Linear(2, 2)
    monkeypatch.setattr(ss.sharding.shard.__globals__["Buffers"], "follow_rank_0", lambda self: path.write_bytes(b""))
    with pytest.raises(ss.ConfigError, match="to stay as it is while it is read, but it became shorter"):
        ss.shard(model, ss.optim.AdamW(model.parameters()), weights=path)
