"""Shards: the same bytes for the same examples, a round trip, counts, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.storage.parts import spread, write_index
from pipeline.storage.shards import ShardIndex, ShardReader, ShardWriter, scale_pixels
from pipeline.system import files
from pipeline.system.files import atomic_file, atomic_folder, read_json, sha256_file


def write(folder: Path, images: np.ndarray, labels: np.ndarray | None, cuts: list[int], shard_examples: int) -> ShardIndex:
    folder.mkdir(parents=True)
    with ShardWriter(folder, "samples", shard_examples) as writer:
        for start, stop in zip([0, *cuts], [*cuts, len(images)], strict=True):
            arrays = {"examples": images[start:stop]} | ({} if labels is None else {"labels": labels[start:stop]})
            writer.write(**arrays)
    index = ShardIndex(
        kind="images", shape=images.shape[1:], dtype="uint8", value_range=(0.0, 1.0), samples=tuple(writer.shards)
    )
    write_index(folder, index)
    return index


def digits(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8), generator.integers(0, 10, count)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_same_bytes_however_the_pieces_come(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 700))
    shard_examples = data.draw(st.sampled_from([1, 100, 256, 300, 512, 1000]))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    images, labels = digits(count)
    folder = tmp_path_factory.mktemp("shards")
    whole = write(folder / "whole", images, labels, [], shard_examples)
    pieces = write(folder / "pieces", images, labels, cuts, shard_examples)
    assert whole == pieces
    for shard in whole.samples:
        assert (folder / "whole" / shard.name).read_bytes() == (folder / "pieces" / shard.name).read_bytes()
    reader = ShardReader(folder / "pieces")
    read = [reader.load("samples", i) for i in range(len(whole.samples))]
    assert np.array_equal(np.concatenate([r["examples"] for r in read]), images)
    assert np.array_equal(np.concatenate([r["labels"] for r in read]), labels)
    assert reader.counts("samples") == [min(shard_examples, count - i) for i in range(0, count, shard_examples)]
    assert reader.index == whole


def test_blocks_have_256_examples(tmp_path: Path) -> None:
    images, _ = digits(700)
    write(tmp_path / "a", images, None, [13], 600)
    assert [len(b["examples"]) for b in ShardReader(tmp_path / "a").blocks("samples")] == [256, 256, 88, 100]


def test_webdataset_itself_reads_them(tmp_path: Path) -> None:
    images, labels = digits(400)
    index = write(tmp_path / "a", images, labels, [], 300)
    urls = [str(tmp_path / "a" / shard.name) for shard in index.samples]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert np.array_equal(np.concatenate([s["examples.npy"] for s in samples]), images)
    assert np.array_equal(np.concatenate([s["labels.npy"] for s in samples]), labels)


def test_vectors_and_codes(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    with ShardWriter(tmp_path, "samples", 4) as writer:
        writer.write(examples=vectors, codes=vectors[:, :2])
    write_index(tmp_path, ShardIndex(kind="vectors", shape=(3,), dtype="float32", samples=tuple(writer.shards)))
    reader = ShardReader(tmp_path)
    assert reader.index.count("samples") == 10
    assert np.array_equal(np.concatenate([b["codes"] for b in reader.blocks("samples")]), vectors[:, :2])


def test_digest_tells_contents_apart(tmp_path: Path) -> None:
    a = write(tmp_path / "a", *digits(50, 0), [], 100)
    b = write(tmp_path / "b", *digits(50, 1), [], 100)
    assert a.digest != b.digest
    assert a.digest == ShardReader(tmp_path / "a").index.digest


def test_no_label_in_some_block_is_refused(tmp_path: Path) -> None:
    images, labels = digits(512)
    with ShardWriter(tmp_path, "samples") as writer:
        writer.write(examples=images[:256], labels=labels[:256])
        writer.write(examples=images[256:])
    write_index(
        tmp_path, ShardIndex(kind="images", shape=(1, 4, 4), dtype="uint8", value_range=(0, 1), samples=tuple(writer.shards))
    )
    with pytest.raises(DataError, match="doesn't hold the 512 examples"):
        ShardReader(tmp_path).load("samples", 0)


def test_pixels_fill_their_range() -> None:
    pixels = np.arange(256, dtype=np.uint8)
    assert np.allclose(scale_pixels(pixels, (-1.0, 1.0)), np.linspace(-1, 1, 256), atol=1e-6)
    assert scale_pixels(pixels, (0.0, 1.0)).dtype == np.float32
    for bounds in ((-1.0, 1.0), (0.0, 1.0)):
        assert np.array_equal(scale_pixels(torch.from_numpy(pixels), bounds).numpy(), scale_pixels(pixels, bounds))
    assert scale_pixels(pixels, (0.0, 1.0)).max() <= 1


# Files whole or not at all --------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_stood_before(tmp_path: Path) -> None:
    target, folder = tmp_path / "a.txt", tmp_path / "b"
    target.write_text("old")
    folder.mkdir()
    (folder / "old").write_text("old")
    with contextlib.suppress(KeyError), atomic_file(target) as temporary:
        temporary.write_text("new")
        raise KeyError
    with contextlib.suppress(KeyError), atomic_folder(folder) as temporary:
        (temporary / "new").write_text("new")
        raise KeyError
    assert target.read_text() == "old"
    assert [p.name for p in folder.iterdir()] == ["old"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / name).write_text(name)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    here = files._machine()
    names = (f"a.{here}-{child}", f"a.{here}-{os.getppid()}", f"ab.{here}-{child}", f"a.00000000-{child}", "a.00000000-1")
    dead, living, other, elsewhere, abandoned = (tmp_path / f".{name}.partial" for name in names)
    for left in (dead, living, other, elsewhere, abandoned):
        left.mkdir()
    os.utime(abandoned, (0, 0))
    with atomic_folder(tmp_path / "a"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"a", living.name, other.name, elsewhere.name}


def test_a_pipe_is_no_index(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(DataError, match="missing"):
        read_json(tmp_path / "index.json")


def test_sha256_of_a_stream(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_examples_to_score_are_spread_over_the_split() -> None:
    assert spread([10] * 10, 100) == list(range(10))
    assert spread([10] * 10, 99) == list(range(10))
    assert spread([10] * 10, 50) == [0, 2, 4, 6, 8]
    assert spread([10] * 10, 21) == [0, 3, 6]
    assert spread([10] * 10, 1) == [0]
    assert spread([], 1) == []
