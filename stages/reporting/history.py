"""Files of an earlier commit or experiment: those in git, and the outputs that DVC's cache holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.errors import PipelineError

__all__ = ["files_at"]


def files_at(revision: str) -> Callable[[Path], bytes | None]:
    """A function that gives the bytes of a file at a revision by its path; None if it isn't there or not in the cache.

    Raises:
        PipelineError: When there is no such revision, or this is no repository of git and DVC.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import RevError, SCMError
    from dvc_data.index import DataIndexDirError

    try:
        files = DVCFileSystem(rev=revision)
        _ = files.repo  # opened at first use: an unknown revision is told here, not as a file that isn't there
    except (RevError, SCMError, DvcException) as error:
        raise PipelineError(f"{revision}: {' '.join(str(error).split())}") from None

    def read(path: Path) -> bytes | None:
        try:
            return bytes(files.read_bytes(path.as_posix()))
        except (OSError, DvcException, DataIndexDirError):  # the last: a folder that the cache of a fresh clone hasn't got
            return None

    return read
