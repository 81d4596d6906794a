"""The text the demo learns: bytes of real files, in a fixed order, with a held-out part.

By default the source of this machine's own Python standard library. Never downloads, decodes or executes any.
"""

import os
import sysconfig
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shardstep.errors import ConfigError

MAX_BYTES = 20_000_000
HELD_OUT_SHARE = 0.05

# Installed packages are not the library; tests, tables and topics are not the prose of it.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "__pycache__"}
)


class Windows(Dataset[Tensor]):
    """Consecutive windows of ``context + 1`` bytes that do not overlap; a shorter rest is dropped."""

    def __init__(self, text: bytes, context: int) -> None:
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._width = context + 1

    def __len__(self) -> int:
        return len(self._bytes) // self._width

    def __getitem__(self, index: int) -> Tensor:  # (context + 1,) long
        if not 0 <= index < len(self):
            raise IndexError(f"expected a window of 0..{len(self) - 1}, got {index}")
        return self._bytes[index * self._width : (index + 1) * self._width].long()


@dataclass(frozen=True)
class Corpus:
    """The two parts of a text, cut into windows."""

    training: Windows
    held_out: Windows


def load_corpus(path: Path | None, *, context: int, training_windows: int, held_out_windows: int) -> Corpus:
    """The text at ``path`` (None: the standard library), which must fill at least the windows asked for."""
    text = read_text(path)
    cut = len(text) - int(len(text) * HELD_OUT_SHARE)
    corpus = Corpus(Windows(text[:cut], context), Windows(text[cut:], context))
    _check_length("training", corpus.training, training_windows, len(text), path)
    _check_length("held-out", corpus.held_out, held_out_windows, len(text), path)
    return corpus


def read_text(path: Path | None) -> bytes:
    """Up to ``MAX_BYTES`` of the file, of the folder's files in order, or of the standard library."""
    if path is None:
        return _join(_standard_library_files(Path(sysconfig.get_paths()["stdlib"])))
    if not path.exists():
        raise ConfigError(f"expected --text to name a file or a folder, got {str(path)!r}, which does not exist")
    text = _join(_folder_files(path) if path.is_dir() else [path])
    if not text:
        raise ConfigError(f"expected text at {str(path)!r}, got 0 bytes; name a file or folder that holds some")
    return text


def _standard_library_files(root: Path) -> list[Path]:
    return [file for file in _folder_files(root, _SKIPPED_FOLDERS) if file.suffix == ".py"]


def _folder_files(root: Path, skipped: Set[str] = frozenset()) -> list[Path]:
    """Every visible file below ``root``, sorted by path: a folder's listing has no order of its own."""
    return sorted(_walk(root, skipped), key=lambda file: file.relative_to(root).as_posix())


def _walk(root: Path, skipped: Set[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        yield from (Path(folder, name) for name in names if not name.startswith(".") and Path(folder, name).is_file())


def _join(files: list[Path]) -> bytes:
    parts: list[bytes] = []
    left = MAX_BYTES
    for file in files:
        if left <= 0:
            break
        parts.append(_read_start(file, left))
        left -= len(parts[-1])
    return b"".join(parts)


def _read_start(file: Path, numel: int) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(numel)
    except OSError as error:
        raise ConfigError(
            f"expected to read {str(file)!r} as text, got {error.strerror}; make it readable or leave it out"
        ) from error


def _check_length(part: str, windows: Windows, needed: int, got_bytes: int, path: Path | None) -> None:
    if len(windows) < needed:
        where = "the standard library" if path is None else repr(str(path))
        raise ConfigError(
            f"expected at least {needed} {part} windows in {where}, got {len(windows)} "
            f"from {got_bytes} bytes; name a longer text"
        )
