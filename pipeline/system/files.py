"""Files written whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

__all__ = [
    "atomic_file",
    "atomic_folder",
    "check_regular",
    "read_json",
    "sha256_bytes",
    "sha256_file",
    "write_json",
    "write_text",
]

ABANDONED_SECONDS = 24 * 3600.0  # age at which another machine's temporary file is deleted
JSON_BYTES = 64 * 2**20  # no index is longer; don't read larger files into memory


@functools.cache
def _machine() -> str:
    """Eight digits that identify a machine, or a container on it: process numbers are only unique within one."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{zlib.crc32(f'{platform.node()} {namespace}'.encode()):08x}"


def _temporary_name(path: Path, kind: str = "") -> Path:
    # The same folder keeps the rename within one file system; the dot hides the file from readers' globs.
    return path.with_name(f".{path.name}{kind}.{_machine()}-{os.getpid()}.partial")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Deletes temporary files that killed processes left next to `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        machine, _, number = left.name.split(".")[-2].partition("-")
        with contextlib.suppress(OSError):  # it is alive and another user's, or another process has deleted it
            if machine == _machine() and number.isdecimal():
                alive = _lives(int(number))
            else:
                alive = time.time() - left.lstat().st_mtime < ABANDONED_SECONDS
            if not alive:
                _remove(left)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    return True


@contextlib.contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raises system errors that a library has wrapped, such as a full disk, as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path and renames it to `path` on success; removes it on failure.

    Arguments:
        path: The final path. Its folder is created when missing.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a" / "word.txt"
        >>> with atomic_file(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _temporary_name(path)
    try:
        with _system_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives an empty temporary folder and puts it in the place of `path` on success; removes it on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    replaced = _temporary_name(path, ".replaced")
    _remove_leftovers(path)
    _remove(temporary)
    temporary.mkdir()
    try:
        with _system_errors(path):
            yield temporary
            # Two renames: a kill between them, or during the deletion, leaves no half-filled folder.
            if os.path.lexists(path):
                os.replace(path, replaced)
            os.replace(temporary, path)
    finally:
        _remove(temporary)
        _remove(replaced)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON with a final newline, whole or not at all. Keeps the order of keys."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: When the file is missing or isn't JSON.
    """
    path = Path(path)
    try:
        if not path.is_file():  # reading a pipe would block
            raise FileNotFoundError(path)
        if path.stat().st_size > JSON_BYTES:
            raise DataError(f"{path} is longer than {JSON_BYTES >> 20} MiB; run the stage that writes it again")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run the stage that writes it") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read as JSON ({error}); run the stage that writes it again") from None


def check_regular(path: str | os.PathLike[str]) -> None:
    """Rejects a pipe or a device, whose reader would wait for ever; a missing file is left to its reader.

    Raises:
        OSError: When it is there and isn't a regular file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it isn't a regular file", os.fspath(path))


def sha256_bytes(data: bytes | memoryview) -> str:
    """The SHA-256 digest of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 digest of a file, in hexadecimal, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
