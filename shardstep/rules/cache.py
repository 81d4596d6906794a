"""Machine code on disk, between processes: found by a key, never loaded unless this user wrote it as it is.

The directory is SHARDSTEP_CACHE, or shardstep in XDG_CACHE_HOME or ~/.cache. A file is

    magic | key | HMAC-SHA256 of all the rest, by a secret that only this user can read | code

and one that is anything else is as good as missing. Whatever fails here only costs time: the code is made again.
"""

import contextlib
import functools
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final

MAGIC: Final = b"shardstep code 1\n"

TOTAL_BYTES: Final = 64 << 20
"""Of all files. The oldest go first."""

FILE_BYTES: Final = 8 << 20
"""Larger ones are not ours."""

_SECRET_BYTES: Final = 32
_DIGEST_BYTES: Final = 32


class _Refused(Exception):
    """A directory that others could write to, or that cannot be used."""


def key(*parts: str) -> bytes:
    """Of everything that the code depends on."""
    return hashlib.sha256("\0".join(parts).encode()).digest()


def fetch(key: bytes, make: Callable[[], bytes]) -> bytes:
    """The code of ``key``: from disk, or made and kept there. Without a directory that is safe: just made."""
    cache = _open(os.environ.get("SHARDSTEP_CACHE"), os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))
    if cache is None:
        return make()
    code = cache.get(key)
    if code is None:
        code = make()
        cache.put(key, code)
    return code


@functools.cache
def _open(given: str | None, caches: str | None, home: str | None) -> "Cache | None":
    try:
        return Cache(_directory(given, caches, home))
    except (_Refused, OSError, RuntimeError) as error:
        warnings.warn(
            f"expected a directory for compiled rules that only this user can write to, got {error}; rules are "
            f"compiled anew in every process. Set SHARDSTEP_CACHE to another directory, or repair this one",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _directory(given: str | None, caches: str | None, home: str | None) -> Path:
    """By the variables that `fetch` reads. Raises RuntimeError for a user without a home."""
    if given:
        return Path(given)
    return (Path(caches) if caches else (Path(home) if home else Path.home()) / ".cache") / "shardstep"


class Cache:
    """One directory. Raises OSError or _Refused if it cannot be used safely."""

    def __init__(self, directory: Path) -> None:
        if not hasattr(os, "getuid"):
            raise _Refused(f"{directory} on a system without owners of files")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise _Refused(f"{directory} of user {status.st_uid} with mode {stat.filemode(status.st_mode)}")
        self._directory = directory
        self._secret = self._read_secret() or self._make_secret()

    def get(self, key: bytes) -> bytes | None:
        """The code; None unless there is a file that this user wrote for this key."""
        content = self._read(self._directory / key.hex(), FILE_BYTES)
        head = MAGIC + key
        if content is None or not content.startswith(head):
            return None
        digest, code = content[len(head) : len(head) + _DIGEST_BYTES], content[len(head) + _DIGEST_BYTES :]
        return code if hmac.compare_digest(digest, self._digest(key, code)) else None

    def put(self, key: bytes, code: bytes) -> None:
        """Keep it, if that is possible. Others see the whole file or none."""
        with contextlib.suppress(OSError):
            self._write(self._directory / key.hex(), MAGIC + key + self._digest(key, code) + code)
            self._remove_oldest()

    def _digest(self, key: bytes, code: bytes) -> bytes:
        return hmac.digest(self._secret, MAGIC + key + code, "sha256")

    def _read_secret(self) -> bytes | None:
        secret = self._read(self._directory / "secret", _SECRET_BYTES)
        return secret if secret is not None and len(secret) == _SECRET_BYTES else None

    def _make_secret(self) -> bytes:
        """A new one, which makes files of an old one foreign. Of processes that do this at once, the last one wins."""
        self._write(self._directory / "secret", secrets.token_bytes(_SECRET_BYTES))
        secret = self._read_secret()
        if secret is None:
            raise _Refused(f"{self._directory}, whose secret cannot be read back")
        return secret

    def _read(self, path: Path, limit: int) -> bytes | None:
        """A plain file of this user that nobody else can write to."""
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
                if ours and status.st_size <= limit:
                    with open(descriptor, "rb", closefd=False) as file:
                        return file.read(limit)
            finally:
                os.close(descriptor)
        return None

    def _write(self, path: Path, content: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self._directory)  # with mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise

    def _remove_oldest(self) -> None:
        files = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    status = entry.stat(follow_symlinks=False)
                    if entry.name != "secret" and stat.S_ISREG(status.st_mode):
                        files.append((status.st_mtime, status.st_size, entry.path))
        excess = sum(size for _, size, _ in files) - TOTAL_BYTES
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            os.unlink(path)
            excess -= size
