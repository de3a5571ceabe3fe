"""Several processes of this machine that share the work of a stage (PROCESSES)."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from pipeline.errors import PipelineError
from pipeline.system.processes import die_with_parent
from stages.launching.common.processes import PEER_LOST, forwarded, free_port, stage_command

__all__ = ["launch"]

PATIENCE_SECONDS = 10.0  # time that the other processes have to end after one has failed


def launch(processes: int) -> None:
    """Starts processes that share the work, as torchrun would, and waits for them.

    Unlike torchrun it starts at once, and an error stays one line.

    Raises:
        PipelineError: When one of them failed.
    """
    environment = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["LOCAL_WORLD_SIZE"] = str(processes)
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    command = [sys.executable, *stage_command()]
    with contextlib.ExitStack() as stack:
        # Only the first prints. The output of another is shown if it caused a failure.
        outputs = [None, *(stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes - 1))]
        peers: list[subprocess.Popen[bytes]] = []
        die = functools.partial(die_with_parent, os.getpid())
        with forwarded(peers) as received:
            for rank, output in enumerate(outputs):
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # Each in a new session: a signal reaches it once, from here.
                peer = subprocess.Popen(command, env=ranked, stderr=output, start_new_session=True, preexec_fn=die)
                peers.append(peer)
            failed, killed = _wait_for(peers, received)
        if peers[0].returncode in (1, 2):  # it has printed why
            sys.exit(peers[0].returncode)
        if received and killed:
            raise PipelineError(
                f"stopped by {signal.Signals(received[0]).name}; killed what didn't end within {PATIENCE_SECONDS:.0f} s "
                f"(process {', '.join(map(str, killed))}): run the same command again to resume training"
            )
        if failed is None:
            return
        code, output = peers[failed].returncode, outputs[failed]
        reason = ""
        if output is not None:
            output.seek(0)
            lines = [line for line in output.read().splitlines() if line.strip()]
            reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        # An error is the cause, even if the process was then aborted by the group's threads while it ended.
        if code < 0 and not reason.startswith("error: "):
            reason = f"process {failed} was killed by {signal.Signals(-code).name}"
        raise PipelineError(re.sub(r"^error: \S+ \S+: ", "", reason) or f"process {failed} failed")


def _wait_for(peers: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> tuple[int | None, list[int]]:
    """Waits for all. After a signal or a failure, the others have PATIENCE_SECONDS to end and are then killed.

    Returns the rank of the process that caused the failure, and the ranks that were killed.
    """
    failed: dict[int, int] = {}
    deadline = math.inf
    while None in [peer.poll() for peer in peers] and time.monotonic() < deadline:  # polls all, also those after a running one
        failed = {rank: peer.returncode for rank, peer in enumerate(peers) if peer.returncode}
        if failed or received:
            deadline = min(deadline, time.monotonic() + PATIENCE_SECONDS)
        time.sleep(0.05)
    failed |= {rank: peer.returncode for rank, peer in enumerate(peers) if peer.returncode}
    killed = [rank for rank, peer in enumerate(peers) if peer.poll() is None]
    for peer in peers:
        peer.kill()
        peer.wait()
    return min(failed, key=lambda rank: (failed[rank] == PEER_LOST, rank), default=None), killed
