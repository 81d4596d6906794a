"""The cache of compiled rules: what it gives back is what was put in by this user, or nothing."""

import inspect
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shardstep.rules import cache
from shardstep.rules.cache import Cache

KEY, OTHER = cache.key("a rule", "a machine"), cache.key("a rulea", " machine")
CODE = b"code " * 400


@pytest.fixture
def room(tmp_path):
    directory = tmp_path / "cache"
    Cache(directory).put(KEY, CODE)
    return directory


def file_of(room, key=KEY):
    return room / key.hex()


def fetch_in(monkeypatch, directory, code=CODE):
    """What is given for KEY, and whether it had to be made."""
    monkeypatch.setenv("SHARDSTEP_CACHE", str(directory))
    made = []
    return cache.fetch(KEY, lambda: made.append(1) or code), bool(made)


def test_keys_of_different_parts_differ():
    assert KEY != OTHER
    assert len(KEY) == 32


def test_another_process_finds_what_was_put(room):
    assert Cache(room).get(KEY) == CODE
    assert Cache(room).get(OTHER) is None


def test_only_the_user_can_enter(room):
    assert stat.S_IMODE(room.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in room.iterdir()} == {0o600}


@pytest.mark.parametrize("length", [0, 1, 16, 17, 48, 49, 80, 81, 1000, len(CODE) + 80])
def test_a_truncated_file_is_made_again(room, length, monkeypatch):
    content = file_of(room).read_bytes()
    assert length < len(content)
    file_of(room).write_bytes(content[:length])
    assert fetch_in(monkeypatch, room) == (CODE, True)
    assert file_of(room).read_bytes() == content


