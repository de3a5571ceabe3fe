"""Raw files -> shards: counts, messages, and the pool of reading processes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_sources_images import plain, write_folder

from pipeline.errors import DataError, PipelineError
from pipeline.preparation import PreparationReport, _read_all, prepare_shards
from pipeline.settings import build, implementation
from pipeline.sources.common.source import Block, Source
from pipeline.storage.parts import SPLITS
from pipeline.storage.shards import ShardReader
from pipeline.system.ranks import Ranks
from stages.prepare import _warnings


def prepare(
    root: Path, shards: Path, values: Mapping[str, object] | None = None, ranks: Ranks | None = None
) -> PreparationReport:
    settings = implementation("pipeline.sources", "images", "datasets.row.source").Settings
    row = {"source": "images", "root": str(root), "image_px": 8, **(values or {})}
    return prepare_shards(build(settings, row, "datasets.row"), shards, ranks=ranks)


def test_what_is_counted_and_said(tmp_path: Path) -> None:
    files = {f"train/{i}.png": plain(i) for i in range(20)} | {f"test/{i}.png": plain(100 + i) for i in range(6)}
    files |= {"train/bad\n\x1b[31m.png": b"", "train/again.png": plain(100), "train/1.heic": b"", "notes.txt": b""}
    files |= {"train/tiny.png": plain(50, 4, 4), "test/black.bmp": b"BM" + bytes(60), "test/twice.png": plain(101)}
    root = write_folder(tmp_path / "raw", files)
    report = prepare(root, tmp_path / "shards", {"unreadable_share": 0.1})
    assert report.counts == {"train": 20, "valid": 2, "test": 7}
    assert ShardReader(tmp_path / "shards").load("test", 0)["examples"][:, 0, 4, 4].min() >= 100
    lines = list(_warnings(report))
    assert lines[0] == "the split is the folders train, test; valid drawn from train by split_seed 0"
    assert lines[1] == "2 files were skipped by their endings: 1 .heic, 1 .txt"
    assert lines[2].startswith("2 files couldn't be read; reports/runs/prepare lists them; the first: ")
    assert lines[3] == "1 of 29 images were enlarged from fewer pixels"
    assert lines[4:] == ["1 examples of train test are the same", "1 examples of test repeat an earlier one"]
    assert any(r"bad \x1b[31m.png: it is damaged" in line for line in report.unreadable)
    with pytest.raises(DataError, match="more than unreadable_share allows"):
        prepare(root, tmp_path / "shards")


def _prepare_as_rank(rank: int, world: int, root: Path, shards: Path, meet: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    report = prepare(root, shards, SIZES, Ranks(rank, world, torch.device("cpu")))
    if rank == 0:
        (shards.parent / "report.json").write_text(json.dumps(vars(report), default=list))
    dist.destroy_process_group()


SIZES = {"unreadable_share": 0.5, "shard_examples": 4}


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_shards(tmp_path: Path, world: int) -> None:
    files = {f"{split}/{i:02d}.png": plain(i) for split in SPLITS for i in range(20)}
    files |= {f"train/{i:02d}.png": b"" for i in range(4, 20)}  # so two of the five shards
    root = write_folder(tmp_path / "raw", files)
    alone = prepare(root, tmp_path / "shards", SIZES)
    index = ShardReader(tmp_path / "shards").index
    assert [part.name for part in index.train] == [f"train-{i:06d}.tar" for i in range(len(index.train))]
    assert [part.count for part in index.train] == [2, 1, 1]
    folder = tmp_path / "shared"
    folder.mkdir()
    mp.start_processes(_prepare_as_rank, (world, root, folder / "shards", tmp_path / "meet"), nprocs=world, start_method="fork")
    assert small.files(folder / "shards") == small.files(tmp_path / "shards")
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(vars(alone), default=list))


class Probe(Source):
    """Says of the process that reads it: the signal that its parent's death sends, and what SIGINT and SIGTERM do."""

    kind = "vectors"
    counts = {"train": 10, "valid": 0, "test": 0}

    def read(self, split: str, start: int, stop: int) -> Block:
        if start == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        word = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(word))  # PR_GET_PDEATHSIG
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return Block(examples=np.array([[word.value, *ignored, os.getpid() != PARENT]], np.float32))


PARENT = os.getpid()


def test_processes_of_the_pool_die_with_the_stage() -> None:
    blocks = list(_read_all(Probe(), [("train", i, i + 1) for i in range(4)], processes=2))
    assert [part[1] for part, _ in blocks] == [0, 1, 2, 3]
    assert {tuple(block.examples[0]) for _, block in blocks} == {(signal.SIGKILL, 1, 1, 1)}


def test_a_process_of_the_pool_that_is_killed() -> None:
    with pytest.raises(PipelineError, match="a process that read raw files was killed, probably for memory"):
        list(_read_all(Probe(), [("train", i, i + 1) for i in range(10)], processes=2))
