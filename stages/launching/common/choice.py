"""Where a stage's processes run: the launcher that the environment names."""

from __future__ import annotations

import importlib
import os

from pipeline.errors import PipelineError
from pipeline.system.processes import die_with_parent
from stages.launching.common.processes import process_count

__all__ = ["LAUNCHERS", "launched"]

LAUNCHERS = ("local", "torchrun", "ray", "slurm")  # each a module of its name, with `launch(processes)`


def launched() -> bool:
    """Runs the stage in PROCESSES processes, started by LAUNCHER, and waits for them. Does nothing in one of them.

    Returns whether it did; then the work is done.

    Raises:
        PipelineError: When there is no such launcher, or the stage failed.
    """
    if "RANK" in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's processes would outlive it; other launchers see to that themselves
            die_with_parent(os.getppid())
        return False
    name = os.environ.get("LAUNCHER") or "local"
    if name not in LAUNCHERS:
        raise PipelineError(f"LAUNCHER is {name[:40]!r}: expected {', '.join(LAUNCHERS[:-1])} or {LAUNCHERS[-1]}")
    processes = process_count()
    if name == "local" and processes == 1:
        return False
    importlib.import_module(f"stages.launching.{name}").launch(processes)
    return True
