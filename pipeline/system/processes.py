"""Keeps the processes that a stage starts from outliving it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["die_with_parent"]


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent ends, even by SIGKILL. Linux only.

    Call it in the new process. Otherwise a killed run's orphans would keep running alongside the next run.

    Arguments:
        parent: Number of the process that started this one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent ended before the request
            os._exit(1)
