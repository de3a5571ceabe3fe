"""Progress of long tasks: a bar with rate and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Self, TypeVar

from pipeline.system.watchdog import worked

__all__ = ["Progress", "track"]

Block = TypeVar("Block", bound=Sized)

LOG_SECONDS = 20.0  # between two lines of a log
BAR_DELAY = 1.0  # shorter tasks show no bar


class Progress:
    """Counts and shows how much of a total is done.

    On a terminal it's a tqdm bar with rate and time left; elsewhere a line every 20 seconds.

    Arguments:
        total: Amount of work, in `unit`.
        label: Name of the task.
        unit: Unit of the count, for example "images".
        initial: Amount done before, when resuming.
        quiet: Whether to show nothing, as on every rank but the first.
        seconds: Time limit; the amount that can be done by then is shown as the total.

    Example:
        >>> with Progress(2, "counting", unit="steps", quiet=True) as progress:
        ...     progress.advance(2, loss=0.5)
    """

    def __init__(
        self, total: int, label: str, unit: str = "it", initial: int = 0, quiet: bool = False, seconds: float = math.inf
    ) -> None:
        self.total, self.label, self.unit, self.seconds = total, label, unit, seconds
        self.done, self.initial = initial, initial
        self.quiet = quiet
        self._bar = None
        self._start = self._logged = time.monotonic()
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=label, unit=f" {unit}", initial=initial, delay=BAR_DELAY, leave=False, dynamic_ncols=True
            )

    def advance(self, count: int = 1, **values: float | str) -> None:
        """Adds `count` to the amount done; `values` (for example a loss) are shown next to it."""
        worked()
        # One rank logs for all; the last blocks of the others may be shorter than its own.
        count = min(count, max(self.total - self.done, 0))
        self.done += count
        if self.quiet:
            return
        now = time.monotonic()
        rate, total = self._rate(now), self._expected(now)
        if self._bar is not None:
            self._bar.total = total
            if values:
                self._bar.set_postfix({k: _shown(v) for k, v in values.items()}, refresh=False)
            self._bar.update(count)
            return
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            left = max(total - self.done, 0) / rate
            shown = "".join(f", {k} {_shown(v)}" for k, v in values.items())
            print(
                f"{self.label}: {self.done}/{total} {self.unit}, {rate:.4g} {self.unit}/s, {_time(left)} left{shown}",
                file=sys.stderr,
                flush=True,
            )

    def _rate(self, now: float) -> float:
        """Amount done per second."""
        return max(self.done - self.initial, 1) / max(now - self._start, 1e-9)

    def _expected(self, now: float) -> int:
        """Expected amount done at the end."""
        if self.seconds == math.inf:
            return self.total
        return min(self.total, max(self.done, round(self.initial + self._rate(now) * self.seconds)))

    def note(self, **values: float) -> None:
        """Prints a line of results, such as those of a validation, above the bar; nothing for short tasks."""
        if self.quiet or not values or time.monotonic() - self._logged < LOG_SECONDS:
            return
        self._logged = time.monotonic()
        shown = ", ".join(f"{k} {_shown(v)}" for k, v in values.items())
        line = f"{self.label}: {self.done}/{self._expected(self._logged)} {self.unit}, {shown}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()


def _time(seconds: float) -> str:
    """A time to wait.

    Example:
        >>> _time(89.6), _time(2310), _time(9000)
        ('90 s', '38 min', '2 h 30 min')
    """
    minutes = int(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _shown(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value


def track(blocks: Iterable[Block], total: int, label: str, unit: str = "images", quiet: bool = False) -> Iterator[Block]:
    """Yields the blocks in order and shows how many of their examples are done.

    Arguments:
        blocks: The blocks.
        total: Examples of all blocks together.
        label: Name of the task.
        unit: Name of the examples.
        quiet: Whether to show nothing.

    Example:
        >>> [len(block) for block in track([[1, 2], [3]], 3, "counting", quiet=True)]
        [2, 1]
    """
    with Progress(total, label, unit, quiet=quiet) as progress:
        for block in blocks:
            yield block
            progress.advance(len(block))