def test_no_flipped_bit_passes(room):
    content, opened = file_of(room).read_bytes(), Cache(room)
    for place in [*range(0, 120), len(content) // 2, len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file_of(room).write_bytes(changed)
        assert opened.get(KEY) is None, place
    file_of(room).write_bytes(content + b"\0")
    assert opened.get(KEY) is None
    file_of(room).write_bytes(content)
    assert opened.get(KEY) == CODE


def test_a_file_under_another_name_is_foreign(room):
    content = file_of(room).read_bytes()
    file_of(room, OTHER).write_bytes(content)
    file_of(room, OTHER).chmod(0o600)
    assert Cache(room).get(OTHER) is None
    file_of(room, OTHER).write_bytes(content.replace(KEY, OTHER))
    assert Cache(room).get(OTHER) is None


def test_a_file_of_another_user_s_cache_is_foreign(room, tmp_path):
    Cache(tmp_path / "theirs").put(KEY, b"evil")
    os.replace(file_of(tmp_path / "theirs"), file_of(room))
    assert Cache(room).get(KEY) is None


def test_links_are_not_followed(room, monkeypatch):
    elsewhere = room.parent / "elsewhere"
    os.rename(file_of(room), elsewhere)
    os.symlink(elsewhere, file_of(room))
    before = elsewhere.read_bytes()
    assert fetch_in(monkeypatch, room, b"new") == (b"new", True)
    assert elsewhere.read_bytes() == before
    assert not file_of(room).is_symlink()


@pytest.mark.parametrize("kind", ["directory", "pipe", "open to others", "huge"])
def test_what_is_no_file_of_ours_is_not_read(room, kind, monkeypatch):
    if kind in ("directory", "pipe"):
        file_of(room).unlink()
        file_of(room).mkdir() if kind == "directory" else os.mkfifo(file_of(room))
    elif kind == "huge":
        os.truncate(file_of(room), 1 << 40)
    else:
        file_of(room).chmod(0o622)
    assert fetch_in(monkeypatch, room) == (CODE, True)
    assert Cache(room).get(KEY) == (None if kind == "directory" else CODE)


def test_files_of_others_are_not_read(room, monkeypatch):
    opened = Cache(room)
    monkeypatch.setattr(os, "getuid", lambda: room.stat().st_uid + 1)
    assert opened.get(KEY) is None


@pytest.mark.parametrize("damage", ["gone", "short", "long", "readable by others", "a link"])
def test_a_damaged_secret_is_replaced_and_all_files_with_it(room, damage):
    secret = room / "secret"
    old = secret.read_bytes()
    if damage == "gone":
        secret.unlink()
    elif damage == "readable by others":
        secret.chmod(0o644)
    elif damage == "a link":
        os.rename(secret, room.parent / "known")
        os.symlink(room.parent / "known", secret)
    else:
        secret.write_bytes(old[:-1] if damage == "short" else old + b"x")
    opened = Cache(room)
    assert opened.get(KEY) is None
    assert secret.read_bytes() != old
    assert secret.stat().st_size == 32
    assert stat.S_IMODE(secret.lstat().st_mode) == 0o600
    opened.put(KEY, CODE)
    assert Cache(room).get(KEY) == CODE


def refused(monkeypatch, directory, said):
    with pytest.warns(RuntimeWarning, match=said):
        assert fetch_in(monkeypatch, directory) == (CODE, True)
    assert fetch_in(monkeypatch, directory) == (CODE, True)  # and no second warning, which would be an error


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_can_write_to_is_refused(room, monkeypatch, mode):
    room.chmod(mode)
    refused(monkeypatch, room, "rwx")


def test_a_directory_of_another_user_is_refused(room, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: room.stat().st_uid + 1)
    refused(monkeypatch, room, "of user")


def test_a_directory_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refused(monkeypatch, tmp_path / "file" / "cache", "Not a directory")


def test_a_directory_that_cannot_be_listed_or_read_is_refused(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    refused(monkeypatch, tmp_path / "cache", "Permission denied")


def test_a_full_disk_costs_time_only(room, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    file_of(room).unlink()
    monkeypatch.setattr(os, "replace", full)
    assert fetch_in(monkeypatch, room) == (CODE, True)
    assert [file.name for file in room.iterdir()] == ["secret"]


def test_the_oldest_files_go(room, monkeypatch):
    monkeypatch.setattr(cache, "TOTAL_BYTES", 4 * file_of(room).stat().st_size)
    opened, keys = Cache(room), [KEY]
    for age in range(1, 8):
        keys.append(cache.key(str(age)))
        for older in room.iterdir():
            os.utime(older, (0, older.stat().st_mtime - 10))
        opened.put(keys[-1], CODE)
    assert [opened.get(key) is not None for key in keys] == [False] * 4 + [True] * 4
    assert (room / "secret").exists()


def test_where_it_is():
    assert cache._directory(None, None, "/home") == Path("/home/.cache/shardstep")
    assert cache._directory("", "/xdg", "/home") == Path("/xdg/shardstep")
    assert cache._directory("/own", "/xdg", "/home") == Path("/own")


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    for name in ("SHARDSTEP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    cache._open.cache_clear()
    with pytest.warns(RuntimeWarning, match="no home"):
        assert cache.fetch(KEY, lambda: CODE) == CODE


def hammer(module, directory):
    """Open, write and read the same few keys; how often there was something neither whole nor missing."""
    wrong = 0
    for turn in range(60):
        opened, key = module.Cache(directory), module.key(str(turn % 4))
        code = key * 2000
        wrong += opened.get(key) not in (None, code)
        opened.put(key, code)
    return wrong


ALONE = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])  # without the package, which imports torch
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.exit(hammer(module, pathlib.Path(sys.argv[2])))
"""


def test_processes_and_threads_at_once(tmp_path):
    directory, wrong = tmp_path / "cache", []
    command = [sys.executable, "-c", inspect.getsource(hammer) + ALONE, cache.__file__, str(directory)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    threads = [threading.Thread(target=lambda: wrong.append(hammer(cache, directory))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 3
    assert [process.wait(30) for process in processes] == [0] * 3
    keys = {cache.key(str(turn)).hex() for turn in range(4)}
    assert {file.name for file in directory.iterdir()} == {"secret", *keys}
