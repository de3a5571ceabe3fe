"""Processes that a stage starts: none outlives it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["die_with_parent"]


def die_with_parent() -> None:
    """Asks the kernel to end this process when the one that started it ends, even by SIGKILL. Linux alone can do so.

    Called in a new process. What is left of a killed run would else go on beside the next one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:  # it ended before it was asked
            os._exit(1)
