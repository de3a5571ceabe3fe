"""Several processes of this machine, started again by torchrun after one was lost (LAUNCHER=torchrun)."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys

from pipeline.errors import PipelineError
from pipeline.system.processes import die_with_parent
from stages.launching.common.processes import forwarded, restart_count, stage_command

__all__ = ["launch"]


def launch(processes: int) -> None:
    """Runs the stage under torchrun, RESTARTS times more at most.

    For several machines, run torchrun yourself on each: see docs/cluster.md.

    Raises:
        PipelineError: When it failed.
    """
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restart_count()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *stage_command()]
    peers: list[subprocess.Popen[bytes]] = []
    die = functools.partial(die_with_parent, os.getpid())
    with forwarded(peers) as received:
        # In a new session: a signal reaches it once, from here. It passes it on to its processes, and waits for them.
        peers.append(subprocess.Popen(command, start_new_session=True, preexec_fn=die))
        code = peers[0].wait()
    if code and received:
        raise PipelineError(f"stopped by {signal.Signals(received[0]).name}: run the same command again to resume training")
    if code:
        raise PipelineError(f"torchrun ended with status {code}: its messages are above")
