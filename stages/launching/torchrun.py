"""Several processes of this machine, started again by torchrun after one was lost (LAUNCHER=torchrun)."""

from __future__ import annotations

import subprocess
import sys

from pipeline.errors import PipelineError
from stages.launching.common.processes import restart_count, stage_command

__all__ = ["launch"]


def launch(processes: int) -> None:
    """Runs the stage under torchrun, RESTARTS times more at most.

    For several machines, run torchrun yourself on each: see docs/cluster.md.

    Raises:
        PipelineError: When it failed.
    """
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restart_count()}"]
    code = subprocess.call([sys.executable, "-m", "torch.distributed.run", *options, *stage_command()])
    if code:
        raise PipelineError(f"torchrun ended with status {code}: its messages are above")
