"""What launchers share: the command of a stage as one of several processes, and what became of it."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.system.processes import die_with_parent

__all__ = [
    "PEER_LOST",
    "Outcome",
    "conclude",
    "forwarded",
    "free_port",
    "process_count",
    "restart_count",
    "run_rank",
    "stage_command",
]

PEER_LOST = 3  # exit status of a process that stopped because another was lost
RESTARTS = 3
END_SECONDS = 30.0  # for a process to write its checkpoint after a signal


def process_count() -> int:
    """The environment's PROCESSES, 1 by default.

    Raises:
        PipelineError: When it isn't a number from 1 to 1024.
    """
    return _number("PROCESSES", "1", 1)


def restart_count() -> int:
    """The environment's RESTARTS, 3 by default: how often a stage starts again after it lost a process.

    Raises:
        PipelineError: When it isn't a number from 0 to 1024.
    """
    return _number("RESTARTS", str(RESTARTS), 0)


def _number(name: str, default: str, least: int) -> int:
    value = os.environ.get(name) or default
    if not value.isdecimal() or not least <= int(value) <= 1024:
        raise PipelineError(f"{name} is {value[:40]!r}: expected a number from {least} to 1024")
    return int(value)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def forwarded(peers: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forwards SIGINT and SIGTERM, also to stopped processes, and yields the signals received."""
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


def stage_command() -> list[str]:
    """Arguments of Python that run this stage."""
    return ["-m", "stages", *sys.argv[1:]]


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        code: Its exit status; -N after signal N.
        reason: The error that it printed, if any; else, if it failed by itself, its last line.
    """

    code: int
    reason: str = ""

    @property
    def final(self) -> bool:
        """Whether it would end in the same way again: it has printed why."""
        return self.code in (1, 2)


def run_rank(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: str | Path,
    started: list[subprocess.Popen[str]] | None = None,
) -> Outcome:
    """Runs a stage as one of its processes, in a process of its own, and passes on what the first one prints.

    Arguments:
        command: Arguments of Python.
        environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, for `pipeline.system.ranks.join`.
        folder: The project, on a file system that all machines share.
        started: Takes the process, for who wants to end it.
    """
    die = functools.partial(die_with_parent, os.getpid())
    variables = {**os.environ, **environment}
    # The thread must live as long as the process, which dies with the thread that started it.
    process = subprocess.Popen(
        [sys.executable, *command], env=variables, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=die
    )
    if started is not None:
        started.append(process)
    reason = last = ""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("error: "):
            reason = re.sub(r"^error: \S+ \S+: ", "", line.strip())
            continue
        last = line.strip() or last
        if environment["RANK"] == "0":
            sys.stderr.write(line)
            sys.stderr.flush()
    code = process.wait()
    return Outcome(code, reason or (last if code in (1, 2) else ""))  # the last line of a traceback; nobody else sees it


def conclude(outcomes: Sequence[Outcome]) -> None:
    """Ends with the error of the process that caused a failure, if any.

    Raises:
        PipelineError: When a process failed.
    """
    failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome.code}
    if not failed:
        return
    rank = min(failed, key=lambda rank: (not failed[rank].final, failed[rank].code == PEER_LOST, rank))
    code, reason = failed[rank].code, failed[rank].reason
    if not reason and code < 0:
        reason = f"process {rank} was killed by {signal.Signals(-code).name}"
    raise PipelineError(reason or f"process {rank} failed")
