"""Users' vectors as they come: tables with names, labels, groups, an index, integers, timestamps, missing values."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.preparation import prepare_shards
from pipeline.settings import build
from pipeline.sources import vectors
from pipeline.storage.columns import from_codes
from pipeline.storage.parts import SPLITS

RANDOM = np.random.default_rng(0)
TABLE = RANDOM.standard_normal((200, 3))


def source_settings(path: Path, **values: object) -> vectors.Settings:
    return build(vectors.Settings, {"source": "vectors", "root": str(path), **values}, "datasets.mine")


def open_row(path: Path, **values: object) -> vectors.Vectors:
    return vectors.open_source(source_settings(path, **values), path)


def read_all(source: vectors.Vectors) -> np.ndarray:
    """All rows, in some order, with their labels, if any, as the last column."""
    blocks = [source.read(split, 0, source.counts[split]) for split in SPLITS]
    columns = [np.concatenate([block.examples for block in blocks])]
    if blocks[0].labels is not None:
        columns.append(np.concatenate([block.labels for block in blocks])[:, None])
    return np.concatenate(columns, axis=1)


def same_rows(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a[np.lexsort(a.T)], b.astype(np.float32)[np.lexsort(b.astype(np.float32).T)])


def text(rows: list[list[object]], delimiter: str = ",") -> str:
    return "\n".join(delimiter.join(map(str, row)) for row in rows) + "\n"


NAMED = [["a", "b", "c"], *TABLE.tolist()]


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.csv.gz", "A.TSV.GZ", "semicolons.csv", "bom.csv", "bare.csv", "crlf.csv"]
)
def test_text_in_every_form(tmp_path: Path, name: str) -> None:
    delimiter = "\t" if "tsv" in name.lower() else ";" if name.startswith("semicolons") else ","
    data = text(NAMED[1:] if name.startswith("bare") else NAMED, delimiter).encode()
    data = (
        b"\xef\xbb\xbf" + data if name.startswith("bom") else data.replace(b"\n", b"\r\n") if name.startswith("crlf") else data
    )
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    source = open_row(tmp_path / name)
    assert same_rows(read_all(source), TABLE)
    assert source.counts == {"train": 160, "valid": 20, "test": 20}
    assert source.notes == ("float64 became float32",)
    first = "0" if name.startswith("bare") else "a"
    assert same_rows(read_all(open_row(tmp_path / name, columns=["2" if first == "0" else "c", first])), TABLE[:, [2, 0]])


def write_parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=64)
    return path


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_labels_keep_their_names(tmp_path: Path, form: str) -> None:
    kinds = ["cat" if x > 0 else "dog, black" for x in TABLE[:, 0]]
    if form == "csv":
        path = tmp_path / "a.csv"
        path.write_text(
            text([["a", "kind", "b"], *([a, f'"{kind}"', b] for (a, b, _), kind in zip(TABLE, kinds, strict=True))])
        )
    else:
        path = write_parquet(tmp_path / "a.parquet", a=TABLE[:, 0], kind=kinds, b=TABLE[:, 1])
    source = open_row(path, labels="kind")
    assert source.label_names == ("cat", "dog, black")
    assert same_rows(read_all(source), np.column_stack([TABLE[:, :2], TABLE[:, 0] <= 0]))
    with pytest.raises(DataError, match="no column 'sort'"):
        open_row(path, labels="sort")
    assert same_rows(read_all(open_row(path, columns=["b"])), TABLE[:, 1:2])
    with pytest.raises(DataError, match="column 'kind'"):
        open_row(path, labels="kind", columns=["kind"])
    with pytest.raises(DataError, match=r"column 'kind'.* by 'columns', or (it|this one) as 'labels'"):
        open_row(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["a", "b"], [1.5, 2], [3, "x\x1b[31m"]], r"line 3, column 'b': 'x\\x1b\[31m' is no number"),
        ([["a", "b"], [1, 2], [3]], "line 3 has 1 cells, and the first line 2"),
        ([["a", "a"], [1, 2]], "two columns of the same name"),
        (
            [["a", "b"], *[[1, 2]] * 20, [3, "NA"], ["", "null"]],
            "row 20, column 'b' is missing or not finite .* 2 other values",
        ),
        ([["a", "b"]], "has no rows"),
        ([[""]], "is empty"),
    ],
)
def test_wrong_text_is_refused_by_line_and_column(tmp_path: Path, rows: list[list[object]], message: str) -> None:
    (tmp_path / "a.csv").write_text(text(rows))
    with pytest.raises(DataError, match=message):
        open_row(tmp_path / "a.csv")


def test_an_index_is_no_dimension(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text([["", "a", "b", "c"], *([i, *row] for i, row in enumerate(TABLE.tolist()))]))
    source = open_row(tmp_path / "a.csv")
    assert same_rows(read_all(source), TABLE)
    assert "no dimension, since they are an index: column 0" in source.notes
    columns = {"a": TABLE[:, 0], "b": TABLE[:, 1], "when": np.arange(200.0), "__index_level_0__": np.arange(200)}
    table = pa.table(columns).replace_schema_metadata({b"pandas": b'{"index_columns": ["when", {"kind": "range"}]}'})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_row(tmp_path / "a.parquet")
    assert same_rows(read_all(source), TABLE[:, :2])
    assert "no dimension, since they are an index: when, __index_level_0__" in source.notes


def test_a_partitioned_folder(tmp_path: Path) -> None:
    for year, rows in (("2023", slice(0, 50)), ("2024", slice(50, 200))):
        (tmp_path / "t" / f"year={year}").mkdir(parents=True)
        write_parquet(tmp_path / "t" / f"year={year}" / "part-0.parquet", a=TABLE[rows, 0], b=TABLE[rows, 1])
    assert same_rows(read_all(open_row(tmp_path / "t")), TABLE[:, :2])
    write_parquet(tmp_path / "t" / "other.parquet", a=TABLE[:, 0])
    with pytest.raises(DataError, match=r"part-0\.parquet has other columns than .*other\.parquet"):
        open_row(tmp_path / "t")


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint16", "int64", "bool"])
@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet"])
def test_other_types_are_converted_and_said(tmp_path: Path, dtype: str, form: str) -> None:
    array = (TABLE * 40 > 0 if dtype == "bool" else np.abs(TABLE) * 40).astype(dtype)
    path = tmp_path / f"a.{form}"
    if form == "npy":
        np.save(path, array)
    elif form == "parquet":
        write_parquet(path, **{f"z{i}": array[:, i] for i in range(3)})
    else:
        from safetensors.numpy import save_file

        save_file({"z": array}, path)
    source = open_row(path)
    assert source.notes[0] == f"{dtype} became float32"
    assert same_rows(read_all(source), array)


def test_columns_that_repeat_or_are_constant_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", a=TABLE[:, 0], sex=np.arange(200) % 2, one=np.ones(200), b=TABLE[:, 1])
    source = open_row(path)
    assert source.dim == 4
    assert source.notes[1] == "columns that hold one value (drop_constant: true leaves them out): 'one'"
    assert source.notes[2].startswith("columns whose values repeat make likelihoods infinite")
    assert source.notes[2].endswith(": 'sex' (2 of 200 values differ)")
    dropped = open_row(path, drop_constant=True)
    assert (dropped.dim, len(dropped.columns)) == (3, 4)
    assert "columns that hold one value were left out and return in samples: 'one'" in dropped.notes
    with pytest.raises(DataError, match="every column holds one value"):
        open_row(path, drop_constant=True, columns=["one"])


@pytest.mark.parametrize("column", [1.7e9 + np.arange(600), 1e6 + 1e-3 * RANDOM.standard_normal(600)])
def test_values_that_float32_cant_tell_apart(tmp_path: Path, column: np.ndarray) -> None:
    other = RANDOM.standard_normal(600)
    np.save(tmp_path / "a.npy", np.column_stack([column, other]))
    source = open_row(tmp_path / "a.npy")
    assert "columns that float32 would blur are standardised before: '0'" in source.notes
    read = read_all(source)
    assert len(np.unique(read[:, 0])) == 600
    assert same_rows(read[:, 1:], other[:, None])  # as it is
    back = from_codes(source.columns, read)
    assert np.allclose(np.sort(back[:, 0]), np.sort(column), rtol=0, atol=1e-6 * column.std())


def test_columns_of_few_values_are_dequantised(tmp_path: Path) -> None:
    grades, sizes = RANDOM.integers(1, 7, 600), np.array([0.1 + 0.2, 0.3, 0.5, 2.0])[RANDOM.integers(0, 4, 600)]
    often = np.where(np.arange(600) % 3 == 0, 0.0, RANDOM.standard_normal(600))
    path = write_parquet(tmp_path / "a.parquet", a=RANDOM.standard_normal(600), grade=grades, size=sizes, often=often)
    source = open_row(path, discrete="dequantise")
    assert source.columns[1].levels == (1, 2, 3, 4, 5, 6)
    assert source.columns[2].step == pytest.approx(0.2)  # rounding makes no level of its own
    assert any("were dequantised: 'grade' (6 of 600 values differ), 'size'" in note for note in source.notes)
    assert any("one value is frequent make likelihoods infinite: 'often' (0 in 200 of 600 rows)" in n for n in source.notes)
    block = source.read("train", 0, source.counts["train"])
    noise = block.examples[:, 1] - block.undisturbed[:, 1]
    assert -0.5 <= noise.min() < -0.45 < 0.45 < noise.max() < 0.5
    assert abs(noise.mean()) < 0.05
    back = from_codes(source.columns, block.examples)
    assert np.array_equal(back[:, 1], block.undisturbed[:, 1])
    assert np.allclose(back[:, 2], block.undisturbed[:, 2])
    # The noise belongs to a row of the file, not to the order of reading.
    assert np.array_equal(source.read("train", 100, 130).examples, block.examples[100:130])
    assert not np.array_equal(open_row(path, discrete="dequantise", split_seed=1)._noise(0, 9), source._noise(0, 9))
    report = prepare_shards(
        source_settings(path, discrete="dequantise", columns=["grade", "size"]), tmp_path / "s", processes=1
    )
    assert report.repeated["train"] == source.counts["train"] - 24  # repeated rows are found in spite of the noise
    # Zeros of a ReLU, rare values and halves of floats.
    rare = np.array([1.0] + [0.0] * 599)
    relu, half = np.maximum(RANDOM.standard_normal(600) - 1, 0), RANDOM.standard_normal(600).astype(np.float16)
    path = write_parquet(tmp_path / "b.parquet", relu=relu, rare=rare)
    assert [len(column.levels) for column in open_row(path, discrete="dequantise").columns] == [0, 2]
    np.save(tmp_path / "half.npy", np.tile(half, 4)[:, None])
    assert open_row(tmp_path / "half.npy", discrete="dequantise").columns[0].plain
    path = tmp_path / "a.parquet"
    with pytest.raises(DataError, match=r"values repeat: 'grade' .*, 'size' .*, 'often' .* set discrete: dequantise"):
        open_row(path, discrete="refuse")
    assert open_row(path, discrete="refuse", columns=["a"]).dim == 1


def test_groups_stay_together(tmp_path: Path) -> None:
    patients = RANDOM.integers(0, 20, 200)
    path = write_parquet(tmp_path / "a.parquet", a=TABLE[:, 0], b=TABLE[:, 1], patient=[f"p{i}" for i in patients])
    source = open_row(path, groups="patient", valid_share=0.2, test_share=0.2)
    found = {split: set(source.split.groups[source.split.locate(split, 0, source.counts[split])]) for split in SPLITS}
    assert sum(len(groups) for groups in found.values()) == len(set(patients))
    assert sum(source.counts.values()) == 200
    assert all(20 <= source.counts[split] <= 60 for split in ("valid", "test"))
    assert source.dim == 2
    parts = [source.read("train", start, start + 7).examples for start in range(0, source.counts["train"] - 6, 7)]
    assert np.array_equal(np.concatenate(parts), source.read("train", 0, 7 * len(parts)).examples)
    other = open_row(path, groups="patient", valid_share=0.2, test_share=0.2, split_seed=1)
    assert not np.array_equal(other.split.rows["test"], source.split.rows["test"])
    write_parquet(tmp_path / "b.parquet", a=TABLE[:, 0], patient=["x", "y"] * 100)
    with pytest.raises(DataError, match="2 groups are too few"):
        open_row(tmp_path / "b.parquet", groups="patient")
