"""Ends a run whose processes wait for one that no longer does anything.

Through their common store (MASTER_ADDR), each process reports how often it has done something and how often it has kept the
processor busy. If a process is silent for STALL_MINUTES minutes (an environment variable; default 10, 0 waits for ever),
because it was stopped or its machine is gone, the run ends with a one-line message that names it. If all processes do nothing,
the message names the one furthest behind. The processes that read raw files in `prepare` are watched in the same way.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import Any

from pipeline.errors import SettingsError

__all__ = ["Watchdog", "stall_seconds", "stalled", "worked"]

STALL_MINUTES = 10.0
LONGEST_INTERVAL = 5.0  # seconds between two checks
BUSY_SHARE = 0.03  # of an interval, in processor time; threads of a process that waits use less than 0.01
JOIN_SECONDS = 2.0  # for the thread to end with its process

_beats = 0


def worked() -> None:
    """Records that this process has done something: a step, a block of examples, a synchronisation."""
    global _beats
    _beats += 1


def stall_seconds() -> float:
    """Seconds after which a process that does nothing ends the run; 0 for never.

    Raises:
        SettingsError: When STALL_MINUTES isn't a number.
    """
    text = os.environ.get("STALL_MINUTES") or str(STALL_MINUTES)
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes <= 1e6:
        raise SettingsError(f"STALL_MINUTES is {text[:40]!r}: expected a number of minutes, 0 for no limit")
    return minutes * 60


def stalled(who: str, seconds: float) -> str:
    """The message about a process that does nothing."""
    return f"{who} has done nothing for {seconds / 60:.3g} minutes (STALL_MINUTES): it is stopped or waits for something"


class Watchdog:
    """One thread reports what this process does; another checks the peers' reports.

    Arguments:
        store: A connection to the torch.distributed store of all peers; nothing else may use this connection.
        rank, world: This process and the number of processes.
        seconds: How long a process may do nothing.
    """

    def __init__(self, store: Any, rank: int, world: int, seconds: float) -> None:
        self.store, self.rank, self.world, self.seconds = store, rank, world, seconds
        self.interval = min(seconds / 20, LONGEST_INTERVAL)
        self._keys = [f"watchdog/{rank}" for rank in range(world)]
        self._ended = threading.Event()
        self._told: list[str] = []  # reports of all ranks at the last exchange
        self._exchanged = 0  # number of exchanges

    def start(self) -> None:
        """Starts both threads; they end with the process."""
        self.store.set(self._keys[self.rank], "0 0 0")  # before anything else, since the others wait for it
        exchange = threading.Thread(target=self._exchange, name="watchdog-exchange", daemon=True)
        exchange.start()
        threading.Thread(target=self._look, name="watchdog-look", daemon=True).start()

        def end() -> None:
            self._ended.set()
            exchange.join(JOIN_SECONDS)  # a thread inside the store's code must not outlive the interpreter

        atexit.register(end)

    def _exchange(self) -> None:
        pulse = busy = 0
        now, used = time.monotonic(), time.process_time()
        try:
            while not self._ended.is_set():
                pulse += 1
                last, used_before = now, used
                now, used = time.monotonic(), time.process_time()
                busy += used - used_before > BUSY_SHARE * (now - last)  # the time itself grows while all wait
                self.store.set(self._keys[self.rank], f"{pulse} {_beats} {busy}")
                self._told = [value.decode() for value in self.store.multi_get(self._keys)]
                self._exchanged += 1
                self._ended.wait(self.interval)
            self.store.set(self._keys[self.rank], "")  # this one is done
        except RuntimeError:  # the store's process has ended; its parent notices
            self._ended.set()

    def _look(self) -> None:
        now = time.monotonic()
        heard = [now] * self.world  # time of each rank's last new report
        active, exchanged = now, now  # time of the last activity of any rank, and of the last exchange
        before, count = [""] * self.world, 0
        while not self._ended.wait(self.interval):
            last, now = now, time.monotonic()
            if now - last > 2 * self.interval + 1:  # this process was stopped itself and has no news of the others
                heard, active, exchanged = [now] * self.world, now, now
            if self._exchanged == count:
                if self.rank and now - exchanged >= self.seconds:
                    self._end(0)  # rank 0 has the store and doesn't answer
                continue
            exchanged, count, told = now, self._exchanged, self._told
            heard = [now if new != old or not new else at for new, old, at in zip(told, before, heard, strict=True)]
            if any(new.split()[1:] != old.split()[1:] for new, old in zip(told, before, strict=True)):
                active = now
            before = told
            silent = [rank for rank, at in enumerate(heard) if now - at >= self.seconds]
            if silent:
                self._end(silent[0])
            elif now - active >= self.seconds:
                beats = {rank: int(text.split()[1]) for rank, text in enumerate(told) if text}
                self._end(min(beats, key=beats.__getitem__))

    def _end(self, culprit: int) -> None:
        # The first process that can prints the message; the others end when it is gone.
        self._ended.wait(self.rank * self.interval if culprit else (self.rank - 1) * self.interval)
        name = " ".join(sys.argv[1:3])
        print(f"error: {name}: {stalled(f'process {culprit}', self.seconds)}", file=sys.stderr, flush=True)
        os._exit(1)
