"""Columns of a table as codes, and back: units, constant columns, discrete values, likelihoods."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.densities import load_density
from pipeline.detection import Scorer, load_scorer, recoded
from pipeline.errors import DataError
from pipeline.evaluation.likelihood import test_log_likelihood as score_test_codes
from pipeline.evaluation.posterior import conditional_scores
from pipeline.examples import open_examples
from pipeline.extraction import extract_codes
from pipeline.fitting import fit_density
from pipeline.generator import Generator
from pipeline.preparation import prepare_shards
from pipeline.sampling import write_samples
from pipeline.scoring import parzen_score
from pipeline.settings import ParzenSettings, SamplingSettings, build, implementation
from pipeline.storage.codes import CodeIndex, CodeReader, write_part
from pipeline.storage.columns import Column, from_codes, log_volume, to_codes
from pipeline.storage.parts import SPLITS, write_index
from pipeline.storage.shards import ShardReader
from pipeline.system.files import read_json, write_json
from pipeline.system.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
RANDOM = np.random.default_rng(0)
WHEN, DIE = 1.7e9 + 10 * RANDOM.standard_normal(600), RANDOM.integers(1, 7, 600)
TABLE = np.column_stack([WHEN, np.full(600, 7.25), DIE, RANDOM.standard_normal(600)])


def test_there_and_back() -> None:
    columns = [Column(name="when", shift=1.7e9, scale=10.0), Column(name="die", levels=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))]
    rows = TABLE[:, [0, 2]]
    codes = to_codes(columns, rows, RANDOM.random((600, 2)))
    assert codes.dtype == np.float32
    back = from_codes(columns, codes)
    assert np.array_equal(back[:, 1], rows[:, 1])
    assert np.abs(back[:, 0] - rows[:, 0]).max() < 1e-5
    plain = [Column(name="a"), Column(name="b")]
    assert from_codes(plain, codes) is codes
    assert from_codes((), codes) is codes
    assert np.array_equal(to_codes(plain, codes), codes)


def test_a_fair_die_has_the_probability_of_a_sixth() -> None:
    # Its density, dequantised, is uniform on six cells, whatever the units.
    for unit in (1e-3, 1.0, 1e5):
        die = Column(name="die", levels=tuple(unit * i for i in range(1, 7)), shift=3 * unit, scale=2 * unit)
        low, high = (to_codes([die], np.array([[x * unit]]), np.full((1, 1), u)) for x, u in ((1, 0.0), (6, 1.0)))
        assert log_volume([die]) - math.log(float(high[0, 0]) - float(low[0, 0])) == pytest.approx(-math.log(6), abs=1e-6)


def chain(folder: Path, rows: np.ndarray, **values: object) -> tuple[CodeReader, ShardReader, dict[str, float]]:
    """A table through the stages: its codes, samples of their Gaussian, and the Gaussian's scores."""
    folder.mkdir()
    np.save(folder / "table.npy", rows)
    row = {"source": "vectors", "root": str(folder / "table.npy"), "drop_constant": True, "valid_share": 0.2, "test_share": 0.2}
    settings = build(implementation("pipeline.sources", "vectors", "source").Settings, row | values, "table")
    prepare_shards(settings, folder / "shards", processes=1)
    extract_codes(folder / "shards", folder, folder / "codes", ALONE)
    codes = CodeReader(folder / "codes")
    family = implementation("pipeline.densities", "gaussian", "family").Settings
    density, training = fit_density(build(family, {"codes": "c", "dataset": "d", "family": "gaussian"}, "g"), codes, ALONE)
    density.save(folder / "density.safetensors")
    density = load_density(folder / "density.safetensors")
    write_samples(density, None, SamplingSettings(count=500), folder / "samples", ALONE, codes.index.columns)
    scores = score_test_codes(density, codes, False, ALONE).metrics
    assert training.best["valid_log_likelihood"] == pytest.approx(scores["test_log_likelihood"], rel=0.2)
    return codes, ShardReader(folder / "samples"), scores


def test_samples_and_scores_are_in_the_units_of_the_table(tmp_path: Path) -> None:
    codes, samples, scores = chain(tmp_path / "a", TABLE, discrete="dequantise")
    assert codes.index.dim == 3
    drawn = samples.first("samples", 500)
    assert (drawn["examples"].dtype, drawn["examples"].shape, drawn["codes"].shape) == (np.float64, (500, 4), (500, 3))
    assert np.array_equal(drawn["examples"], from_codes(codes.index.columns, drawn["codes"]))
    assert set(drawn["examples"][:, 1]) == {7.25}
    generator = Generator(load_density(tmp_path / "a" / "density.safetensors"), columns=codes.index.columns)
    assert np.array_equal(generator.decode(drawn["codes"]), drawn["examples"])
    assert np.array_equal(generator.sample(5, seed=0)[:, 1], np.full(5, 7.25))
    rows = np.concatenate([TABLE, TABLE[:1]])
    assert generator.log_prob(rows).mean() == pytest.approx(scores["test_log_likelihood"], abs=0.3)
    assert np.array_equal(generator.score(rows).log_prob, generator.log_prob(rows))
    assert set(drawn["examples"][:, 2]) <= {1, 2, 3, 4, 5, 6}
    assert abs(drawn["examples"][:, 0].mean() - WHEN.mean()) < 2
    assert drawn["examples"][:, 0].std() == pytest.approx(10, rel=0.15)
    # The Gaussian of the table itself: the die as a continuous column of variance 35/12 + 1/12.
    expected = -0.5 * (3 * math.log(2 * math.pi) + 3 + math.log(100 * 3 * 1))
    assert scores["test_log_likelihood"] == pytest.approx(expected, abs=0.3)
    # In other units the density changes by their logarithm, the probability of discrete values not at all.
    _, _, other = chain(tmp_path / "b", TABLE * [1000, 1, 100, 1], discrete="dequantise")
    change = other["test_log_likelihood"] - scores["test_log_likelihood"]
    assert change == pytest.approx(-math.log(1000), abs=1e-3)


