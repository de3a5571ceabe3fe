"""Shuffled batches from parts (shards, or files of codes), the same on any number of processes and of loader workers.

The order of an epoch is a function of (seed, epoch) alone, so a resumed run continues where the killed one stopped without any
saved state, on as many processes as there are now. Memory is bounded by the shuffle window and the cache, not by the data set.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import multiprocessing
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from pipeline.errors import PipelineError, SettingsError
from pipeline.storage.parts import Arrays
from pipeline.system.processes import die_with_parent
from pipeline.system.streams import stream
from pipeline.system.watchdog import stall_seconds, stalled

__all__ = ["Batches", "run_ahead"]

AHEAD = 2  # batches that wait to be trained on
LOADER_SECONDS = 2.0  # between two checks that loader processes live; only the main thread is told when one dies
JOIN_SECONDS = 5.0  # for the thread that gathers them to end
CACHE_MIB = 512  # parts are kept in memory up to this total, so small data sets are read only once


class Batches:
    """Shuffled batches of equal length, one epoch after another; each process gets its places of every batch.

    A data set that fits into the shuffle window is shuffled as a whole. A larger one is dealt to lanes: parts, in an order
    drawn for each epoch, go to the lanes in turn. Each lane gathers parts into a window of its own, a share of `window`, and
    shuffles it. A batch takes equally many examples from each lane, in the lanes' order, and a process has consecutive places.
    So it reads only the lanes of its places: its share of the parts, if the number of processes divides that of the lanes.

    Arguments:
        load: Gives the arrays of part i, each with shape (n_i, ...).
        counts: The n_i.
        batch_size: Examples per step, over all processes together.
        seed: Seed of the order.
        window: Examples that are shuffled together, over all lanes.
        rank, world: This process and the number of processes.
        workers: Loader processes that read ahead; they affect only the speed. By default the environment's LOADER_WORKERS,
            or 0.
        cache_mib: Memory for parts that are kept from epoch to epoch, in MiB; it affects only the speed. By default the
            environment's CACHE_MIB, or 512.

    Attributes:
        batch_size: Examples per step; a data set smaller than a batch is one batch.
        places: Places of a batch that this process computes.
        share: Weight of this process's mean over its examples, so that the mean over processes is that of the batch.
        steps_per_epoch: Steps in an epoch; examples that don't fill a batch are left out.

    Raises:
        SettingsError: When an environment variable isn't a number, or a batch has fewer examples than there are processes.

    Example:
        >>> batches = Batches(lambda i: {"x": np.arange(4) + 4 * i}, [4, 4], batch_size=3, seed=0)
        >>> batches.steps_per_epoch
        2
        >>> len({int(x) for batch in batches.epoch(0) for x in batch["x"]})
        6
    """

    def __init__(
        self,
        load: Callable[[int], Arrays],
        counts: Sequence[int],
        batch_size: int,
        seed: int,
        window: int = 65_536,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
        cache_mib: int | None = None,
    ) -> None:
        total = sum(counts)
        self.batch_size = min(batch_size, total)
        if self.batch_size < world:
            examples = f"a batch of {self.batch_size} example{'s' * (self.batch_size != 1)}"
            raise SettingsError(
                f"{examples} can't be shared by {world} processes: set PROCESSES to {max(self.batch_size, 1)} or fewer"
            )
        self.load, self.counts, self.seed = load, list(counts), seed
        self.places = range(rank * self.batch_size // world, (rank + 1) * self.batch_size // world)
        self.share = len(self.places) * world / self.batch_size
        self.steps_per_epoch = total // self.batch_size
        self.lanes = 1
        if total > window:
            most = min(window // max(counts), len(counts), self.batch_size)
            self.lanes = max(n for n in range(1, max(most, 1) + 1) if self.batch_size % n == 0)
        self.window = -(-window // self.lanes)
        self.workers = _from_environment("LOADER_WORKERS", 0) if workers is None else workers
        self._cache_bytes = (_from_environment("CACHE_MIB", CACHE_MIB) if cache_mib is None else cache_mib) * 2**20
        self._cache: OrderedDict[int, Arrays] = OrderedDict()
        self._cached_bytes = 0

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Arrays]:
        """The batches of an epoch, without the first `skip`: of each, the examples at the places of this process."""
        order = stream("order of parts", self.seed, epoch).permutation(len(self.counts)).tolist()
        slices = list(self._slices([order[lane :: self.lanes] for lane in range(self.lanes)], skip))
        parts = self._read([part for window in dict.fromkeys(window for window, _, _ in slices) for part in window.parts])
        held: dict[int, tuple[_Window, np.ndarray, list[Arrays]]] = {}  # by lane: a window, its order and its parts
        pieces: list[Arrays] = []
        for window, start, stop in slices:
            if window.lane not in held or held[window.lane][0] != window:
                held.pop(window.lane, None)  # frees its memory before the next is read
                permutation = stream("order of examples", self.seed, epoch, window.number).permutation(window.count)
                held[window.lane] = (window, permutation, [next(parts) for _ in window.parts])
            _, permutation, arrays = held[window.lane]
            pieces.append(_gathered(arrays, permutation[start - window.start : stop - window.start]))
            if sum(map(_length, pieces)) == len(self.places):
                yield pieces[0] if len(pieces) == 1 else {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
                pieces = []

    def _windows(self, parts: list[int], lane: int, wanted: int) -> list[_Window]:
        """A lane's windows of whole parts, in order, until they hold all that is wanted of the lane."""
        windows: list[_Window] = []
        gathered: list[int] = []
        start = count = 0
        for part in parts:
            gathered.append(part)
            count += self.counts[part]
            if count >= self.window or start + count >= wanted:
                windows.append(_Window(lane, len(windows) * self.lanes + lane, start, count, tuple(gathered)))
                start, count, gathered = start + count, 0, []
            if start >= wanted:
                break
        return windows

    def _slices(self, parts: Sequence[list[int]], skip: int) -> Iterator[tuple[_Window, int, int]]:
        """The windows that this process's places take examples from, with the first and the last number within the lane."""
        deal = _Deal([sum(self.counts[i] for i in lane_parts) for lane_parts in parts])
        wanted = deal.taken(self.steps_per_epoch * self.batch_size)
        lanes = [self._windows(lane_parts, lane, wanted[lane]) for lane, lane_parts in enumerate(parts)]
        starts = [[window.start for window in windows] for windows in lanes]
        for step in range(skip, self.steps_per_epoch):
            for lane, start, stop in deal.batch(step * self.batch_size, self.batch_size, self.places):
                while start < stop:
                    window = lanes[lane][bisect.bisect_right(starts[lane], start) - 1]
                    end = min(stop, window.start + window.count)
                    yield window, start, end
                    start = end

    def _read(self, order: Sequence[int]) -> Iterator[Arrays]:
        missing = [i for i in order if i not in self._cache]
        if self.workers and missing:
            from torch.utils.data import DataLoader

            # One item per part, in the requested order: the number of workers affects only the speed.
            loader: Iterator[Arrays] = iter(
                DataLoader(
                    cast(Any, _Parts(self.load)),
                    sampler=missing,
                    batch_size=None,
                    num_workers=self.workers,
                    collate_fn=_as_is,
                    timeout=min(LOADER_SECONDS, stall_seconds() or LOADER_SECONDS),
                    multiprocessing_context="fork",
                    worker_init_fn=functools.partial(_start_worker, os.getpid()),
                )
            )
        else:
            loader = map(self.load, missing)
        for i in order:
            yield self._cache[i] if i in self._cache else self._keep(i, _next(loader))

    def _keep(self, i: int, part: Arrays) -> Arrays:
        length = sum(v.nbytes for v in part.values())
        if self._cached_bytes + length <= self._cache_bytes:
            self._cache[i] = part
            self._cached_bytes += length
        return part


