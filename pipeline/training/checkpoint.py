"""The resume state of a run, kept under a name made of everything that decides its result."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DataError
from pipeline.system.files import atomic_file

__all__ = ["Checkpoint", "code_digest"]

PACKAGE = Path(__file__).parents[1]


def code_digest() -> str:
    """Digest of the library's source, so that a checkpoint of other code is never picked up."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Checkpoint:
    """The resume state of one run, in a file named by what the run is made of.

    Arguments:
        folder: Folder of this stage and row; checkpoints of other settings are removed from it on the first save.
        identity: Settings, digests of data and code: a checkpoint is found again only if all of it is the same.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:20]
        self.path = self.folder / f"{key}.pt"

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes tensors and plain types, whole or not at all, and their digest, since PyTorch checks only part of its file."""
        # By way of memory: of a full disk PyTorch's own writer says no more than that something went wrong.
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())
        for other in self.folder.glob("*.pt"):
            if other != self.path:
                other.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The state, or none where there is no checkpoint of this very run; one that can't be read is put aside."""
        if not self.path.exists():
            return None
        try:
            with self.path.open("rb") as file:
                digest, data = file.read(32), file.read()
            if hashlib.sha256(data).digest() != digest:
                raise DataError("its digest is another")
            state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:
            print(f"warning: {self.path} can't be read ({type(error).__name__}); starting from the beginning", file=sys.stderr)
            self.path.unlink(missing_ok=True)
            return None
        return state

    def remove(self) -> None:
        """Removes the checkpoint, once what it leads to is safely written."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