def test_scores_given_a_context_are_in_the_units_of_the_table(tmp_path: Path) -> None:
    z = (RANDOM.standard_normal((300, 1)) + np.arange(300)[:, None] % 2).astype(np.float32)
    found = []
    for name, columns in (("plain", ()), ("metres", (Column(name="height", scale=1000.0),))):
        folder = tmp_path / name
        folder.mkdir()
        parts = {split: (write_part(folder, split, 0, z, np.arange(300) % 2),) for split in SPLITS}
        mean, std = (float(z.mean()),), (float(z.std()),)
        write_index(folder, CodeIndex(dim=1, mean=mean, std=std, source_digest="", columns=columns, **parts))
        codes = CodeReader(folder)
        row = {"codes": "c", "dataset": "d", "family": "gaussian", "context": "labels"}
        family = implementation("pipeline.densities", "gaussian", "family").Settings
        density, training = fit_density(build(family, row, "g"), codes, ALONE)
        scores = conditional_scores(density, codes, ALONE)
        assert training.best["valid_conditional_log_likelihood"] == pytest.approx(scores["test_conditional_log_likelihood"])
        found.append(scores)
    change = found[1].pop("test_conditional_log_likelihood") - found[0].pop("test_conditional_log_likelihood")
    assert change == pytest.approx(-math.log(1000))
    assert found[0] == found[1]


def test_new_rows_become_codes_as_those_of_the_data_set(tmp_path: Path) -> None:
    codes, _, scores = chain(tmp_path / "a", TABLE, discrete="dequantise")
    reader = ShardReader(tmp_path / "a" / "shards")
    row = {"source": "vectors", "root": str(tmp_path / "a" / "table.npy"), "drop_constant": True}
    settings = build(implementation("pipeline.sources", "vectors", "source").Settings, row, "table")
    examples = open_examples(tmp_path / "a" / "table.npy", settings, reader.index.shape, reader.index.columns)
    assert (examples.total, examples.dimensions) == (600, ("0", "2", "3"))
    new = np.concatenate([block for _, block in examples.blocks()])
    columns = [reader.index.columns[i] for i in (0, 2, 3)]
    exact = to_codes(columns, TABLE[:, [0, 2, 3]])
    assert np.array_equal(new[:, [0, 2]], exact[:, [0, 2]])
    noise = new[:, 1] - exact[:, 1]
    assert np.abs(noise).max() <= 0.5
    assert noise.std() == pytest.approx(12**-0.5, rel=0.1)
    scorer = load_scorer(tmp_path / "a" / "density.safetensors", tmp_path, reader)
    assert scorer(new)["log_likelihood"].mean() == pytest.approx(scores["test_log_likelihood"], abs=0.3)
    assert scorer(new)["log_likelihood"] == pytest.approx(
        Scorer(scorer.density)(new)["log_likelihood"] + codes.index.log_volume
    )


@pytest.mark.parametrize("named", [(), ("x", "one", "y")])
def test_a_column_that_was_left_out_is_watched(tmp_path: Path, named: tuple[str, ...]) -> None:
    columns = [Column(name="x"), Column(name="one", constant=1.0), Column(name="y")]
    row = {"source": "vectors", "root": "table.csv", "drop_constant": True, "columns": list(named)}
    settings = build(implementation("pipeline.sources", "vectors", "source").Settings, row, "table")
    (tmp_path / "new.csv").write_text("x,one,y\n1,1,2\n3,5,4\n5,,6\n")
    (tmp_path / "without.csv").write_text("x,y\n1,2\n3,4\n5,6\n")
    (tmp_path / "other.csv").write_text("x,z\n1,2\n")
    for name, deviating in (("new", {"one": 2}), ("without", {})):
        examples = open_examples(tmp_path / f"{name}.csv", settings, (2,), columns)
        assert examples.dimensions == ("x", "y")
        assert np.concatenate([block for _, block in examples.blocks()]).tolist() == [[1, 2], [3, 4], [5, 6]]
        assert dict(+examples.deviating) == deviating
    with pytest.raises(DataError, match="no column 'y'"):
        open_examples(tmp_path / "other.csv", settings, (2,), columns)


