"""The resume state of a run, kept under a name made of everything that decides its result."""

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
KEPT, KEPT_DAYS = 10, 14  # checkpoints of other settings of a row


def code_digest() -> str:
    """Digest of the library's source, so that a checkpoint of other code is never picked up."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def identity(settings: Any, data: str, world: int) -> dict[str, Any]:
    """Everything that decides the weights of a run: settings, files that they name, data, code, number of processes.

    Arguments:
        settings: The row's settings.
        data: Digest of the shards, or codes, that it is trained on.
        world: Number of processes.
    """
    files = {key: sha256_file(path) for key, path in named_files(settings).items()}
    return {"settings": repr(settings), "files": files, "data": data, "code": code_digest(), "world": world}


class Checkpoint:
    """The resume state of one run, in a file named by what the run is made of.

    A checkpoint is removed when its run is done. Those of other settings stay, since another run of the row may be using them:
    the `KEPT` newest, for `KEPT_DAYS` days.

    Arguments:
        folder: Folder of this stage and row.
        identity: Settings, digests of data and code: a checkpoint is found again only if all of it is the same.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:20]
        self.path = self.folder / f"{key}.pt"
        self._warned = False

    def save(self, state: Mapping[str, Any]) -> bool:
        """Writes tensors and plain types, whole or not at all, with their digest, since PyTorch checks only part of its file.

        Gives whether it could: training goes on without checkpoints where the disk is full or can't be written.
        """
        # By way of memory: of a full disk PyTorch's own writer says no more than that something went wrong.
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
        """The state, or none where there is no checkpoint of this very run; one that can't be read is removed."""
        if not os.path.lexists(self.path):
            return None
        try:
            if not self.path.is_file():  # a pipe would be waited for
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
        """Warns of a checkpoint that can't be used, and removes it."""
        _warn(f"{self.path} can't be read ({reason}); starting from the beginning")
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the checkpoint, once what it leads to is safely written."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.folder.rmdir()


def _warn(message: str) -> None:
    """Prints a warning."""
    print(f"warning: {message}", file=sys.stderr)
