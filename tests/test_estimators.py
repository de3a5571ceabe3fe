"""`CodeDensity` against its closed form and the conventions of scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from pipeline.densities import load_density
from pipeline.errors import DataError, SettingsError
from pipeline.estimators import CodeDensity
from pipeline.system.streams import stream

ROWS = np.random.default_rng(0).normal(size=(300, 2)) @ [[2.0, 0.0], [1.0, 1.0]] * [1.0, 1e-3] + [0.0, 1e6]


@parametrize_with_checks([CodeDensity(family="gaussian", settings={"ridge": 1e-6})])
def test_the_checks_of_scikit_learn(estimator: CodeDensity, check: Any) -> None:
    check(estimator)


def test_a_gaussian_in_float64_is_the_closed_form_and_is_saved_whole(tmp_path: Path) -> None:
    # The second column is 1e6 +- 1e-3, which float32 can't tell from a constant.
    density = CodeDensity(family="gaussian").fit(ROWS)
    train = ROWS[stream("validation rows", 0).permutation(300)][30:]
    expected = stats.multivariate_normal(train.mean(axis=0), np.cov(train.T, ddof=0)).logpdf(ROWS)
    np.testing.assert_allclose(density.score_samples(ROWS), expected, atol=1e-3)
    assert density.score(ROWS) == pytest.approx(expected.mean(), abs=1e-3)
    np.testing.assert_allclose(density.sample(5000, seed=1).std(axis=0), train.std(axis=0), rtol=0.05)
    density.save(tmp_path / "density")
    loaded = CodeDensity.load(tmp_path / "density")
    assert np.array_equal(loaded.score_samples(ROWS), density.score_samples(ROWS))
    assert np.array_equal(loaded.sample(3), density.sample(3))
    assert load_density(tmp_path / "density").family == "auto"


def test_auto_tells_of_its_contest(capsys: pytest.CaptureFixture[str]) -> None:
    density = CodeDensity(minutes=0.02, settings={"folds": 2}).fit(ROWS[:80])
    assert {"family", "valid_log_likelihood", "standard_error", "seconds", "weight"} == set(density.contest_[0])
    assert capsys.readouterr().err == ""
    assert density.contest_[0]["valid_log_likelihood"] <= density.held_out_score_ + 0.1
    assert density.held_out_score_ == pytest.approx(density.score(ROWS[80:]), abs=0.3)


def test_it_works_in_a_pipeline_and_in_a_grid_search() -> None:
    scaled = make_pipeline(StandardScaler(), CodeDensity(family="gmm", settings={"components": [1], "ridge": [1e-3]}))
    assert np.isfinite(scaled.fit(ROWS).score(ROWS))
    heavy = np.random.default_rng(0).standard_cauchy((200, 1))
    choices = {"settings": [{}, {"transform": "asinh"}]}
    search = GridSearchCV(CodeDensity(family="gaussian"), choices, cv=2).fit(heavy)
    assert search.best_params_ == {"settings": {"transform": "asinh"}}
    assert clone(search.best_estimator_).get_params()["family"] == "gaussian"


def test_what_cant_be_fitted_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns 1 \(counted from 0\) don't vary"):
        CodeDensity().fit(np.stack([np.arange(9.0), np.full(9, 0.1)], axis=1))
    with pytest.raises(SettingsError, match="did you mean 'maf'"):
        CodeDensity(family="maff").fit(ROWS)
    with pytest.raises(DataError, match="is missing"):
        CodeDensity.load(tmp_path / "none")
    with pytest.raises(ValueError, match="minimum of 3 is required"):
        CodeDensity(family="gaussian").fit(ROWS[:2])
    with pytest.raises(SettingsError, match="context: only rows of params"):
        CodeDensity(family="gaussian", settings={"context": "labels"}).fit(ROWS)
    density = CodeDensity(family="gaussian").fit(ROWS)
    for count in (-1, 2.0):
        with pytest.raises(ValueError, match="n must be a whole number, at least 0"):
            density.sample(count)  # type: ignore[arg-type]
    for given in ([1, 0], ["a", "b"]):
        with pytest.raises(ValueError, match="given must be booleans"):
            density.score_samples(ROWS, given=given)


def test_numbers_of_numpy_are_numbers() -> None:
    choices = {"minutes": np.linspace(0.5, 1.0, 2), "seed": np.arange(2), "settings": [{"ridge": np.float64(1e-3)}]}
    search = GridSearchCV(CodeDensity(family="gaussian"), choices, cv=2, error_score="raise").fit(ROWS)
    assert np.isfinite(search.best_score_)
    assert search.best_estimator_.sample(np.int64(2)).shape == (2, 2)
