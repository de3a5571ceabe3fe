"""Parts in an object store or a shared folder, named by their digests, with a bounded cache on this machine's disk.

The environment's STORE is a URL of fsspec, such as `s3://bucket/prefix`, `gs://bucket/prefix` or `file:///shared/parts`. Then
a folder of shards, codes or samples holds its index alone, and the parts are in the store. A name is the digest of the content:
the same part is stored once, nothing but a damaged part is ever overwritten, and an older index finds its parts again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.system.files import atomic_file, sha256_bytes

__all__ = ["Store", "current_store"]

CACHE_GIB = 10.0
TRIES = 6
FIRST_WAIT = 0.2  # seconds; doubled from try to try
PIECE_BYTES = 8 * 2**20  # of a long part, which are read side by side

Result = TypeVar("Result")


@functools.cache
def _store(url: str, cache: str, gib: float, _process: int) -> Store:
    return Store(url, Path(cache), round(gib * 2**30))


def current_store() -> Store | None:
    """The store that the environment names: STORE, STORE_CACHE (default `.cache/parts`) and STORE_CACHE_GIB (default 10).

    Returns None without STORE.

    Raises:
        SettingsError: When STORE isn't a URL that can be opened, or STORE_CACHE_GIB isn't a number.
    """
    url = os.environ.get("STORE", "").rstrip("/")
    if not url:
        return None
    text = os.environ.get("STORE_CACHE_GIB") or str(CACHE_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0 <= gib <= 1e6:
        raise SettingsError(f"STORE_CACHE_GIB is {text[:40]!r}: expected a number of GiB, 0 for no cache")
    # One for each process: a loader process can't use the connections, and the thread, of the one that it was forked from.
    return _store(url, os.environ.get("STORE_CACHE") or ".cache/parts", gib, os.getpid())


class Store:
    """Parts behind a URL.

    Arguments:
        url: Where the parts are.
        cache: Folder of this machine for parts that were read.
        cache_bytes: Bytes that it may hold; parts that weren't read for longest are deleted.

    Raises:
        SettingsError: When fsspec can't open the URL.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int) -> None:
        self.url, self.cache, self.cache_bytes = url, cache, cache_bytes
        if "://" not in url:
            raise SettingsError(f"STORE is {url[:80]!r}: expected a URL such as s3://bucket/prefix or file:///folder")
        import fsspec

        try:
            self.files: Any
            self.files, self.root = fsspec.core.url_to_fs(url)
        except ImportError:
            kind = url.partition(":")[0]
            raise SettingsError(
                f"STORE is {url[:80]!r}: {kind} needs a package; pip install '.[{kind}]' for s3 or gs"
            ) from None
        except (OSError, ValueError) as error:
            raise SettingsError(f"STORE is {url[:80]!r}: it can't be opened ({_short(error)})") from None

    def put(self, path: Path, sha256: str) -> None:
        """Copies a finished file into the store, whole or not at all, unless it is there and undamaged.

        Raises:
            PipelineError: When the store doesn't take it.
        """
        place, length = self._place(sha256), path.stat().st_size

        def copy() -> None:
            with contextlib.suppress(FileNotFoundError):
                # Its digest, too: the stage that writes it runs again where a damaged part was found.
                if self.files.info(place)["size"] == length and sha256_bytes(self._read(place, length)) == sha256:
                    return
            if not {"s3", "gs"} & set(_names(self.files.protocol)):  # they have no folders, and a bucket isn't made by mistake
                self.files.makedirs(place.rpartition("/")[0], exist_ok=True)
            if "file" in _names(self.files.protocol):
                with atomic_file(place) as temporary:  # an object store does so by itself
                    self.files.put_file(str(path), str(temporary))
            else:
                self.files.put_file(str(path), place)
            if self.files.info(place)["size"] != length:
                raise OSError(f"{place} has another length than {path}")

        self._again(copy, f"{path.name} can't be written to {self.url}")

    def get(self, name: str, sha256: str, length: int) -> bytes:
        """The content of a part, from the cache or the store; its digest is right.

        Arguments:
            name: Name of the part, for messages.
            sha256: Its digest.
            length: Its length in bytes.

        Raises:
            DataError: When the store hasn't got it, or only a damaged one.
            PipelineError: When the store doesn't answer.
        """
        cached = self.cache / sha256[:2] / sha256
        with contextlib.suppress(OSError):
            data = cached.read_bytes()
            if len(data) == length and sha256_bytes(data) == sha256:
                os.utime(cached)
                return data
            cached.unlink()

        def fetch() -> bytes:
            data = self._read(self._place(sha256), length)
            if len(data) != length or sha256_bytes(data) != sha256:
                raise _DamagedError(f"{len(data)} bytes of another content")
            return data

        data = self._again(fetch, f"{name} can't be read from {self.url}")
        self._keep(cached, data)
        return data

    def _read(self, place: str, length: int) -> bytes:
        """A whole object; a long one in pieces side by side, since stores limit the rate of each connection."""
        data: bytes
        if length < 2 * PIECE_BYTES or not self.files.async_impl:
            data = self.files.cat_file(place)
            return data
        starts = range(0, length, PIECE_BYTES)
        stops = [min(start + PIECE_BYTES, length) for start in starts]
        pieces: list[bytes] = self.files.cat_ranges([place] * len(starts), list(starts), stops, on_error="raise")
        return b"".join(pieces)

    def _place(self, sha256: str) -> str:
        return f"{self.root}/{sha256[:2]}/{sha256}"

    def _again(self, action: Callable[[], Result], failure: str) -> Result:
        """Tries up to TRIES times, with longer and longer waits."""
        for number in range(1, TRIES + 1):
            try:
                return action()
            except FileNotFoundError:
                raise DataError(f"{failure}: it isn't there") from None
            except PermissionError as error:
                raise PipelineError(f"{failure}: no permission ({_short(error)})") from None
            except Exception as error:  # of the library of the store, each with types of its own
                if number == TRIES:
                    kind = DataError if isinstance(error, _DamagedError) else PipelineError
                    raise kind(f"{failure} after {TRIES} tries ({_short(error)})") from None
                time.sleep(FIRST_WAIT * 2 ** (number - 1) * random.uniform(0.5, 1.5))
        raise AssertionError

    def _keep(self, path: Path, data: bytes) -> None:
        """Puts a part into the cache, if it fits; a full disk is no error."""
        if len(data) > self.cache_bytes:
            return
        with contextlib.suppress(OSError):
            self._make_room(len(data))
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)

    def _make_room(self, length: int) -> None:
        found: list[tuple[float, int, Path]] = []
        for path in self.cache.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + length <= self.cache_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


class _DamagedError(OSError):
    """A part arrived with another length or digest."""


def _names(protocol: str | tuple[str, ...]) -> tuple[str, ...]:
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
