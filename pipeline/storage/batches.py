"""Shuffled batches from parts (shards, or files of codes), the same whatever the number of loader workers.

The order of an epoch is a function of (seed, epoch, rank) alone, so a resumed run continues where the killed one stopped
without any saved state. Memory is bounded by the shuffle window and the cache, not by the data set.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from pipeline.errors import PipelineError, SettingsError
from pipeline.storage.parts import Arrays
from pipeline.system.processes import die_with_parent
from pipeline.system.streams import stream
from pipeline.system.watchdog import stall_seconds, stalled

__all__ = ["Batches"]

CACHE_MIB = 512  # parts are kept in memory up to this total, so small data sets are read only once


class Batches:
    """Shuffled batches of equal length, one epoch after another.

    Each rank reads its share of the parts, in an order drawn for each epoch; parts are gathered into a window of at least
    `window` examples, which is shuffled as a whole. All ranks take the same number of steps: if the parts don't divide evenly,
    a rank that runs out starts again from its first part of the epoch.

    Arguments:
        load: Gives the arrays of part i, each with shape (n_i, ...).
        counts: The n_i.
        batch_size: Examples per step, over all ranks together.
        seed: Seed of the order.
        window: Examples that are shuffled together.
        rank, world: This process and the number of processes.
        workers: Loader processes that read ahead; they affect only the speed. By default the environment's LOADER_WORKERS,
            or 0.
        cache_mib: Memory for parts that are kept from epoch to epoch, in MiB; it affects only the speed. By default the
            environment's CACHE_MIB, or 512.

    Raises:
        SettingsError: When an environment variable isn't a number, or there are fewer examples than processes.

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
        if total < world:
            examples = f"{total} example{'s' * (total != 1)}"
            raise SettingsError(f"{examples} can't be shared by {world} processes: set PROCESSES to {max(total, 1)} or fewer")
        self.load, self.counts, self.seed = load, list(counts), seed
        self._starts = np.cumsum([0, *counts])  # index of each part's first example
        self.window, self.rank, self.world = window, rank, world
        self.workers = _from_environment("LOADER_WORKERS", 0) if workers is None else workers
        self._cache_bytes = (_from_environment("CACHE_MIB", CACHE_MIB) if cache_mib is None else cache_mib) * 2**20
        # A data set smaller than a batch is one batch.
        self.rank_batch = max(min(batch_size, total) // world, 1)
        self.batch_size = self.rank_batch * world
        self.steps_per_epoch = max(total // self.batch_size, 1)
        self._cache: OrderedDict[int, Arrays] = OrderedDict()
        self._cached_bytes = 0

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Arrays]:
        """The batches of an epoch, without the first `skip`."""
        generator = stream("order of examples", self.seed, epoch, self.rank)
        # Every rank draws the same order and takes its own share. With fewer parts than ranks, ranks share parts by rows.
        order = stream("order of parts", self.seed, epoch).permutation(len(self.counts))
        by_rows = len(order) < self.world
        order = order if by_rows else order[self.rank :: self.world]
        wanted = self.steps_per_epoch * self.rank_batch
        emitted = 0
        rest: Arrays = {}
        pending: list[Arrays] = []
        pending_count = 0
        for part in self._parts(order, by_rows, wanted):
            pending.append(part)
            pending_count += len(next(iter(part.values())))
            done = emitted + pending_count + (len(next(iter(rest.values()))) if rest else 0) >= wanted
            if pending_count < self.window and not done:
                continue
            pieces = ([rest] if rest else []) + pending
            pending, pending_count = [], 0
            gathered = {k: np.concatenate([p[k] for p in pieces]) if len(pieces) > 1 else pieces[0][k] for k in pieces[0]}
            count = len(next(iter(gathered.values())))
            permutation = generator.permutation(count)
            stop = min(count - count % self.rank_batch, wanted - emitted)
            for start in range(0, stop, self.rank_batch):
                if emitted // self.rank_batch >= skip:
                    chosen = permutation[start : start + self.rank_batch]
                    yield {k: v[chosen] for k, v in gathered.items()}
                emitted += self.rank_batch
            if emitted >= wanted:
                return
            left = permutation[stop:]
            rest = {k: v[left] for k, v in gathered.items()} if len(left) else {}
            del gathered, pieces, part  # otherwise they stay in memory with the next window

    def _parts(self, order: np.ndarray, by_rows: bool, wanted: int) -> Iterator[Arrays]:
        seen = 0
        while seen < wanted:
            for number, part in zip(order, self._read(order), strict=True):
                # Row i of all parts together goes to rank i mod world, so every rank gets rows.
                first = (self.rank - self._starts[number]) % self.world
                if by_rows:
                    part = {k: v[first :: self.world] for k, v in part.items()}
                count = len(next(iter(part.values())))
                if count == 0:
                    continue
                yield part
                seen += count
                if seen >= wanted:
                    return

    def _read(self, order: np.ndarray) -> Iterator[Arrays]:
        missing = [int(i) for i in order if int(i) not in self._cache]
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
                    timeout=stall_seconds(),
                    multiprocessing_context="fork",
                    worker_init_fn=functools.partial(_start_worker, os.getpid()),
                )
            )
        else:
            loader = map(self.load, missing)
        for i in map(int, order):
            yield self._cache[i] if i in self._cache else self._keep(i, _next(loader))

    def _keep(self, i: int, part: Arrays) -> Arrays:
        length = sum(v.nbytes for v in part.values())
        if self._cached_bytes + length <= self._cache_bytes:
            self._cache[i] = part
            self._cached_bytes += length
        return part


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
    try:
        part = next(loader)
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        if "timed out" in str(error):
            for worker in multiprocessing.active_children():
                with contextlib.suppress(RuntimeError):  # PyTorch's, when it notices
                    worker.kill()  # joining a stopped one would wait for it
                    worker.join()
            raise PipelineError(f"{stalled('a loader process', stall_seconds())}; run the stage again") from None
        raise PipelineError("a loader process was killed, probably for memory: lower LOADER_WORKERS") from None
    if isinstance(part, PipelineError):
        raise part
    return cast(Arrays, part)


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or len(value) > 9:
        raise SettingsError(f"{name} is {value[:40]!r}: expected a number from 0 on")
    return int(value)
