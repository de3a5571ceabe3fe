"""Discrete events: processes that wait for one another, for links and for cores, on a clock of their own.

A process is a generator. It yields what it waits for: a time of the clock, or a call of `Line.put` or `Line.get`. Links and
cores serve in the order of arrival.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

__all__ = ["Clock", "Cores", "Line", "Link", "Process"]

Resume = Callable[[Any], None]
Process = Generator[float | Callable[[Resume], None], Any, None]


class Clock:
    """Resumes processes in the order of the times that they wait for.

    Arguments:
        now: The time to begin at, in seconds.

    Example:
        >>> clock, link, seen = Clock(), Link(10.0), []
        >>> def sender(size):
        ...     yield link.take(clock.now, size)
        ...     seen.append((size, clock.now))
        >>> for size in (20, 30):
        ...     clock.start(sender(size))
        >>> clock.run()
        >>> seen
        [(20, 2.0), (30, 5.0)]
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._events: list[tuple[float, int, Process, Any]] = []
        self._numbers = itertools.count()  # of events at the same time, the first comes first

    def start(self, process: Process) -> None:
        """Starts a process now."""
        self._at(self.now, process, None)

    def run(self, until: float = math.inf) -> None:
        """Runs until no process waits for a time, or until that time."""
        while self._events and self._events[0][0] <= until:
            self.now, _, process, value = heapq.heappop(self._events)
            self._resume(process, value)
        if self._events:
            self.now = until

    def _at(self, time: float, process: Process, value: Any) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), process, value))

    def _resume(self, process: Process, value: Any) -> None:
        try:
            wanted = process.send(value)
        except StopIteration:
            return
        if callable(wanted):
            wanted(lambda result: self._at(self.now, process, result))
        else:
            self._at(max(wanted, self.now), process, None)


class Line:
    """Items that wait, at most so many.

    Arguments:
        length: Items that may wait.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._items: collections.deque[Any] = collections.deque()
        self._givers: collections.deque[tuple[Any, Resume]] = collections.deque()
        self._takers: collections.deque[Resume] = collections.deque()

    def put(self, item: Any) -> Callable[[Resume], None]:
        """Waits until there is room for an item."""

        def wait(resume: Resume) -> None:
            if self._takers:
                self._takers.popleft()(item)
                resume(None)
            elif len(self._items) < self.length:
                self._items.append(item)
                resume(None)
            else:
                self._givers.append((item, resume))

        return wait

    def get(self) -> Callable[[Resume], None]:
        """Waits for an item, which `yield` returns."""

        def wait(resume: Resume) -> None:
            if self._items:
                resume(self._items.popleft())
                if self._givers:
                    item, giver = self._givers.popleft()
                    self._items.append(item)
                    giver(None)
            else:
                self._takers.append(resume)

        return wait


class Cores:
    """Servers that each serve one at a time, such as the cores of a node.

    Arguments:
        count: Number of servers.

    Attributes:
        busy: Seconds that they have worked, together.
    """

    def __init__(self, count: int) -> None:
        self.count, self.busy = count, 0.0
        self._free = [0.0] * count

    def take(self, now: float, seconds: float) -> float:
        """When work of so many seconds is done that arrives now."""
        done = max(heapq.heappop(self._free), now) + seconds
        heapq.heappush(self._free, done)
        self.busy += seconds
        return done


class Link(Cores):
    """A link, or a disk: so many bytes per second, one transfer after another.

    Arguments:
        rate: Bytes per second.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(1)
        self.rate = rate

    def take(self, now: float, size: float) -> float:
        """When so many bytes have passed that arrive now."""
        return super().take(now, size / self.rate)


def through(links: Sequence[Link], now: float, size: float) -> float:
    """When bytes have passed all of these links: the slowest decides."""
    return max(link.take(now, size) for link in links)
