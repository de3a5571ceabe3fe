"""The tables of the flow papers, on small files of the same layout: each step of their preparation, word by word."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import small
from ruamel.yaml import YAML

from pipeline.errors import DataError
from pipeline.settings import build
from pipeline.sources import tabular
from pipeline.storage.parts import SPLITS
from stages.tools.preset import load_preset


def write_power(folder: Path, rows: int = 200) -> np.ndarray:
    table = np.random.default_rng(0).integers(0, 50, (rows, 8)).astype(float)
    np.save(folder / "data.npy", table)
    return table


def write_gas(folder: Path, rows: int = 200) -> pd.DataFrame:
    random = np.random.default_rng(0)
    sensors = random.normal(size=(rows, 5)) * [1, 10, 100, 1, 1] + 7
    sensors[:, 2] = 3 * sensors[:, 0] + 0.01 * random.normal(size=rows)  # 0 and 2 are nearly the same, and so are 1, 3 and 4
    sensors[:, 3] = sensors[:, 1] + 0.01 * random.normal(size=rows)
    sensors[:, 4] = sensors[:, 1] - 0.01 * random.normal(size=rows)
    table = pd.DataFrame(sensors, columns=[f"R{i}" for i in range(5)])
    table["other"] = random.normal(size=rows)
    heads = pd.DataFrame({"Time": np.arange(rows), "Meth": 0.5, "Eth": np.arange(rows) % 3})
    table = pd.concat([heads, table], axis=1)
    table.to_parquet(folder / "ethylene_CO.parquet")
    return table


def write_hepmass(folder: Path, rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    random, files = np.random.default_rng(0), []
    for name, columns in (("train", 5), ("test", 6)):
        values = random.normal(size=(rows, columns)) * 3 + 1
        values[:, 1] = np.where(random.random(rows) < 0.5, -1, values[:, 1].clip(-0.9))  # its lowest value repeats
        values[:, 2] = np.where(random.random(rows) < 0.5, 9, values[:, 2].clip(None, 8))  # so does the highest of this one
        table = pd.DataFrame(values, columns=[f"f{i}" for i in range(columns)])
        table.insert(0, "# label", (random.random(rows) < 0.6).astype(float))
        table.to_csv(folder / f"1000_{name}.csv", index=False)
        files.append(table.to_numpy())
    return files[0], files[1]


def write_miniboone(folder: Path, rows: int = 200) -> np.ndarray:
    table = np.random.default_rng(0).normal(size=(rows, 8)) * [1, 2, 3, 400, 1, 1, 1, 1] + 5
    np.save(folder / "data.npy", table)
    return table


def prepared(folder: Path, table: str) -> list[np.ndarray]:
    settings = build(tabular.Settings, {"source": "tabular", "root": str(folder), "table": table}, "datasets.mine")
    source = tabular.open_source(settings, folder)
    parts = [source.read(split, 0, source.counts[split]).examples for split in SPLITS]
    assert all(part.dtype == np.float32 for part in parts)
    assert np.array_equal(source.read("train", 3, 7).examples, parts[0][3:7])
    return parts


def same(parts: list[np.ndarray], rows: np.ndarray, sizes: tuple[int, int, int]) -> None:
    assert tuple(map(len, parts)) == sizes
    np.testing.assert_allclose(np.concatenate(parts), rows, rtol=1e-5, atol=1e-5)


def test_power(tmp_path: Path) -> None:
    rows = write_power(tmp_path)
    random = np.random.RandomState(42)
    rows = rows[random.permutation(200)]  # the same draws as a shuffle of rows
    voltage, active, meters = random.rand(200, 1), random.rand(200, 1), random.rand(200, 3)
    kept = [rows[:, 0] + 0.001 * active[:, 0], rows[:, 2] + 0.01 * voltage[:, 0]]
    kept += [rows[:, 4 + i] + meters[:, i] for i in range(3)] + [rows[:, 7]]
    expected = np.stack(kept, axis=1)
    expected = (expected - expected[:180].mean(0)) / expected[:180].std(0)
    same(prepared(tmp_path, "power"), expected, (162, 18, 20))


def test_gas(tmp_path: Path) -> None:
    table = write_gas(tmp_path)
    expected = table[["R2", "R4", "other"]].to_numpy()  # of each group of like columns, the last
    expected = (expected - expected.mean(0)) / expected.std(0, ddof=1)
    same(prepared(tmp_path, "gas"), expected, (162, 18, 20))


def test_hepmass(tmp_path: Path) -> None:
    train, test = write_hepmass(tmp_path)
    train, test = (rows[rows[:, 0] == 1][:, [1, 3, 4, 5]] for rows in (train, test))  # without f1, and the last
    parts = prepared(tmp_path, "hepmass")
    valid = int(0.1 * len(train))
    assert tuple(map(len, parts)) == (len(train) - valid, valid, len(test))
    mean, std = train.mean(0), train.std(0, ddof=1)
    np.testing.assert_allclose(np.concatenate(parts[:2]), (train - mean) / std, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(parts[2], (test - mean) / std, rtol=1e-5, atol=1e-5)


def test_miniboone(tmp_path: Path) -> None:
    rows = write_miniboone(tmp_path)
    same(prepared(tmp_path, "miniboone"), (rows - rows[:180].mean(0)) / rows[:180].std(0), (162, 18, 20))


def test_words_for_what_is_missing_or_another_file(tmp_path: Path) -> None:
    for table in ("power", "gas", "hepmass", "miniboone"):
        with pytest.raises(DataError, match=r"is no folder; download data.tar.gz of Papamakarios"):
            prepared(tmp_path / "absent", table)
        with pytest.raises(DataError, match=r"(data\.npy|ethylene_CO\.parquet|1000_train\.csv) is missing; download data"):
            prepared(tmp_path, table)
    (tmp_path / "ethylene_CO.pickle").write_bytes(b"\x80")
    with pytest.raises(
        DataError, match=r"is a pickle, which may run code, so it isn't read; turn it into a table once: pandas"
    ):
        prepared(tmp_path, "gas")
    np.save(tmp_path / "data.npy", np.zeros((30, 4)))
    with pytest.raises(DataError, match="has 4 columns; expected the 8 of POWER"):
        prepared(tmp_path, "power")
    with pytest.raises(DataError, match="split 'train' isn't finite once it is prepared as miniboone"):
        prepared(tmp_path, "miniboone")
    np.save(tmp_path / "data.npy", np.array([["a"]]))
    with pytest.raises(DataError, match="expected a table of numbers"):
        prepared(tmp_path, "miniboone")
    (tmp_path / "data.npy").write_bytes(b"x")
    with pytest.raises(DataError, match="can't be read as miniboone"):
        prepared(tmp_path, "miniboone")


@pytest.mark.slow
def test_the_preset_runs_on_files_of_the_same_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_preset("tabular").chosen(quick=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKING", "off")
    writers = {"power": write_power, "gas": write_gas, "hepmass": write_hepmass, "miniboone": write_miniboone}
    for name, write in writers.items():
        (tmp_path / "data/raw/tabular" / name).mkdir(parents=True)
        write(tmp_path / "data/raw/tabular" / name, rows=400)
    (tmp_path / "data/raw/bsds300").mkdir()
    with h5py.File(tmp_path / "data/raw/bsds300/BSDS300.hdf5", "w") as file:
        for name, count in (("train", 200), ("validation", 20), ("test", 20)):
            file[name] = np.random.default_rng(count).normal(size=(count, 63)).astype(np.float32)
    tables: dict = {}
    for row in rows:
        values = row.plain() | ({"max_minutes": 0.02, "validate_steps": 0} if row.table == "densities" else {})
        tables.setdefault(row.table, {})[row.name] = values
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(tables, file)
    for name in (*writers, "bsds300"):
        for stage, row in (("prepare", ""), ("train", ""), ("extract", ""), ("fit", "-lde")):
            done = small.run(stage, f"tabular-{name}{row}")
            assert done.exit_code == 0, done.output
