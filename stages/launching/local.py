"""Several processes of this machine that share the work of a stage (PROCESSES)."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from pipeline.errors import PipelineError
from pipeline.system.processes import die_with_parent

__all__ = ["PEER_LOST", "launched"]

PEER_LOST = 3  # exit status of a process that couldn't go on for want of another
PATIENCE_SECONDS = 10.0  # how long the other processes may take to end once one has failed


def launched() -> bool:
    """Starts PROCESSES processes that share the work, as torchrun would, unless this is one of them, and waits for them.

    Gives whether it did: then the work is done.

    Unlike torchrun it starts at once, and leaves an error at the one line that says what is wrong.
    """
    processes = os.environ.get("PROCESSES", "1")
    if "RANK" in os.environ or processes == "1":
        return False
    if not processes.isdecimal() or not 1 <= int(processes) <= 1024:
        raise PipelineError(f"PROCESSES is {processes[:40]!r}: expected a number from 1 to 1024")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(processes), 1)))
    command = [sys.executable, "-m", "stages", *sys.argv[1:]]
    with contextlib.ExitStack() as stack:
        # The first speaks for all; what the others say is shown when one of them is the cause of a failure.
        words = [None, *(stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(int(processes) - 1))]
        peers: list[subprocess.Popen[bytes]] = []
        with _forwarded(peers):
            for rank, word in enumerate(words):
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # In sessions of their own: a signal reaches them once, from here.
                peer = subprocess.Popen(command, env=ranked, stderr=word, start_new_session=True, preexec_fn=die_with_parent)
                peers.append(peer)
            failed = _wait_for(peers)
        if failed is None:
            return True
        if peers[0].returncode in (1, 2):  # it has said why
            sys.exit(peers[0].returncode)
        code, word = peers[failed].returncode, words[failed]
        said = ""
        if word is not None:
            word.seek(0)
            said = next((line for line in reversed(word.read().splitlines()) if line.strip()), "")
        if code < 0:
            said = f"process {failed} was killed by {signal.Signals(-code).name}"
        raise PipelineError(re.sub(r"^error: \S+ \S+: ", "", said) or f"process {failed} failed")


@contextlib.contextmanager
def _forwarded(peers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hands SIGINT and SIGTERM on."""

    def forward(number: int, _frame: object) -> None:
        for peer in peers:
            with contextlib.suppress(ProcessLookupError):
                peer.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(peers: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits for all; once one has failed, ends the others after a while. Gives the rank of the one that was the cause."""
    failed: dict[int, int] = {}
    deadline = math.inf
    while any(peer.poll() is None for peer in peers) and time.monotonic() < deadline:
        if failed := {rank: peer.returncode for rank, peer in enumerate(peers) if peer.returncode}:
            deadline = min(deadline, time.monotonic() + PATIENCE_SECONDS)
        time.sleep(0.05)
    failed |= {rank: peer.returncode for rank, peer in enumerate(peers) if peer.returncode}
    for peer in peers:
        peer.kill()
        peer.wait()
    return min(failed, key=lambda rank: (failed[rank] == PEER_LOST, rank), default=None)
