"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log."""

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
BAR_DELAY = 1.0  # work that is done sooner shows no bar


class Progress:
    """Counts work done out of a total and shows it.

    On a terminal it's a tqdm bar with rate and time left; elsewhere a line every 20 seconds.

    Arguments:
        total: How much there is to do, in `unit`.
        label: What is being done.
        unit: What is counted, for example "images".
        initial: How much was done before, when resuming.
        quiet: Whether to show nothing, as on every rank but the first.
        seconds: Time after which the work ends, all done or not; what can be done by then is shown as the total.

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
        """Notes `count` more done; `values` (a loss, say) stand beside the count."""
        worked()
        # One process speaks for all, whose last blocks may be shorter than its own.
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
                f"{self.label}: {self.done}/{total} {self.unit}, {rate:.4g} {self.unit}/s, {left:.0f} s left{shown}",
                file=sys.stderr,
                flush=True,
            )

    def _rate(self, now: float) -> float:
        """What is done in a second."""
        return max(self.done - self.initial, 1) / max(now - self._start, 1e-9)

    def _expected(self, now: float) -> int:
        """What will have been done at the end."""
        if self.seconds == math.inf:
            return self.total
        return min(self.total, max(self.done, round(self.initial + self._rate(now) * self.seconds)))

    def note(self, **values: float) -> None:
        """Prints a line of results, such as those of a validation, above the bar; nothing for work that is quick."""
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


def _shown(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value


def track(blocks: Iterable[Block], total: int, label: str, unit: str = "images", quiet: bool = False) -> Iterator[Block]:
    """Yields blocks one after another and shows how many of their examples are done.

    Arguments:
        blocks: The blocks.
        total: Examples of all blocks together.
        label: What is being done with them.
        unit: What an example is.
        quiet: Whether to show nothing.

    Example:
        >>> [len(block) for block in track([[1, 2], [3]], 3, "counting", quiet=True)]
        [2, 1]
    """
    with Progress(total, label, unit, quiet=quiet) as progress:
        for block in blocks:
            yield block
            progress.advance(len(block))
