"""Raw files of a source -> shards: read in parallel, counted, checked for duplicates, written in order."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DataError, PipelineError
from pipeline.settings import DatasetSettings, implementation
from pipeline.storage.parts import SPLITS, Part, part_name, write_index
from pipeline.storage.shards import ShardIndex, ShardWriter
from pipeline.system.files import atomic_folder
from pipeline.system.processes import die_with_parent
from pipeline.system.progress import Progress
from pipeline.system.watchdog import stall_seconds, stalled

if TYPE_CHECKING:
    from pipeline.system.ranks import Ranks

__all__ = ["PreparationReport", "prepare_shards"]

READ_EXAMPLES = 1024  # examples that a worker process reads at a time
BUCKETS = 64


@dataclass
class PreparationReport:
    """What `prepare_shards` found.

    Attributes:
        counts: Examples written, by split.
        duplicates: Examples of one split that are also in an earlier one, for "train_valid", "train_test" and "valid_test".
        repeated: Examples of each split that are the same as an earlier one of that split.
        unreadable: Skipped files, each with the reason.
        enlarged: Images that were enlarged from fewer pixels.
        dark: Images written that are nearly black everywhere.
        split_origin: Description of where the split comes from; may be empty.
        notes: Further remarks of the source on how the data were read.
        skipped: Number of files of each ending that isn't an image's, which were skipped.
        digest: Digest of the shards.
    """

    counts: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    enlarged: int = 0
    dark: int = 0
    split_origin: str = ""
    notes: tuple[str, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    digest: str = ""


class _Duplicates:
    """Finds examples that are in two splits or twice in one, by 64-bit digests in bucket files: memory holds 1/64 of them.

    Arguments:
        folder: Where the files are; several processes may each write their own.
        rank: Number of this process.
    """

    _type = np.dtype([("digest", "<u8"), ("split", "u1")])

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._files = [open(folder / f"{i:02d}-{rank}", "wb") for i in range(BUCKETS)]  # noqa: SIM115

    def add(self, split: int, examples: np.ndarray) -> None:
        digests = np.array(
            [int.from_bytes(hashlib.blake2b(e.tobytes(), digest_size=8).digest(), "little") for e in examples], np.uint64
        )
        rows = np.empty(len(digests), self._type)
        rows["digest"], rows["split"] = digests, split
        for bucket in np.unique(digests % BUCKETS):
            self._files[int(bucket)].write(rows[digests % BUCKETS == bucket].tobytes())

    def close(self) -> None:
        for file in self._files:
            file.close()

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """The number of examples of a later split that are also in an earlier one, by pair; and those that a split repeats.

        Those of all processes, which must have closed their files.
        """
        self.close()
        counts, repeated = {"train_valid": 0, "train_test": 0, "valid_test": 0}, dict.fromkeys(SPLITS, 0)
        for bucket in range(BUCKETS):
            data = b"".join(path.read_bytes() for path in sorted(self.folder.glob(f"{bucket:02d}-*")))
            rows = np.frombuffer(data, self._type)
            splits = [rows["digest"][rows["split"] == i] for i in range(3)]
            for pair, (a, b) in zip(counts, ((0, 1), (0, 2), (1, 2)), strict=True):
                counts[pair] += int(np.isin(splits[b], splits[a]).sum())
            for split, digests in zip(SPLITS, splits, strict=True):
                repeated[split] += len(digests) - len(np.unique(digests))
        return counts, repeated


@dataclass
class _Written:
    """What one process wrote: shards by split and number, and what it found."""

    shards: dict[tuple[str, int], Part] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    enlarged: int = 0
    dark: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = "uint8"


def prepare_shards(
    settings: DatasetSettings, folder: str | Path, processes: int | None = None, ranks: Ranks | None = None
) -> PreparationReport:
    """Writes the shards of a data set; the same raw files and settings give the same bytes, on any number of ranks.

    A shard holds a fixed range of the source's examples, without those that can't be read. Each rank writes a range of shards.

    Arguments:
        settings: A row of `datasets`.
        folder: Where the shards go; replaced as a whole.
        processes: Number of reading processes, by default one per core.
        ranks: This process among its peers; None for one alone, which needs no PyTorch.

    Raises:
        DataError: When raw files are missing or too many can't be read.
    """
    module = implementation("pipeline.sources", settings.source, "source")
    source = module.open_source(settings, Path(settings.root))
    report = PreparationReport(split_origin=source.split_origin, notes=source.notes, skipped=dict(source.skipped))
    for split in SPLITS:
        if not source.counts.get(split):
            raise DataError(f"{settings.root}: split '{split}' of source '{settings.source}' has no examples")
    ranges = [
        (split, start, min(start + settings.shard_examples, source.counts[split]))
        for split in SPLITS
        for start in range(0, source.counts[split], settings.shard_examples)
    ]
    rank, world = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    rank_ranges = ranges[rank * len(ranges) // world : (rank + 1) * len(ranges) // world]
    total = sum(source.counts.values())
    allowed = getattr(settings, "unreadable_share", 0.001) * total

    def check(unreadable: list[str]) -> None:
        if len(unreadable) > allowed:
            raise DataError(
                f"{settings.root}: {len(unreadable)} or more of {total} files can't be read, more than "
                f"unreadable_share allows; the first: {unreadable[0]}"
            )

    with _folder(folder, ranks) as temporary:
        duplicates = _Duplicates(temporary / "duplicates", rank)
        try:
            written = _write(
                source,
                settings,
                rank_ranges,
                temporary,
                duplicates,
                check,
                processes,
                f"preparing {Path(folder).name}",
                rank > 0,
            )
        finally:
            duplicates.close()
        everything: list[_Written] = [written] if ranks is None else ranks.gather(written)
        report.unreadable = [line for part in everything for line in part.unreadable]
        report.enlarged, report.dark = sum(part.enlarged for part in everything), sum(part.dark for part in everything)
        check(report.unreadable)
        parts = {key: part for some in everything for key, part in some.shards.items()}
        shards = {split: [part for (of, _), part in sorted(parts.items()) if of == split] for split in SPLITS}
        for split in SPLITS:
            if not shards[split]:
                raise DataError(f"{settings.root}: no example of split '{split}' could be read")
        filled = next(part for part in everything if part.shape)
        index = ShardIndex(
            kind=source.kind,
            shape=filled.shape,
            dtype="uint8" if filled.dtype == "uint8" else "float32",
            value_range=source.value_range,
            label_names=source.label_names,
            context=source.context,
            columns=source.columns,
            **{split: _numbered(temporary, split, shards[split], rank == 0) for split in SPLITS},
        )
        if rank == 0:
            report.duplicates, report.repeated = duplicates.counts()
            shutil.rmtree(temporary / "duplicates")
            write_index(temporary, index)
    report.counts = {split: index.count(split) for split in SPLITS}
    report.digest = index.digest
    return report


def _folder(folder: str | Path, ranks: Ranks | None) -> contextlib.AbstractContextManager[Path]:
    if ranks is None:
        return atomic_folder(folder)
    from pipeline.system.ranks import shared_folder

    return shared_folder(folder, ranks)


def _write(
    source: Any,
    settings: DatasetSettings,
    ranges: list[tuple[str, int, int]],
    folder: Path,
    duplicates: _Duplicates,
    check: Callable[[list[str]], None],
    processes: int | None,
    label: str,
    quiet: bool,
) -> _Written:
    """Writes the shards of some ranges of examples."""
    written = _Written()
    blocks = [
        (split, first, min(first + READ_EXAMPLES, stop))
        for split, start, stop in ranges
        for first in range(start, stop, READ_EXAMPLES)
    ]
    cores = max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    writer: ShardWriter | None = None
    with Progress(sum(stop - start for _, start, stop in blocks), label, "examples", quiet=quiet) as progress:
        for (split, start, stop), block in _read_all(source, blocks, processes or cores):
            number = start // settings.shard_examples
            if writer is None or (writer.split, writer.first) != (split, number):
                writer = ShardWriter(folder, split, settings.shard_examples, number)
            written.unreadable += block.unreadable
            written.enlarged += block.enlarged
            written.dark += block.dark
            check(written.unreadable)  # at once: otherwise the list would grow with the data set
            if len(block.examples):
                written.shape, written.dtype = block.examples.shape[1:], str(block.examples.dtype)
                arrays = {"examples": block.examples, "labels": block.labels, "context": block.context}
                writer.write(**{name: array for name, array in arrays.items() if array is not None})
                duplicates.add(SPLITS.index(split), block.examples if block.undisturbed is None else block.undisturbed)
            if stop % settings.shard_examples == 0 or stop == source.counts[split]:
                writer.close()
                if writer.shards:
                    written.shards[split, number] = writer.shards[0]
            progress.advance(stop - start)
    return written


def _numbered(folder: Path, split: str, shards: list[Part], renames: bool) -> tuple[Part, ...]:
    """Shards under consecutive numbers: one of which no example could be read leaves a gap."""
    names = [part_name(split, number, "tar") for number in range(len(shards))]
    if renames:
        for name, shard in zip(names, shards, strict=True):
            if (folder / shard.name).exists():  # or in the STORE, by digest
                os.rename(folder / shard.name, folder / name)
    return tuple(replace(shard, name=name) for name, shard in zip(names, shards, strict=True))


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
