"""Raw files of a source -> shards: read in parallel, counted, checked for duplicates, written in order."""

from __future__ import annotations

import collections
import hashlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError, PipelineError
from pipeline.settings import DatasetSettings, implementation
from pipeline.storage.parts import SPLITS, write_index
from pipeline.storage.shards import ShardIndex, ShardWriter
from pipeline.system.files import atomic_folder
from pipeline.system.processes import die_with_parent
from pipeline.system.progress import Progress
from pipeline.system.watchdog import stall_seconds, stalled

__all__ = ["PreparationReport", "prepare_shards"]

READ_EXAMPLES = 1024  # examples that a worker process reads at a time
BUCKETS = 64


@dataclass
class PreparationReport:
    """What `prepare_shards` found.

    Attributes:
        counts: Examples written, by split.
        duplicates: Examples of one split that are also in an earlier one, for "train_valid", "train_test" and "valid_test".
        unreadable: Skipped files, each with the reason.
        enlarged: Images that were enlarged from fewer pixels.
        dark: Images written that are nearly black everywhere.
        split_origin: Description of where the split comes from; may be empty.
        notes: Further remarks of the source on how the data were read.
        means: What was subtracted from each dimension of the vectors; empty for nothing.
        skipped: Number of files of each ending that isn't an image's, which were skipped.
        digest: Digest of the shards.
    """

    counts: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    enlarged: int = 0
    dark: int = 0
    split_origin: str = ""
    notes: tuple[str, ...] = ()
    means: tuple[float, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    digest: str = ""


class _Duplicates:
    """Counts examples that are in two splits, by 64-bit digests in bucket files: memory holds 1/64 of them."""

    _type = np.dtype([("digest", "<u8"), ("split", "u1")])

    def __init__(self, folder: Path) -> None:
        self._files = [open(folder / f"{i:02d}", "w+b") for i in range(BUCKETS)]  # noqa: SIM115

    def add(self, split: int, examples: np.ndarray) -> None:
        digests = np.array(
            [int.from_bytes(hashlib.blake2b(e.tobytes(), digest_size=8).digest(), "little") for e in examples], np.uint64
        )
        rows = np.empty(len(digests), self._type)
        rows["digest"], rows["split"] = digests, split
        for bucket in np.unique(digests % BUCKETS):
            self._files[int(bucket)].write(rows[digests % BUCKETS == bucket].tobytes())

    def counts(self) -> dict[str, int]:
        """For each pair of splits, the number of examples of the later one that are also in the earlier one."""
        counts = {"train_valid": 0, "train_test": 0, "valid_test": 0}
        for file in self._files:
            file.seek(0)
            rows = np.frombuffer(file.read(), self._type)
            splits = [rows["digest"][rows["split"] == i] for i in range(3)]
            for pair, (a, b) in zip(counts, ((0, 1), (0, 2), (1, 2)), strict=True):
                counts[pair] += int(np.isin(splits[b], splits[a]).sum())
            file.close()
        return counts


def prepare_shards(settings: DatasetSettings, folder: str | Path, processes: int | None = None) -> PreparationReport:
    """Writes the shards of a data set; the same raw files and settings give the same bytes.

    Arguments:
        settings: A row of `datasets`.
        folder: Where the shards go; replaced as a whole.
        processes: Number of reading processes, by default one per core.

    Raises:
        DataError: When raw files are missing or too many can't be read.
    """
    module = implementation("pipeline.sources", settings.source, "source")
    source = module.open_source(settings, Path(settings.root))
    report = PreparationReport(
        split_origin=source.split_origin, notes=source.notes, means=source.means, skipped=dict(source.skipped)
    )
    ranges = [
        (split, start, min(start + READ_EXAMPLES, source.counts[split]))
        for split in SPLITS
        for start in range(0, source.counts.get(split, 0), READ_EXAMPLES)
    ]
    for split in SPLITS:
        if not source.counts.get(split):
            raise DataError(f"{settings.root}: split '{split}' of source '{settings.source}' has no examples")
    shards: dict[str, Any] = {}
    shape: tuple[int, ...] = ()
    dtype = "uint8"
    with atomic_folder(folder) as temporary, tempfile.TemporaryDirectory(dir=temporary) as scratch:
        duplicates = _Duplicates(Path(scratch))
        writer: ShardWriter | None = None
        total = sum(source.counts.values())
        allowed = getattr(settings, "unreadable_share", 0.001) * total
        with Progress(total, f"preparing {Path(folder).name}", unit="examples") as progress:
            for (split, start, stop), block in _read_all(source, ranges, processes or os.cpu_count() or 1):
                if writer is None or writer.split != split:
                    if writer is not None:
                        writer.close()
                    writer = ShardWriter(temporary, split, settings.shard_examples)
                    shards[split] = writer.shards
                report.unreadable += block.unreadable
                report.enlarged += block.enlarged
                report.dark += block.dark
                if len(report.unreadable) > allowed:  # at once: otherwise the list would grow with the data set
                    raise DataError(
                        f"{settings.root}: {len(report.unreadable)} or more of {total} files can't be read, more than "
                        f"unreadable_share allows; the first: {report.unreadable[0]}"
                    )
                if len(block.examples):
                    shape, dtype = block.examples.shape[1:], str(block.examples.dtype)
                    arrays = {"examples": block.examples} | ({} if block.labels is None else {"labels": block.labels})
                    writer.write(**arrays)
                    duplicates.add(SPLITS.index(split), block.examples)
                progress.advance(stop - start)
            if writer is not None:
                writer.close()
        for split in SPLITS:
            if not shards.get(split):
                raise DataError(f"{settings.root}: no example of split '{split}' could be read")
        index = ShardIndex(
            kind=source.kind,
            shape=shape,
            dtype="uint8" if dtype == "uint8" else "float32",
            value_range=source.value_range,
            label_names=source.label_names,
            **{split: tuple(shards[split]) for split in SPLITS},
        )
        report.duplicates = duplicates.counts()
        write_index(temporary, index)
    report.counts = {split: index.count(split) for split in SPLITS}
    report.digest = index.digest
    return report


def _read_all(source: Any, ranges: list[tuple[str, int, int]], processes: int) -> Iterator[tuple[tuple[str, int, int], Any]]:
    """Blocks in order; a bounded number is read ahead."""
    if processes == 1 or len(ranges) <= 2:
        for part in ranges:
            yield part, source.read(*part)
        return
    # Forked before anything large is imported; each process keeps its own open files.
    context = multiprocessing.get_context("fork")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_set_source, initargs=(source, os.getpid())) as pool:
        waiting: collections.deque[tuple[tuple[str, int, int], Future[Any]]] = collections.deque()
        try:
            for part in ranges:
                waiting.append((part, pool.submit(_read_range, part)))
                if len(waiting) > 2 * processes:
                    yield waiting[0][0], _first_result(waiting)
                    waiting.popleft()
            while waiting:
                yield waiting[0][0], _first_result(waiting)
                waiting.popleft()
        except BaseException as error:
            for reader in set(multiprocessing.active_children()) - others:
                reader.kill()  # it has nothing to lose, and joining a stopped one would wait for it
            if isinstance(error, BrokenProcessPool):
                raise PipelineError("a process that read raw files was killed, probably for memory: free some") from None
            raise


def _first_result(waiting: collections.deque[tuple[tuple[str, int, int], Future[Any]]]) -> Any:
    """The first block, as soon as it's read.

    Raises:
        PipelineError: When no process finishes any block for too long.
    """
    patience = stall_seconds()
    while not waiting[0][1].done():
        unread = [future for _, future in waiting if not future.done()]
        if not wait(unread, patience or None, FIRST_COMPLETED).done:
            split, start, stop = waiting[0][0]
            who = f"the process that reads examples {start} to {stop} of split '{split}'"
            raise PipelineError(f"{stalled(who, patience)}; run the stage again")
    return waiting[0][1].result()


_source: Any = None


def _set_source(source: Any, parent: int) -> None:
    global _source
    _source = source
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; one message is enough
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _read_range(part: tuple[str, int, int]) -> Any:
    return _source.read(*part)