def test_rows_of_another_table_are_compared_in_ones_own_units() -> None:
    own = [
        Column(name="when", shift=100.0, scale=10.0),
        Column(name="one", constant=1.0),
        Column(name="die", levels=(1.0, 2.0)),
    ]
    theirs = [Column(name="0", shift=-5.0, scale=2.0), Column(name="1"), Column(name="2", levels=(2.0, 4.0))]
    rows = np.array([[120.0, 1.5, 2.0], [90.0, 0.5, 4.0]])
    found = recoded(to_codes(theirs, rows), theirs, own, "other")
    assert found[:, 0].tolist() == [2.0, -1.0]
    assert (np.abs(found[:, 1] - [2.0, 4.0]) <= 0.5).all()
    assert found[:, 1].tolist() != [2.0, 4.0]  # dequantised, as the rows that they are compared with
    assert recoded(found, own, own, "other") is found
    assert recoded(to_codes(theirs, rows), theirs, (), "other") == pytest.approx(rows)
    with pytest.raises(DataError, match=r"'other' holds examples with shape \(2,\), which can't be compared with \(3,\)"):
        recoded(rows[:, :2], (), own, "other")


def test_columns_of_new_rows_go_by_their_names(tmp_path: Path) -> None:
    columns = [Column(name="x", scale=2.0), Column(name="one", constant=1.0), Column(name="y")]
    settings = build(
        implementation("pipeline.sources", "vectors", "source").Settings, {"source": "vectors", "root": "a"}, "table"
    )
    for name, text in {
        "reversed": "y,one,x\n2,1,1\n4,1,3\n",
        "with others": "note,y,extra,x\na,2,9,1\nb,4,9,3\n",
        "by order": "1,1,2\n3,1,4\n",
    }.items():
        (tmp_path / f"{name}.csv").write_text(text)
        examples = open_examples(tmp_path / f"{name}.csv", settings, (2,), columns)
        assert examples.dimensions == (("0", "2") if name == "by order" else ("x", "y"))
        assert np.concatenate([block for _, block in examples.blocks()]).tolist() == [[0.5, 2], [1.5, 4]]
    (tmp_path / "others.csv").write_text("x,one,z\n1,1,2\n")
    with pytest.raises(DataError, match=r"others\.csv has no column 'y'; it has x, one, z"):
        open_examples(tmp_path / "others.csv", settings, (2,), columns)
    (tmp_path / "short.csv").write_text("1\n3\n")
    with pytest.raises(DataError, match=r"has 1 columns of numbers, and the row takes vectors of 3 numbers$"):
        open_examples(tmp_path / "short.csv", settings, (2,), columns)


def test_columns_of_another_table_go_by_their_names() -> None:
    own = [Column(name="x", scale=2.0), Column(name="y")]
    theirs = [Column(name="y"), Column(name="more"), Column(name="x")]
    assert recoded(np.array([[2.0, 9.0, 1.0]]), theirs, own, "other").tolist() == [[0.5, 2.0]]
    with pytest.raises(DataError, match="'other' has no column 'x'; it has y, more"):
        recoded(np.array([[2.0, 9.0]]), theirs[:2], own, "other")


def test_a_parzen_score_is_in_the_units_of_the_table(tmp_path: Path) -> None:
    settings = ParzenSettings(bandwidth_start=0.3, bandwidth_stop=0.3, bandwidth_count=1)
    found = []
    for name, unit in (("a", 1.0), ("b", 1000.0)):
        _, samples, _ = chain(tmp_path / name, WHEN[:, None] * unit)
        drawn = samples.first("samples", 500)["codes"]
        reader = ShardReader(tmp_path / name / "shards")
        found.append(parzen_score(lambda drawn=drawn: iter([drawn]), 500, reader, settings, ALONE).score)
    assert found[0].test_mean - found[1].test_mean == pytest.approx(math.log(1000), abs=1e-3)
    assert found[0].valid_curve == (found[0].valid_mean,)
    assert found[0].test_values.mean() == pytest.approx(found[0].test_mean)
    assert found[0].test_mean == pytest.approx(-0.5 * math.log(2 * math.pi * math.e * 100), abs=0.3)


def test_an_index_whose_columns_are_impossible(tmp_path: Path) -> None:
    chain(tmp_path / "a", TABLE)
    for name, change in (("codes", {"scale": 0.0}), ("shards", {"constant": 1.0}), ("samples", {"levels": [2.0, 1.0]})):
        path = tmp_path / "a" / name / "index.json"
        index = read_json(path)
        index["columns"][0] |= change
        write_json(path, index)
        with pytest.raises(DataError, match="columns"):
            (CodeReader if name == "codes" else ShardReader)(path.parent)


def test_torch_s_own_warnings_stay_out_of_sight() -> None:
    # They come with the first derivative of a process.
    code = "import torch; from pipeline.evaluation.manifold import log_volume; log_volume(torch.sin, torch.zeros(1, 2))"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
