"""The resume state of a run, in a file named by everything that affects its result."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DataError
from pipeline.settings import named_files
from pipeline.system.files import atomic_file, sha256_file

__all__ = ["Checkpoint", "code_digest", "identity"]

PACKAGE = Path(__file__).parents[1]
KEPT, KEPT_DAYS = 10, 14  # checkpoints of a row's other settings


def code_digest() -> str:
    """Digest of the library's source: a checkpoint of other code is never used."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def identity(settings: Any, data: str) -> dict[str, Any]:
    """Everything that affects the weights of a run: settings, files that they name, data, code.

    Arguments:
        settings: The row's settings.
        data: Digest of the shards or codes to train on.
    """
    files = {key: sha256_file(file.path) for key, file in named_files(settings).items() if file.path.is_file()}
    return {"settings": repr(settings), "files": files, "data": data, "code": code_digest()}


class Checkpoint:
    """The resume state of one run, in a file named by the digest of its identity.

    A checkpoint is deleted when its run is done. Those of other settings are kept, since another run of the row may be using
    them: the `KEPT` newest, for `KEPT_DAYS` days.

    Arguments:
        folder: Folder of this stage and row.
        identity: Settings, digests of data and code: a checkpoint is used only if all of them are the same.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:20]
        self.path = self.folder / f"{key}.pt"
        self._warned = False

    def save(self, state: Mapping[str, Any]) -> bool:
        """Writes tensors and plain types, whole or not at all, with their digest, since PyTorch checks only part of its file.

        Returns whether it succeeded: training continues without checkpoints if the disk is full or read-only.
        """
        # Through memory: PyTorch's own writer doesn't say that the disk is full.
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        try:
            with atomic_file(self.path) as temporary, temporary.open("wb") as file:
                file.write(hashlib.sha256(buffer.getbuffer()).digest())
                file.write(buffer.getbuffer())
        except OSError as error:
            if not self._warned:
                reason = error.strerror or type(error).__name__
                _warn(f"no checkpoint can be written to {self.folder} ({reason}); going on without any")
            self._warned = True
            return False
        self._remove_old()
        return True

    def _remove_old(self) -> None:
        with contextlib.suppress(OSError):
            others = {path: path.stat().st_mtime for path in self.folder.glob("*.pt") if path != self.path}
            newest = sorted(others, key=others.__getitem__, reverse=True)
            oldest = time.time() - KEPT_DAYS * 24 * 3600
            for path in [*newest[KEPT:], *(path for path in newest[:KEPT] if others[path] < oldest)]:
                path.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The state, or None if there is no checkpoint of exactly this run; an unreadable one is deleted."""
        if not os.path.lexists(self.path):
            return None
        try:
            if not self.path.is_file():  # reading a pipe would block
                raise DataError("it isn't a file")
            with self.path.open("rb") as file:
                digest, data = file.read(32), file.read()
            if hashlib.sha256(data).digest() != digest:
                raise DataError("its digest is another")
            state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:
            self.ignore(str(error) if isinstance(error, DataError) else type(error).__name__)
            return None
        return state

    def ignore(self, reason: str) -> None:
        """Warns of an unusable checkpoint, and deletes it."""
        _warn(f"{self.path} can't be read ({reason}); starting from the beginning")
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the checkpoint, once the run's outputs are written."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.folder.rmdir()


def _warn(message: str) -> None:
    """Prints a warning."""
    print(f"warning: {message}", file=sys.stderr)
