"""The demo's text: the same bytes each time, whole windows, and one clear sentence when it will not do."""

from pathlib import Path

import pytest
import torch

from shardstep.demo import text
from shardstep.demo.text import Windows, load_corpus, read_text
from shardstep.errors import ConfigError


def corpus_of(path: Path | None) -> text.Corpus:
    return load_corpus(path, context=8, training_windows=2, held_out_windows=1)


def test_the_standard_library_reads_the_same_twice() -> None:
    first = read_text(None)
    assert first == read_text(None)
    assert len(first) > 1_000_000
    assert b"def " in first


def test_a_folder_is_read_in_path_order_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in (("c", "3"), ("b/z", "2"), ("a", "1"), (".secret", "x"), (".git/d", "y")):
        (tmp_path / name).write_text(content)
    assert read_text(tmp_path) == b"123"


def test_no_more_than_the_cap_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_BYTES", 5)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    assert read_text(tmp_path) == b"aaabb"


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    windows = Windows(bytes(range(11)), context=4)
    assert len(windows) == 2
    assert windows[1].tolist() == [5, 6, 7, 8, 9]
    assert windows[1].dtype == torch.long
    assert [len(window) for window in windows] == [5, 5]  # type: ignore[attr-defined]


def test_the_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a" * 950 + b"b" * 50)
    corpus = corpus_of(tmp_path)
    assert {int(byte) for window in corpus.training for byte in window} == {ord("a")}  # type: ignore[attr-defined]
    assert {int(byte) for window in corpus.held_out for byte in window} == {ord("b")}  # type: ignore[attr-defined]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected --text to name a file or a folder, got .*nowhere"):
        corpus_of(tmp_path / "nowhere")


def test_an_empty_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected text at .*, got 0 bytes"):
        corpus_of(tmp_path)


def test_a_short_text_says_how_much_is_needed(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"expected at least 1 held-out windows in .*, got 0 from 100 bytes"):
        corpus_of(tmp_path)
