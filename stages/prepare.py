"""raw files -> shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DataError, printable
from pipeline.settings import DatasetSettings, Params, implementation
from stages import workspace
from stages.run import Run, stage

if TYPE_CHECKING:
    from pipeline.preparation import PreparationReport


@stage(
    settings=Params.dataset,
    reads=lambda settings, row: [],
    writes=lambda settings, row: [workspace.shards_folder(row)],
    ranks=True,
    flags={"download": "Download the raw files first, if torchvision can. Nothing is downloaded without this option."},
)
def prepare(run: Run, settings: DatasetSettings) -> None:
    """Read raw files, split them, and write WebDataset shards.

    NAME is a row of `datasets`. The same input gives the same bytes, on any number of processes. All cores are used.
    """
    from pipeline.preparation import prepare_shards

    ranks = None
    if "RANK" in os.environ:  # PyTorch takes seconds to import, which one process alone needn't wait for
        from pipeline.system.ranks import join

        ranks = join()
    if "download" in run.flags and run.first:
        module = implementation("pipeline.sources", settings.source, f"datasets.{run.row}.source")
        if not hasattr(module, "download"):
            raise DataError(f"'{settings.source}' can't be downloaded by a program; data/raw/README.md says where to find it")
        module.download(settings, Path(settings.root))
    if ranks is not None:
        ranks.barrier()
    report = prepare_shards(settings, workspace.shards_folder(run.row), ranks=ranks)
    run.metrics({f"{split}_examples": count for split, count in report.counts.items()})
    run.metrics({f"duplicates_{pair}": count for pair, count in report.duplicates.items()})
    run.metrics({"unreadable_files": len(report.unreadable)})
    remarkable = {"enlarged_images": report.enlarged, "dark_images": report.dark, "skipped_files": sum(report.skipped.values())}
    remarkable |= {f"repeated_{split}": count for split, count in report.repeated.items()}
    run.metrics({key: count for key, count in remarkable.items() if count})
    run.read(f"raw {run.row}", report.digest, Path(settings.root), "raw")
    run.details(digest=report.digest, unreadable=report.unreadable, split=report.split_origin, skipped=report.skipped)
    for line in _warnings(report) if run.first else ():
        print(printable(f"prepare {run.row}: {line}"), flush=True)


def _warnings(report: PreparationReport) -> Iterator[str]:
    unreadable, total = report.unreadable, sum(report.counts.values())
    if report.split_origin:
        yield f"the split is {report.split_origin}"
    yield from report.notes
    if report.skipped:
        endings = [f"{count} {ending or 'without ending'}" for ending, count in report.skipped.items()]
        more = f" and {len(endings) - 10} more" if len(endings) > 10 else ""
        yield f"{sum(report.skipped.values())} files were skipped by their endings: {', '.join(endings[:10])}{more}"
    if unreadable:
        yield f"{len(unreadable)} files couldn't be read; reports/runs/prepare lists them; the first: {unreadable[0]}"
    if report.enlarged:
        yield f"{report.enlarged} of {total} images were enlarged from fewer pixels"
    if report.dark:
        yield (
            f"{report.dark} of {total} images are nearly black everywhere (no pixel above 16 of 255); for 16-bit images that "
            "hold 12 bits, set white_level: 4095"
        )
    for pair, count in report.duplicates.items():
        if count:
            yield f"{count} examples of {pair.replace('_', ' ')} are the same"
    for split, count in report.repeated.items():
        if count:
            yield f"{count} examples of {split} repeat an earlier one"