@dataclass(frozen=True)
class _Window:
    """Parts of a lane that are shuffled together.

    Attributes:
        lane: Number of the lane.
        number: Number among the windows of all lanes.
        start: Examples of the lane before it.
        count: Its examples.
        parts: Numbers of its parts.
    """

    lane: int
    number: int
    start: int
    count: int
    parts: tuple[int, ...]


class _Deal:
    """The order in which examples of lanes follow one another: one from each lane that has any left, over and over.

    Arguments:
        counts: Examples of each lane.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = np.array(counts)
        # Between the lengths of two lanes, the same lanes have examples left.
        self._rounds = np.unique([0, *counts])[:-1]
        self._live = [np.flatnonzero(self.counts > rounds) for rounds in self._rounds]
        self._first = [int(np.minimum(self.counts, rounds).sum()) for rounds in self._rounds]

    def taken(self, count: int) -> list[int]:
        """How many of the first `count` examples come from each lane."""
        segment = bisect.bisect_right(self._first, count) - 1
        rounds, rest = divmod(count - self._first[segment], len(self._live[segment]))
        taken = np.minimum(self.counts, self._rounds[segment] + rounds)
        taken[self._live[segment][:rest]] += 1
        return [int(value) for value in taken]

    def batch(self, first: int, size: int, places: range) -> Iterator[tuple[int, int, int]]:
        """Places of a batch, sorted by lane: the lane, and the first and the last example's number within it.

        Arguments:
            first: Examples before the batch.
            size: Examples of the batch.
            places: The places that are asked for.
        """
        lanes = len(self.counts)
        if first % lanes == size % lanes == 0 and (len(self._first) == 1 or first + size <= self._first[1]):
            each = size // lanes
            for lane in range(places.start // each, -(-places.stop // each)):
                start = first // lanes - lane * each
                yield lane, max(places.start, lane * each) + start, min(places.stop, (lane + 1) * each) + start
            return
        numbers = np.arange(first, first + size)
        segments = np.searchsorted(self._first, numbers, side="right") - 1
        owners, indices = np.empty_like(numbers), np.empty_like(numbers)
        for segment in np.unique(segments):
            here, live = segments == segment, self._live[segment]
            rounds, turn = np.divmod(numbers[here] - self._first[segment], len(live))
            owners[here], indices[here] = live[turn], self._rounds[segment] + rounds
        chosen = np.argsort(owners, kind="stable")[places.start : places.stop]
        for owner in np.unique(owners[chosen]):
            taken = indices[chosen[owners[chosen] == owner]]
            yield int(owner), int(taken[0]), int(taken[-1]) + 1


def _length(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _gathered(parts: Sequence[Arrays], chosen: np.ndarray) -> Arrays:
    """Chosen examples of parts, counted through all of them, in the given order."""
    if len(parts) == 1:
        return {name: values[chosen] for name, values in parts[0].items()}
    starts = np.cumsum([0, *map(_length, parts)])
    owner = np.searchsorted(starts, chosen, side="right") - 1
    gathered = {name: np.empty((len(chosen), *values.shape[1:]), values.dtype) for name, values in parts[0].items()}
    for number in np.unique(owner):
        here = owner == number
        for name, values in parts[number].items():
            gathered[name][here] = values[chosen[here] - starts[number]]
    return gathered


class _Parts:
    """A map-style data set whose items are parts."""

    def __init__(self, load: Callable[[int], Arrays]) -> None:
        self.load = load

    def __getitem__(self, i: int) -> Arrays | PipelineError:
        try:
            return self.load(i)
        except PipelineError as error:
            return error  # if raised in the loader process, its message would contain the traceback


def _start_worker(parent: int, _number: int) -> None:
    die_with_parent(parent)


def _as_is(part: Any) -> Any:
    return part


def _next(loader: Iterator[Any]) -> Arrays:
    patience = stall_seconds()
    started = time.monotonic()
    while True:
        try:
            part = next(loader)
            break
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            if "timed out" not in str(error):
                raise PipelineError("a loader process was killed, probably for memory: lower LOADER_WORKERS") from None
            if patience and time.monotonic() - started >= patience:
                for worker in multiprocessing.active_children():
                    with contextlib.suppress(RuntimeError):  # PyTorch's, when it notices
                        worker.kill()  # joining a stopped one would wait for it
                        worker.join()
                raise PipelineError(f"{stalled('a loader process', patience)}; run the stage again") from None
    if isinstance(part, PipelineError):
        raise part
    return cast(Arrays, part)


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or len(value) > 9:
        raise SettingsError(f"{name} is {value[:40]!r}: expected a number from 0 on")
    return int(value)


def run_ahead(batches: Iterator[Arrays], pinned: bool = False) -> Generator[Arrays, None, None]:
    """The same batches, gathered by a thread that runs ahead of the one that trains on them.

    Arguments:
        batches: The batches.
        pinned: Whether to put them into page-locked memory, from which a copy to a GPU doesn't wait.
    """
    ready: queue.Queue[Arrays | BaseException | None] = queue.Queue(AHEAD)
    ended = threading.Event()

    def put(item: Arrays | BaseException | None) -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def gather() -> None:
        try:
            for batch in batches:
                put(_pinned(batch) if pinned else batch)
                if ended.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=gather, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        thread.join(JOIN_SECONDS)  # a reader that hangs must not keep the run from ending


def _pinned(batch: Arrays) -> Arrays:
    import torch

    pinned = {name: torch.from_numpy(values).pin_memory() for name, values in batch.items()}
    return {name: values.numpy() for name, values in pinned.items()}
