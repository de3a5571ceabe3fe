"""Codes -> density: standardisation in the units of the data."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline import fitting
from pipeline.densities.common.density import build_density
from pipeline.densities.gaussian import Gaussian
from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.evaluation import likelihood
from pipeline.evaluation.likelihood import log_likelihood, score_codes
from pipeline.fitting import cholesky_factor, discrepancy, fit_density
from pipeline.settings import DensitySettings, build, implementation
from pipeline.storage.codes import ArrayCodes, CodeIndex, CodeReader, write_part
from pipeline.storage.columns import VectorMoments
from pipeline.storage.parts import write_index
from pipeline.system import progress
from pipeline.system.ranks import Ranks, join
from pipeline.training.checkpoint import Checkpoint


def write(folder: Path, train: np.ndarray) -> CodeReader:
    """Codes whose validation and test splits are those of training."""
    moments = VectorMoments(train.shape[1])
    moments.update(train)
    parts = {split: (write_part(folder, split, 0, train, None),) for split in ("train", "valid", "test")}
    write_index(
        folder,
        CodeIndex(dim=train.shape[1], mean=tuple(moments.mean), std=tuple(moments.std), source_digest="", **parts),
    )
    return CodeReader(folder)


def correlated(n: int, dim: int = 3) -> np.ndarray:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(dim, dim)) + 2 * np.eye(dim)
    return (generator.normal(size=(n, dim)) @ mixing.T + [1.0, -20.0, 300.0][:dim]).astype(np.float32)


def row(family: str, **settings: object) -> DensitySettings:
    values = {"codes": "c", "dataset": "c", "family": family, **settings}
    return build(implementation("pipeline.densities", family, "family").Settings, values, "densities.row")


def test_cholesky_factor_of_a_stream_is_that_of_the_whole() -> None:
    codes = correlated(500)
    mean = torch.from_numpy(codes.mean(axis=0, dtype=np.float64))
    factor = cholesky_factor(np.array_split(codes, 7), mean)
    covariance = np.cov(codes.astype(np.float64), rowvar=False, bias=True)
    np.testing.assert_allclose(factor.numpy(), np.linalg.cholesky(covariance), rtol=1e-9, atol=1e-12)


def test_codes_in_a_subspace_are_refused() -> None:
    codes = np.repeat(correlated(50, 1), 2, axis=1)
    with pytest.raises(DataError, match="set shrinkage: true or standardise: dimension"):
        cholesky_factor([codes], torch.from_numpy(codes.mean(axis=0, dtype=np.float64)))


@pytest.mark.parametrize("standardise", ["none", "scalar", "dimension", "cholesky"])
def test_a_gaussian_has_one_likelihood_under_every_standardisation(tmp_path: Path, standardise: str) -> None:
    codes = correlated(500)
    density, _ = fit_density(row("gaussian", standardise=standardise), write(tmp_path, codes), join())
    covariance = np.cov(codes.astype(np.float64), rowvar=False, bias=True)
    entropy = 0.5 * (3 * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] + 3)
    assert log_likelihood(density, [codes]).mean == pytest.approx(-entropy, abs=2e-3)
    shift, scale = {
        "none": (0, 1),
        "scalar": (codes.mean(), codes.std()),
        "dimension": (codes.mean(0), codes.std(0)),
        "cholesky": (codes.mean(0), np.linalg.cholesky(covariance).diagonal()),
    }[standardise]
    np.testing.assert_allclose(density.shift, np.broadcast_to(shift, 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(density.scale, np.broadcast_to(scale, 3), rtol=1e-5)


def test_whitened_codes_start_near_the_gaussian_and_the_file_says_so(tmp_path: Path) -> None:
    codes = correlated(500)
    settings = row("lde", components=2, standardise="cholesky", epochs=1, batch_size=100)
    density, training = fit_density(settings, write(tmp_path / "codes", codes), join())
    density.save(tmp_path / "density")
    loaded = type(density).load(tmp_path / "density")
    points = torch.from_numpy(codes[:20])
    assert torch.equal(loaded.log_prob(points), density.log_prob(points))
    assert loaded.factor is not None
    assert training.best["valid_log_likelihood"] > -13  # -11.0 for the Gaussian; -29 with independent dimensions


@pytest.mark.parametrize(("max_minutes", "tried", "ended_by"), [(0.0, [1, 2], "epochs"), (1e-9, [1], "max_minutes")])
def test_gmm_reads_the_clock_between_candidates_and_tells_of_each(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    max_minutes: float,
    tried: list[int],
    ended_by: str,
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    codes = np.concatenate([correlated(300), correlated(300) + 50])
    settings = row("gmm", components=[1, 2], max_minutes=max_minutes)
    density, training = fit_density(settings, write(tmp_path, codes), join(), "fitting")
    value = training.best["valid_log_likelihood"]
    assert (density.arguments()["components"], training.ended_by) == ([tried[-1]], ended_by)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(tried)
    assert [f"of {k} Gaussians" in lines[-1] for k in (1, 2)] == [k in tried for k in (1, 2)]
    assert float(lines[-1].rsplit(" ", 1)[1]) == pytest.approx(value, abs=1e-3)


GMMN = {"epochs": 6, "batch_size": 50, "learning_rate": 0.1, "hidden": [8], "noise_dim": 3}  # so fast that it gets worse again


def test_gmmn_keeps_the_epoch_with_the_least_discrepancy(tmp_path: Path) -> None:
    codes = correlated(300)
    density, training = fit_density(row("gmmn", **GMMN), write(tmp_path, codes), join())
    scores = [validation["valid_minus_squared_mmd"] for validation in training.validations]
    assert [validation["epoch"] for validation in training.validations] == [1, 2, 3, 4, 5, 6]
    assert training.best["valid_minus_squared_mmd"] == max(scores) > scores[-1]
    assert not any("likelihood" in key for key in training.best)
    assert -discrepancy(density, [codes[:100], codes[100:]], seed=0) == max(scores)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_lde_stopped_and_resumed_keeps_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    codes = write(tmp_path / "codes", correlated(400))
    settings = row("lde", components=2, blocks="residual", width=8, epochs=2, batch_size=50, optimizer=optimizer)
    whole, _ = fit_density(settings, codes, join())
    checkpoint = Checkpoint(tmp_path / "checkpoint", {})
    shown = progress.Progress.advance
    steps = 0

    def advance(self: progress.Progress, *arguments: object, **values: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        shown(self, *arguments, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(progress.Progress, "advance", advance)
    with pytest.raises(PipelineError, match="stopped by SIGTERM at step 6"):
        fit_density(settings, codes, join(), checkpoint=checkpoint)
    resumed, training = fit_density(settings, codes, join(), checkpoint=checkpoint)
    assert training.resumed_at == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_muon_moves_the_weights_between_hidden_layers_only(tmp_path: Path) -> None:
    codes = write(tmp_path / "codes", correlated(200))
    of = {"components": 2, "blocks": "residual", "width": 8, "epochs": 1, "batch_size": 200}
    by_adamw, by_muon = (fit_density(row("lde", **of, optimizer=name), codes, join())[0] for name in ("adamw", "muon"))
    hidden = {id(value) for value in by_muon.hidden_matrices()}
    assert hidden
    for (name, value), other in zip(by_muon.named_parameters(), by_adamw.parameters(), strict=True):
        assert torch.equal(value, other) == (id(value) not in hidden), name
    with pytest.raises(SettingsError, match=r"optimizer: can be muon for the family lde only"):
        row("maf", optimizer="muon")


def test_gmmn_stopped_and_resumed_keeps_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = write(tmp_path / "codes", correlated(300))
    whole, expected = fit_density(row("gmmn", **GMMN), reader, join())
    checkpoint = Checkpoint(tmp_path / "checkpoint", {})

    def stopped(*arguments: object) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return discrepancy(*arguments)

    monkeypatch.setattr(fitting, "discrepancy", stopped)
    with pytest.raises(PipelineError, match="stopped by SIGTERM at step 6"):
        fit_density(row("gmmn", **GMMN), reader, join(), checkpoint=checkpoint)
    monkeypatch.undo()
    resumed, training = fit_density(row("gmmn", **GMMN), reader, join(), checkpoint=checkpoint)
    assert (training.resumed_at, training.validations) == (6, expected.validations)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_a_gaussian_of_mapped_columns_is_log_normal(tmp_path: Path) -> None:
    codes = np.exp(correlated(500, 2) / [5, 10])
    density, _ = fit_density(row("gaussian", transform="log"), write(tmp_path, codes.astype(np.float32)), join())
    logs = np.log(codes)
    expected = stats.multivariate_normal(logs.mean(axis=0), np.cov(logs.T, ddof=0)).logpdf(logs) - logs.sum(axis=1)
    np.testing.assert_allclose(np.concatenate(list(score_codes(density, [codes.astype(np.float32)]))), expected, atol=2e-3)


@pytest.mark.parametrize("components", [1, 30])
@pytest.mark.parametrize("network", [{}, {"blocks": "separate", "width": 8}, {"order": 3}])
def test_an_untrained_lde_is_the_gaussian_of_whitened_codes(network: dict[str, object], components: int) -> None:
    codes = correlated(200)
    mean = torch.from_numpy(codes.mean(axis=0, dtype=np.float64))
    density = build_density(row("lde", start="gaussian", components=components, **network), 3).double().eval()
    density.standardise(mean, cholesky_factor([codes], mean))
    covariance = np.cov(codes.astype(np.float64), rowvar=False, bias=True)
    expected = stats.multivariate_normal(mean.numpy(), covariance).logpdf(codes)
    # Other Gaussians than N(0, 1) have a share of 1e-5 of each conditional.
    given = density.log_prob(torch.from_numpy(codes)).detach().numpy()
    np.testing.assert_allclose(given, expected, atol=1e-12 if components == 1 else 2e-4)


def test_its_components_learn_apart(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    codes = (generator.choice([-3.0, 3.0], (600, 1)) + generator.normal(size=(600, 1))).astype(np.float32)
    settings = row(
        "lde", start="gaussian", components=4, epochs=40, batch_size=60, learning_rate=0.02, blocks="separate", width=4
    )
    density, _ = fit_density(settings, write(tmp_path, codes), join())
    truth = np.logaddexp(*(stats.norm(m).logpdf(codes) for m in (-3, 3))).mean() - np.log(2)
    assert log_likelihood(density, [codes]).mean == pytest.approx(truth, abs=0.02)  # a Gaussian is 0.44 below


def test_shrunk_correlations_are_ledoit_and_wolfs(tmp_path: Path) -> None:
    from sklearn.covariance import ledoit_wolf

    codes = np.random.default_rng(0).gamma(1.0, np.arange(1.0, 21.0), (12, 20))
    codes = (codes + codes[:, :1] * np.arange(1, 21)).astype(np.float32)
    mean, std = (torch.from_numpy(value) for value in (codes.mean(0, dtype=np.float64), codes.std(0, dtype=np.float64)))
    factor = cholesky_factor(np.array_split(codes, 5), mean, std)
    shrunk, share = ledoit_wolf(((codes - mean.numpy()) / std.numpy()), assume_centered=True)
    assert 0.1 < share < 1
    np.testing.assert_allclose((factor @ factor.T / torch.outer(std, std)).numpy(), shrunk, atol=1e-9)
    settings = row("lde", components=1, epochs=1, width=4, standardise="cholesky", shrinkage=True)
    assert np.isfinite(log_likelihood(fit_density(settings, write(tmp_path, codes), join())[0], [codes]).mean)
    with pytest.raises(SettingsError, match="shrinkage: is for standardise: cholesky"):
        row("gaussian", shrinkage=True)


def test_patience_ends_a_fit(tmp_path: Path) -> None:
    codes = write(tmp_path / "codes", correlated(60))
    values = {"components": 2, "epochs": 500, "batch_size": 20, "learning_rate": 0.1, "validate_steps": 1, "patience": 4}
    _, training = fit_density(row("lde", **values), codes, join())
    after = [validation for validation in training.validations if validation["step"] > training.best["step"]]
    assert training.ended_by == "patience"
    assert 4 <= len(after) <= 4 + 2  # it ends with an epoch of three validations
    assert training.steps % 3 == 0
    assert training.steps < 1500


def test_muon_rate_moves_the_weights_between_hidden_layers_only(tmp_path: Path) -> None:
    codes = write(tmp_path / "codes", correlated(200))
    of = {"components": 2, "blocks": "residual", "width": 8, "epochs": 1, "batch_size": 200, "optimizer": "muon"}
    slow, fast = (fit_density(row("lde", **of, muon_rate=rate), codes, join())[0] for rate in (1.0, 3.0))
    hidden = {id(value) for value in fast.hidden_matrices()}
    for (name, value), other in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert torch.equal(value, other) == (id(value) not in hidden), name


def test_validate_steps_of_a_row_are_heeded(tmp_path: Path) -> None:
    settings = row("lde", components=2, epochs=1, batch_size=50, validate_steps=3)
    _, training = fit_density(settings, write(tmp_path, correlated(400)), join())
    assert [validation["step"] for validation in training.validations] == [3, 6, 8]


def test_each_rank_scores_its_share_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    density = implementation("pipeline.densities", "gaussian", "family").Gaussian(2)
    blocks = [np.full((1, 2), number, np.float32) for number in range(5)]
    scored: list[int] = []
    score = likelihood.score_codes
    monkeypatch.setattr(
        likelihood, "score_codes", lambda density, blocks: score(density, (scored.append(int(b[0, 0])) or b for b in blocks))
    )
    parts: list[object] = []
    for rank in range(2):
        ranks = Ranks(rank, 2, torch.device("cpu"))
        monkeypatch.setattr(Ranks, "gather", lambda self, value: parts.append(value) or list(parts))
        merged = log_likelihood(density, blocks, ranks)
    assert scored == [0, 2, 4, 1, 3]
    assert tuple(merged) == pytest.approx(tuple(log_likelihood(density, blocks)))


def test_the_time_of_training_is_estimated_and_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    density = Gaussian(2).train()
    scores = density.log_prob
    monkeypatch.setattr(density, "log_prob", lambda z: (time.sleep(0.02), scores(z))[1])
    assert fitting.estimated_seconds(density, np.zeros((100, 2), np.float32), 1600) == pytest.approx(6, rel=0.5)
    assert density.training
    codes = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    row = {"codes": "c", "dataset": "d", "family": "lde", "components": 2, "epochs": 1}
    settings = build(implementation("pipeline.densities", "lde", "family").Settings, row, "row")
    for threshold, announced in ((0.0, True), (1e9, False)):
        monkeypatch.setattr(fitting, "ANNOUNCED_SECONDS", threshold)
        fit_density(settings, ArrayCodes(codes[10:], codes[:10]), Ranks(0, 1, torch.device("cpu")), "fitting row")
        assert ("parameters in 2 dimensions: about 0 minutes" in capsys.readouterr().err) is announced
