"""Sources of one binary format each: IDX files, TFD's .mat, BSDS300's archive and table; whole and broken."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import pickle
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.errors import DataError, PipelineError
from pipeline.settings import Params, build, implementation
from pipeline.sources import bsds300, tfd
from pipeline.sources import mnist as mnist_source
from pipeline.sources.common.source import Block, Source
from pipeline.storage.parts import SPLITS

RANDOM = np.random.default_rng(0)


def open_row(name: str, root: Path, **values: object) -> Source:
    module = implementation("pipeline.sources", name, "datasets.row.source")
    return module.open_source(build(module.Settings, {"source": name, "root": str(root), **values}, "datasets.row"), root)


def read_all(source: Source) -> dict[str, Block]:
    return {split: source.read(split, 0, source.counts[split]) for split in SPLITS}


def check_ranges(source: Source) -> None:
    """The same bytes however the range is cut, by a copy in another process too."""
    copy = pickle.loads(pickle.dumps(source))  # as a pool of processes would get it
    for split in SPLITS:
        stop = source.counts[split]
        cuts = [0, 1, stop // 3, stop // 2, stop]
        parts = [copy.read(split, a, b).examples for a, b in reversed(list(itertools.pairwise(cuts)))][::-1]
        assert np.array_equal(source.read(split, 0, stop).examples, np.concatenate(parts))


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


# MNIST --------------------------------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    arrays = {
        "train-images-idx3-ubyte": RANDOM.integers(0, 256, (60, 28, 28)),
        "train-labels-idx1-ubyte": RANDOM.integers(0, 10, 60),
        "t10k-images-idx3-ubyte": RANDOM.integers(0, 256, (20, 28, 28)),
        "t10k-labels-idx1-ubyte": RANDOM.integers(0, 10, 20),
    }
    for name, array in arrays.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return tmp_path, arrays


COUNTS = {"train_count": 40, "valid_count": 10}


@pytest.mark.parametrize("form", ["gz", "plain", "dotted", "torchvision"])
def test_mnist_in_every_form(mnist: tuple[Path, dict[str, np.ndarray]], form: str) -> None:
    folder, arrays = mnist
    for name in arrays:
        packed = folder / f"{name}.gz"
        if form != "gz":
            plain = {
                "plain": folder / name,
                "dotted": folder / name.replace("-idx", ".idx"),
                "torchvision": folder / "MNIST/raw" / name,
            }
            plain[form].parent.mkdir(parents=True, exist_ok=True)
            plain[form].write_bytes(gzip.decompress(packed.read_bytes()))
            packed.unlink()
    source = open_row("mnist", folder, **COUNTS)
    assert source.counts == {"train": 40, "valid": 10, "test": 20}
    blocks = read_all(source)
    images, labels = arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"]
    assert np.array_equal(blocks["train"].examples[:, 0], images[:40])
    assert np.array_equal(blocks["valid"].examples[:, 0], images[50:])
    assert np.array_equal(blocks["valid"].labels, labels[50:])
    assert np.array_equal(blocks["test"].examples[:, 0], arrays["t10k-images-idx3-ubyte"])
    assert blocks["test"].labels.dtype == np.int64
    assert blocks["test"].examples.dtype == np.uint8
    check_ranges(source)


def test_fashion_mnist_by_the_same_reader(mnist: tuple[Path, dict[str, np.ndarray]]) -> None:
    assert open_row("fashion_mnist", mnist[0], **COUNTS).label_names[9] == "ankle boot"


def test_mnist_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"download train-images-idx3-ubyte\.gz.* of MNIST"):
        open_row("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="of FashionMNIST"):
        open_row("fashion_mnist", tmp_path)


def test_mnist_too_short_for_the_settings(mnist: tuple[Path, dict[str, np.ndarray]]) -> None:
    with pytest.raises(DataError, match="holds 60 images, fewer than train_count 50000"):
        open_row("mnist", mnist[0])


IMAGES = idx_bytes(np.zeros((60, 28, 28)))
BAD_IDX: dict[str, bytes] = {
    "empty": b"",
    "not gzip": b"hello",
    "html": b"<html>404</html>" * 100,
    "header only": gzip.compress(IMAGES[:16]),
    "half a header": gzip.compress(IMAGES[:9]),
    "wrong magic": gzip.compress(b"\x00\x00\x08\x01" + IMAGES[4:]),
    "floats": gzip.compress(b"\x00\x00\x0d\x03" + IMAGES[4:]),
    "cut before compression": gzip.compress(IMAGES[:-1]),
    "a byte too many": gzip.compress(IMAGES + b"x"),
    "cut after compression": gzip.compress(IMAGES)[:-9],
    "wrong checksum": gzip.compress(IMAGES)[:-8] + b"\0" * 8,
    "flipped bits": gzip.compress(IMAGES)[:20] + b"\xff\xff" + gzip.compress(IMAGES)[22:],
    "32x32": gzip.compress(idx_bytes(np.zeros((60, 32, 32)))),
    "huge": gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 28, 28) + b"\0" * 784),
    "large": gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 10**6, 28, 28) + b"\0" * 784),
    "bomb": gzip.compress(IMAGES + b"\0" * 50_000_000),
    "no images": gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 0, 28, 28)),
    "59 images": gzip.compress(idx_bytes(np.zeros((59, 28, 28)))),
}


@pytest.mark.parametrize("kind", BAD_IDX)
def test_broken_idx_is_refused_by_name(mnist: tuple[Path, dict[str, np.ndarray]], kind: str) -> None:
    (mnist[0] / "train-images-idx3-ubyte.gz").write_bytes(BAD_IDX[kind])
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        open_row("mnist", mnist[0], **COUNTS)


def test_label_out_of_range(mnist: tuple[Path, dict[str, np.ndarray]]) -> None:
    (mnist[0] / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.full(20, 10))))
    with pytest.raises(DataError, match=r"t10k-labels.* holds label 10"):
        open_row("mnist", mnist[0], **COUNTS)


def test_mnist_settings() -> None:
    row = {"source": "mnist", "root": "x", "train_count": 55_000, "valid_count": 10_000}
    with pytest.raises(PipelineError, match=r"datasets\.m\.valid_count"):
        Params({"datasets": {"m": row}}).dataset("m")
    with pytest.raises(PipelineError, match=r"did you mean 'mnist'\? known: .*fashion_mnist.*mnist"):
        Params({"datasets": {"m": row | {"source": "mnits"}}}).dataset("m")


def test_download_goes_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(root: str, download: bool) -> None:
        calls.append((root, download))
        if len(calls) > 1:
            raise RuntimeError("no network")

    # In the place of torchvision, which takes seconds to import.
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(MNIST=fetch)))
    settings = mnist_source.Settings(source="mnist", root=str(tmp_path))
    mnist_source.download(settings, tmp_path)
    assert calls == [(str(tmp_path), True)]
    with pytest.raises(DataError, match="MNIST can't be downloaded"):
        mnist_source.download(settings, tmp_path)


# TFD ----------------------------------------------------------------------------------------------------------------


def faces() -> dict[str, np.ndarray]:
    folds = np.zeros((30, 5), np.uint8)
    for fold in range(5):
        folds[10:, fold] = np.roll(np.repeat([1, 2, 3], [10, 4, 6]), fold)
    return {
        "images": RANDOM.integers(0, 256, (30, 48, 48)).astype(np.uint8),
        "folds": folds,
        "labs_ex": -np.ones((30, 1), np.int16),
    }


def write_mat(folder: Path, **arrays: object) -> Path:
    from scipy.io import savemat

    savemat(folder / "TFD_48x48.mat", arrays, do_compression=True)
    return folder / "TFD_48x48.mat"


def test_tfd_by_fold(tmp_path: Path) -> None:
    arrays = faces()
    write_mat(tmp_path, **arrays)
    for fold in range(5):
        source = open_row("tfd", tmp_path, fold=fold)
        assert source.counts == {"train": 10, "valid": 4, "test": 6}
        blocks = read_all(source)
        assert np.array_equal(blocks["train"].examples[:, 0], arrays["images"][:10])
        assert np.array_equal(blocks["test"].examples[:, 0], arrays["images"][arrays["folds"][:, fold] == 3])
        check_ranges(source)
    source = open_row("tfd", tmp_path / "TFD_48x48.mat", train_on="all")
    assert source.counts == {"train": 20, "valid": 4, "test": 6}


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.95])
def test_truncated_mat(tmp_path: Path, keep: float) -> None:
    cut(write_mat(tmp_path, **faces()), keep)
    with pytest.raises(DataError, match=r"TFD_48x48\.mat"):
        open_row("tfd", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros((30, 48, 47), np.uint8)},
        {"images": np.zeros((48, 48, 30), np.uint8)},
        {"images": np.zeros((30, 48 * 48), np.uint8)},
        {"images": np.zeros((30, 48, 48), np.float64)},
        {"images": "text"},
        {"folds": np.zeros((30, 4), np.uint8)},
        {"folds": np.zeros((29, 5), np.uint8)},
        {"folds": np.full((30, 5), 7, np.uint8)},
        {"folds": np.full((30, 5), np.nan)},
        {"folds": np.zeros((30, 5), np.uint8)},  # nothing to validate or test
        {"folds": {"a": 1}},
    ],
)
def test_wrong_mat_is_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    write_mat(tmp_path, **(faces() | change))
    with pytest.raises(DataError, match=r"TFD_48x48\.mat"):
        open_row("tfd", tmp_path)


def test_other_mat_files(tmp_path: Path) -> None:
    write_mat(tmp_path, other=np.zeros(3))
    with pytest.raises(DataError, match="expected 'images'"):
        open_row("tfd", tmp_path)
    (tmp_path / "TFD_48x48.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\0" * 400)
    with pytest.raises(DataError, match=r"7\.3"):
        open_row("tfd", tmp_path)
    with pytest.raises(DataError, match="ask the University of Toronto"):
        open_row("tfd", tmp_path / "nowhere")


def test_fuzzed_mat_never_raises_anything_else(tmp_path: Path) -> None:
    path = write_mat(tmp_path, **faces())
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(0, 400, 3):
            data[place] = random.integers(256)
        path.write_bytes(data)
        tfd._read_mat.cache_clear()
        try:
            read_all(open_row("tfd", tmp_path))
        except DataError as error:
            assert "TFD_48x48.mat" in str(error)  # noqa: PT017


# BSDS300 ------------------------------------------------------------------------------------------------------------


def jpeg(height: int = 30, width: int = 40, seed: int = 0) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def bsds_files(train: int = 6, test: int = 3) -> dict[str, bytes]:
    files = {f"BSDS300/images/train/{i}.jpg": jpeg(20 + i, 30, i) for i in range(train)}
    files |= {f"BSDS300/images/test/{i}.jpg": jpeg(30, 20 + i, 100 + i) for i in range(test)}
    return files | {"BSDS300/iids_train.txt": b"1\n2\n"}


def write_tgz(folder: Path, files: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None) -> Path:
    path = folder / "BSDS300-images.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra or []:
            tar.addfile(member)
    return path


SMALL = {"train_count": 1000, "valid_count": 300, "test_count": 600, "valid_images": 2}


def test_bsds_patches_lie_in_their_images(tmp_path: Path) -> None:
    from PIL import Image

    from pipeline.sources.common.patches import restore, to_grey

    files = bsds_files()
    write_tgz(tmp_path, files)
    source = open_row("bsds300", tmp_path, **SMALL)
    assert source.counts == {"train": 1000, "valid": 300, "test": 600}
    assert sorted(source.names["train"] + source.names["valid"]) == sorted(n for n in files if "/train/" in n)
    assert len(source.names["valid"]) == 2
    blocks = read_all(source)
    for split in SPLITS:
        block, names = blocks[split], source.names[split]
        assert block.examples.shape == (source.counts[split], 63)
        assert block.examples.dtype == np.float32
        assert np.array_equal(block.labels, np.arange(source.counts[split]) % len(names))
        for i in (0, 1, 257):
            grey = to_grey(np.asarray(Image.open(io.BytesIO(files[names[block.labels[i]]])).convert("RGB")))
            windows = np.lib.stride_tricks.sliding_window_view(grey / 256, (8, 8)).reshape(-1, 8, 8)
            windows = windows - windows.mean((1, 2), keepdims=True)
            assert np.abs(windows - restore(block.examples[i : i + 1])).max((1, 2)).min() < 1.01 / 256
    assert len(np.unique(blocks["train"].examples, axis=0)) == 1000
    check_ranges(source)


def test_bsds_archive_and_folder_agree(tmp_path: Path) -> None:
    path = write_tgz(tmp_path, bsds_files())
    packed = open_row("bsds300", path, **SMALL).read("test", 0, 50).examples
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    for root in (tmp_path / "out", tmp_path / "out" / "BSDS300"):
        assert np.array_equal(open_row("bsds300", root, **SMALL).read("test", 0, 50).examples, packed)
    other = open_row("bsds300", path, **SMALL, split_seed=1).read("test", 0, 50).examples
    assert not np.array_equal(other, packed)


def test_bsds_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"download BSDS300-images\.tgz"):
        open_row("bsds300", tmp_path)
    with pytest.raises(DataError, match=r"BSDS300\.hdf5 is missing; download data\.tar\.gz"):
        open_row("bsds300", tmp_path, split="maf")


def test_bsds_image_smaller_than_a_patch(tmp_path: Path) -> None:
    write_tgz(tmp_path, bsds_files() | {"BSDS300/images/test/7.jpg": jpeg(7, 20)})
    with pytest.raises(DataError, match=r"images/test/7\.jpg: 7x20"):
        read_all(open_row("bsds300", tmp_path, **SMALL))


@pytest.mark.parametrize("data", [b"", b"text", jpeg()[:300], jpeg()[:20], b"\xff\xd8" * 50])
def test_bsds_corrupt_image(tmp_path: Path, data: bytes) -> None:
    write_tgz(tmp_path, bsds_files() | {"BSDS300/images/test/9.jpg": data})
    with pytest.raises(DataError, match=r"images/test/9\.jpg can't be read"):
        read_all(open_row("bsds300", tmp_path, **SMALL))


@pytest.mark.parametrize("keep", [0, 0.01, 0.3, 0.7, 0.999])
def test_bsds_truncated_archive(tmp_path: Path, keep: float) -> None:
    cut(write_tgz(tmp_path, bsds_files()), keep)
    with pytest.raises(DataError, match=r"BSDS300-images\.tgz isn't a whole \.tgz"):
        open_row("bsds300", tmp_path, **SMALL)


def test_bsds_flipped_bits(tmp_path: Path) -> None:
    path = write_tgz(tmp_path, bsds_files())
    data = bytearray(path.read_bytes())
    for place in np.linspace(60, len(data) - 9, 25).astype(int):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        bsds300._images.cache_clear()
        with pytest.raises(DataError, match=r"BSDS300-images\.tgz"):
            open_row("bsds300", tmp_path, **SMALL)


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "BSDS300/../../evil.jpg", "..\\evil.jpg", "C:/evil.jpg"])
def test_bsds_path_that_climbs_out(tmp_path: Path, name: str) -> None:
    write_tgz(tmp_path, bsds_files() | {name: jpeg()})
    with pytest.raises(DataError, match="leads out of the archive"):
        open_row("bsds300", tmp_path, **SMALL)


def test_bsds_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    link = tarfile.TarInfo("BSDS300/images/test/link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.jpg")
    write_tgz(tmp_path, bsds_files(), [link])
    assert "BSDS300/images/test/link.jpg" not in open_row("bsds300", tmp_path, **SMALL).names["test"]


@pytest.mark.parametrize(("train", "test"), [(2, 3), (0, 3), (6, 0)])
def test_bsds_with_too_few_images(tmp_path: Path, train: int, test: int) -> None:
    write_tgz(tmp_path, bsds_files(train, test))
    with pytest.raises(DataError, match="images in images/train"):
        open_row("bsds300", tmp_path, **SMALL)


def rows(count: int, columns: int = 63) -> np.ndarray:
    return RANDOM.standard_normal((count, columns)).astype(np.float32)


def write_hdf5(folder: Path, change: Callable[[object], None] | None = None) -> dict[str, np.ndarray]:
    import h5py

    arrays = {"train": rows(50), "validation": rows(20), "test": rows(30)}
    with h5py.File(folder / "BSDS300.hdf5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
        if change is not None:
            change(file)
    return arrays


def test_the_maf_split(tmp_path: Path) -> None:
    arrays = write_hdf5(tmp_path)
    for root in (tmp_path, tmp_path / "BSDS300.hdf5"):
        source = open_row("bsds300", root, split="maf")
        assert source.counts == {"train": 50, "valid": 20, "test": 30}
        assert np.array_equal(read_all(source)["valid"].examples, arrays["validation"])
        check_ranges(source)


def _replace(name: str, array: object) -> Callable[[object], None]:
    def change(file: object) -> None:
        del file[name]
        if array is not None:
            file[name] = array

    return change


def _declare_rows(file: object) -> None:
    del file["test"]
    file.create_dataset("test", (10**12, 63), "f4", chunks=(1000, 63))


def _external_link(file: object) -> None:
    import h5py

    del file["test"]
    file["test"] = h5py.ExternalLink("other.hdf5", "test")


def _soft_link(file: object) -> None:
    import h5py

    del file["test"]
    file["test"] = h5py.SoftLink("/nothing")


def _external_storage(file: object) -> None:
    del file["test"]
    file.create_dataset("test", (3, 63), "f4", external=[("/etc/passwd", 0, 63 * 4 * 3)])


BAD_TABLES = {
    "no test": _replace("test", None),
    "no validation": _replace("validation", None),
    "62 columns": _replace("test", rows(30, 62)),
    "64 columns": _replace("train", rows(30, 64)),
    "one dimension": _replace("train", np.zeros(63, np.float32)),
    "no rows": _replace("train", rows(0)),
    "integers": _replace("train", np.zeros((30, 63), np.int32)),
    "text": _replace("train", "text"),
    "nan": _replace("test", np.where(np.arange(63) == 5, np.nan, rows(30))),
    "infinity": _replace("test", np.where(np.arange(63) == 5, np.inf, rows(30))),
    "huge": _declare_rows,
    "external link": _external_link,
    "soft link": _soft_link,
    "external storage": _external_storage,
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_wrong_hdf5_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    write_hdf5(tmp_path, BAD_TABLES[kind])
    with pytest.raises(DataError, match=r"BSDS300\.hdf5"):
        read_all(open_row("bsds300", tmp_path, split="maf"))


@pytest.mark.parametrize("keep", [0, 0.1, 0.6, 0.99])
def test_truncated_hdf5(tmp_path: Path, keep: float) -> None:
    write_hdf5(tmp_path)
    cut(tmp_path / "BSDS300.hdf5", keep)
    with pytest.raises(DataError, match=r"BSDS300\.hdf5"):
        read_all(open_row("bsds300", tmp_path, split="maf"))


def test_fuzzed_hdf5_never_raises_anything_else(tmp_path: Path) -> None:
    write_hdf5(tmp_path)
    path = tmp_path / "BSDS300.hdf5"
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(whole)
        for place in random.integers(0, 3000, 3):
            data[place] = random.integers(256)
        path.unlink()
        path.write_bytes(data)
        bsds300._open_tables.cache_clear()
        try:
            read_all(open_row("bsds300", tmp_path, split="maf"))
        except DataError as error:
            assert "BSDS300.hdf5" in str(error)  # noqa: PT017


def test_a_table_in_one_chunk_is_inflated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_hdf5(tmp_path)
    large = np.tile(rows(100), (500, 1))

    def in_one_chunk(file: object) -> None:
        del file["train"]
        file.create_dataset("train", data=large, chunks=large.shape, compression="gzip")

    (tmp_path / "one").mkdir()
    write_hdf5(tmp_path / "one", in_one_chunk)
    source = open_row("bsds300", tmp_path / "one", split="maf")
    assert np.array_equal(source.read("train", 10, 8000).examples, large[10:8000])
    tables = source._tables()
    assert tables["train"].file.id.get_access_plist().get_cache()[2] == large.nbytes
    assert source._tables()["train"] is tables["train"]  # the cache is that of an open table
    assert open_row("bsds300", tmp_path, split="maf").counts["train"] == len(arrays["train"])
    monkeypatch.setattr(bsds300, "MAX_CHUNK_BYTES", 2**20)
    bsds300._open_tables.cache_clear()
    with pytest.raises(DataError, match=r"'train' has chunks of more than 1 MiB; write it again with smaller ones"):
        open_row("bsds300", tmp_path / "one", split="maf")


def test_a_group_for_a_table(tmp_path: Path) -> None:
    write_hdf5(tmp_path, lambda file: (file.__delitem__("test"), file.create_group("test")))
    with pytest.raises(DataError, match="no dataset 'test'"):
        open_row("bsds300", tmp_path, split="maf")


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    write_hdf5(tmp_path)
    source = open_row("bsds300", tmp_path, split="maf")
    os.unlink(tmp_path / "BSDS300.hdf5")
    with pytest.raises(DataError, match=r"BSDS300\.hdf5"):
        source.read("train", 0, 5)


def test_settings_shapes() -> None:
    assert bsds300.Settings(source="bsds300", root="x").shape == (63,)
    assert tfd.Settings(source="tfd", root="x").shape == (1, 48, 48)
    assert mnist_source.Settings(source="mnist", root="x").shape == (1, 28, 28)
