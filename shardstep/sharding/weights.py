"""The door to files of weights: safetensors, one file or several with an index, straight into shards.

Each rank reads the bytes of its own shard and no others; below stage 3 the ranks then gather each other's. Headers are
checked by safetensors' own parser, and against the model, before anything is read or changed. Floating-point values
of any width are taken, and rounded once, to the master's dtype. Nothing in a file is ever executed, and nothing is
mapped into memory: a file that shrinks while it is read is an error, not the end of the process.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shardstep.collectives import BUILDING, Group
from shardstep.errors import ConfigError
from shardstep.layout import Layout
from shardstep.sharding.modules import weights

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CHUNK_NUMEL = 1 << 20
"""Elements that are read at a time."""

_INDEX_ENDING = ".safetensors.index.json"
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Entry:
    """Where a file holds one tensor."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def read(self, into: Tensor, first: int) -> None:
        """Fill the 1-D ``into`` with the elements from ``first`` on, in its own dtype."""
        dtype = _DTYPES[self.dtype]
        with self.path.open("rb") as file:
            file.seek(self.begin + first * dtype.itemsize)
            for start in range(0, into.numel(), _CHUNK_NUMEL):
                part = into[start : start + _CHUNK_NUMEL]
                raw = torch.empty(part.numel() * dtype.itemsize, dtype=torch.uint8)
                if file.readinto(raw.numpy().data) != raw.numel():
                    raise ConfigError(f"expected {self.path} to stay as it is while it is read, but it became shorter")
                part.copy_(raw != 0 if dtype == torch.bool else raw.view(dtype))


class FromFile:
    """The weights in a file, for a model whose parameters and persistent buffers it has."""

    def __init__(self, path: object, model: nn.Module, group: Group) -> None:
        """What is wrong with the file is kept in ``problem``, for all ranks to hear of."""
        self._group = group
        self.problem: str | None = None
        self.fingerprint = ""
        try:
            found = entries(path)
            self._buffers = _persistent_buffers(model)
            self._entries = _matched(found, model, self._buffers)
            self.fingerprint = _fingerprint(found)
        except ConfigError as error:
            self.problem = str(error)

    def fill(self, run: Tensor, start: int, layout: Layout, parameters: Sequence[nn.Parameter], where: str) -> None:
        shard_numel = layout.shard_numel(self._group.size)
        own = run if run.numel() == shard_numel else run[self._group.rank * shard_numel :][:shard_numel]
        begin = self._group.rank * shard_numel
        for slot in layout.slots:
            first, end = max(slot.offset, begin), min(slot.end, begin + shard_numel)
            if first < end:
                self._entries[slot.name].read(own[first - begin : end - begin], first - slot.offset)
        if own is not run:
            self._group.all_gather(run, own, tag=BUILDING, label=f"gather of the weights of {where}").wait()

    def load_buffers(self, model: nn.Module, device: torch.device) -> None:
        """Load the persistent buffers; those on meta come to be on ``device``."""
        for name, buffer in self._buffers.items():
            values = torch.empty(buffer.numel(), dtype=buffer.dtype)
            self._entries[name].read(values, 0)
            if buffer.is_meta:
                owner, _, key = name.rpartition(".")
                model.get_submodule(owner)._buffers[key] = values.view(buffer.shape).to(device)
            else:
                with torch.no_grad():
                    buffer.copy_(values.view(buffer.shape))


def entries(path: object) -> dict[str, Entry]:
    """All tensors of one file, of the files of an index, or of a folder that holds either."""
    if not isinstance(path, str | Path):
        raise ConfigError(f"expected weights to be the path of a file or folder, got {path!r}")
    file = _in_folder(Path(path)) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"expected weights to be a file or a folder, but there is nothing at {file}")
    return _indexed(file) if file.name.endswith(".json") else _header(file)


def _in_folder(folder: Path) -> Path:
    for ending in (_INDEX_ENDING, ".safetensors"):
        found = sorted(file for file in folder.iterdir() if file.name.endswith(ending))
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise ConfigError(
        f"expected one file *{_INDEX_ENDING} or one file *.safetensors in {folder}, found "
        f"{[file.name for file in found]}; name the file that is meant"
    )


def _indexed(index: Path) -> dict[str, Entry]:
    """The tensors that an index of Hugging Face's form names."""
    try:
        read = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"expected {index} to be an index in JSON, but it cannot be read: {_first(error)}") from error
    names = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ConfigError(f"expected {index} to have a 'weight_map' of names of tensors to names of files")
    for file in names.values():
        if file != Path(file).name or not file.endswith(".safetensors"):
            raise ConfigError(f"expected {index} to name files *.safetensors that lie beside it, got {file!r}")
    headers = {file: _header(index.parent / file) for file in sorted(set(names.values()))}
    for name, file in names.items():
        if name not in headers[file]:
            raise ConfigError(f"expected {index.parent / file} to hold {name!r}, as {index.name} says, but it does not")
    return {name: headers[file][name] for name, file in names.items()}


def _header(path: Path) -> dict[str, Entry]:
    """What the file says that it holds; safetensors has checked that its bytes are all there, and used once."""
    try:
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            numel = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(numel))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ConfigError(f"expected {path} to be a whole safetensors file, but: {_first(error)}") from error
    return {
        name: Entry(path, tensor["dtype"], tuple(tensor["shape"]), 8 + numel + tensor["data_offsets"][0])
        for name, tensor in header.items()
        if name != "__metadata__"
    }


def _matched(found: Mapping[str, Entry], model: nn.Module, buffers: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The entry of each parameter, by its first name, and of each buffer; a ConfigError if they do not fit."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    known = {*buffers, *(name for tied in names.values() for name in tied)}
    superfluous = [name for name in found if name not in known]
    wanted: list[tuple[str, list[str], Tensor]]
    wanted = [(name, names[id(parameter)], parameter) for name, parameter in weights(model)]
    wanted += [(name, [name], buffer) for name, buffer in buffers.items()]
    missing = [name for name, tied, _ in wanted if not any(other in found for other in tied)]
    if missing or superfluous:
        raise ConfigError(
            "expected the file of weights to have every parameter and persistent buffer of the model and nothing "
            f"else; {_listed('missing', missing)}{_listed('not of the model', superfluous)}".rstrip("; ")
        )
    matched = {}
    for name, tied, tensor in wanted:
        entry = matched[name] = found[next(other for other in tied if other in found)]
        if entry.shape != tuple(tensor.shape):
            raise ConfigError(f"expected {name!r} of shape {tuple(tensor.shape)}, got {entry.shape} in {entry.path}")
        dtype = _DTYPES.get(entry.dtype)
        if dtype != tensor.dtype and not (dtype and dtype.is_floating_point and tensor.is_floating_point()):
            raise ConfigError(
                f"expected {name!r} in {tensor.dtype}{' or another floating point' * tensor.is_floating_point()}, got "
                f"{entry.dtype} in {entry.path}"
            )
    return matched


def _listed(what: str, names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    shown = ", ".join(map(repr, names[:_NAMED_AT_MOST])) + (f" and {more} more" if more > 0 else "")
    return f"{what}: {shown}; " if names else ""


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = {
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        for key in module._buffers
        if key not in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _fingerprint(found: Mapping[str, Entry]) -> str:
    record = sorted((name, entry.dtype, entry.shape, entry.begin) for name, entry in found.items())
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
