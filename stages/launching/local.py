"""Several processes of this machine that share the work of a stage (PROCESSES)."""

from __future__ import annotations

import contextlib
import functools
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
        die = functools.partial(die_with_parent, os.getpid())
        with _forwarded(peers) as received:
            for rank, word in enumerate(words):
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # In sessions of their own: a signal reaches them once, from here.
                peer = subprocess.Popen(command, env=ranked, stderr=word, start_new_session=True, preexec_fn=die)
                peers.append(peer)
            failed, killed = _wait_for(peers, received)
        if peers[0].returncode in (1, 2):  # it has said why
            sys.exit(peers[0].returncode)
        if received and killed:
            raise PipelineError(
                f"stopped by {signal.Signals(received[0]).name}; killed what didn't end within {PATIENCE_SECONDS:.0f} s "
                f"(process {', '.join(map(str, killed))}): run the same command again, training goes on"
            )
        if failed is None:
            return True
        code, word = peers[failed].returncode, words[failed]
        said = ""
        if word is not None:
            word.seek(0)
            lines = [line for line in word.read().splitlines() if line.strip()]
            said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        if code < 0:
            said = f"process {failed} was killed by {signal.Signals(-code).name}"
        raise PipelineError(re.sub(r"^error: \S+ \S+: ", "", said) or f"process {failed} failed")


@contextlib.contextmanager
def _forwarded(peers: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hands SIGINT and SIGTERM on, to stopped processes too, and gives those received."""
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for peer in peers:
            with contextlib.suppress(ProcessLookupError):
                peer.send_signal(number)
                peer.send_signal(signal.SIGCONT)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(peers: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> tuple[int | None, list[int]]:
    """Waits for all; after a signal, or once one has failed, ends the others when they have had time to do so themselves.

    Gives the rank of the one that was the cause, and the ranks that were ended here.
    """
    failed: dict[int, int] = {}
    deadline = math.inf
    while None in [peer.poll() for peer in peers] and time.monotonic() < deadline:  # asks all, also those after a living one
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
