"""Detection of what doesn't belong: surprise, conformal thresholds, AUROC and its error, the decoder's volume, terms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.autoencoders.common.network import Decoder
from pipeline.autoencoders.common.options import ConvolutionOptions
from pipeline.densities.gaussian import Model as Gaussian
from pipeline.densities.lde import LatentDensityEstimator
from pipeline.errors import DataError, PipelineError
from pipeline.evaluation.detection import Calibration, Surprise, detect, roc_curve
from pipeline.evaluation.manifold import log_volume, manifold_log_likelihood, unit_decoder


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# Scores ---------------------------------------------------------------------------------------------------------------


def test_surprise_is_minus_the_log_of_the_share_above() -> None:
    reference = draw(0, 2000)
    surprise = Surprise(reference)
    for value in (-1.0, 0.0, 1.5):
        assert surprise(np.array([value]))[0] == pytest.approx(-math.log((reference > value).mean()), abs=0.01)


def test_the_tail_of_an_exponential_goes_on_as_it_should() -> None:
    reference = np.random.default_rng(1).exponential(2.0, 200_000)
    # -log S(v) = v / 2, also far beyond the largest reference value.
    assert Surprise(reference)(np.array([1.0, 10.0, 100.0])) == pytest.approx([0.5, 5.0, 50.0], rel=0.03)


def test_surprise_rises_with_the_value_and_takes_equal_references() -> None:
    surprise = Surprise(np.r_[np.zeros(50), np.ones(50)])
    values = surprise(np.linspace(-1, 3, 50))
    assert np.isfinite(values).all()
    assert (np.diff(values) >= 0).all()
    assert Surprise(np.array([3.0]))(np.array([2.0, 4.0])).tolist() == pytest.approx([math.log(2), math.log(2) + 1])
    with pytest.raises(DataError, match="aren't finite"):
        Surprise(np.array([1.0, np.inf]))


@pytest.mark.parametrize("names", [("error",), ("error", "log_likelihood")])
def test_fresh_inliers_are_taken_for_outliers_as_often_as_wished(names: tuple[str, ...]) -> None:
    share, count, fresh, rounds = 0.05, 199, 2000, 40
    rates = []
    for seed in range(rounds):
        # The two scores depend on each other, and have heavy tails.
        both = [np.exp(draw(seed, n, 2) @ np.array([[1.0, 0.8], [0.0, 0.6]])) for n in (count, fresh)]
        valid, new = ({name: values[:, i] for i, name in enumerate(names)} for values in both)
        calibration = Calibration(valid)
        threshold = calibration.threshold(share)
        joined = calibration.join(new)
        assert ((joined > threshold) == (calibration.p_values(joined) <= share)).all()
        rates.append((joined > threshold).mean())
    n = len(calibration.joined)
    expected = math.floor(share * (n + 1)) / (n + 1)
    # Over calibrations the rate is a beta variable, over examples a binomial one.
    error = math.sqrt(expected * (1 - expected) * (1 / (n + 2) + 1 / fresh) / rounds)
    assert abs(np.mean(rates) - expected) < 3 * error


def test_calibrating_examples_are_others_than_those_that_scores_are_ranked_by() -> None:
    values = np.arange(10.0)
    calibration = Calibration({"a": values, "b": values})
    assert len(calibration.joined) == 5
    expected = Surprise(values[::2])(values[1::2])
    assert calibration.joined == pytest.approx(2 * expected)


def test_too_small_a_share_is_refused_with_what_it_takes() -> None:
    calibration = Calibration({"error": np.arange(98.0)})
    with pytest.raises(DataError, match=r"and there are 98; ask for a share of at least 0\.011$"):
        calibration.threshold(0.01)
    calibration.threshold(0.011)
    assert Calibration({"error": np.arange(99.0)}).threshold(0.01) == Calibration({"error": np.arange(99.0)}).joined[-1]


@pytest.mark.parametrize("digits", [None, 0], ids=["distinct", "ties"])
def test_scores_of_detection_are_those_of_scikit_learn(digits: int | None) -> None:
    inliers, outliers = draw(0, 300), draw(1, 200) + 1
    if digits is not None:
        inliers, outliers = inliers.round(digits), outliers.round(digits)
    truth, scores = np.r_[np.zeros(300), np.ones(200)], np.r_[inliers, outliers]
    found = detect(inliers, outliers)
    assert found.auroc == pytest.approx(roc_auc_score(truth, scores))
    assert found.average_precision == pytest.approx(average_precision_score(truth, scores))
    allowed = max(t for t in np.unique(outliers) if (outliers >= t).mean() >= 0.95)
    assert found.false_alarms == pytest.approx((inliers >= allowed).mean())


def test_standard_errors_are_the_spread_over_data_sets() -> None:
    found = [detect(draw(2 * i, 80), draw(2 * i + 1, 60) + 1, replicates=50) for i in range(150)]
    for name in ("auroc", "average_precision", "false_alarms"):
        spread = np.std([getattr(one, name) for one in found])
        assert np.mean([getattr(one, f"{name}_se") for one in found]) == pytest.approx(spread, rel=0.2), name


def test_the_roc_curve_encloses_the_auroc() -> None:
    inliers, outliers = draw(0, 500), draw(1, 400) + 1
    alarms, detected = roc_curve(inliers, outliers, points=2000)
    assert np.trapezoid(detected, alarms) == pytest.approx(detect(inliers, outliers).auroc)
    alarms, detected = roc_curve(inliers, outliers, points=50)
    assert len(alarms) <= 50
    assert (alarms[0], detected[0], alarms[-1], detected[-1]) == (0, 0, 1, 1)


def test_nothing_to_compare_and_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="0 inliers and 1 outliers"):
        detect([], [1.0])
    with pytest.raises(DataError, match="isn't a number"):
        detect([1.0, np.nan], [1.0])
    assert detect([0.0, -np.inf], [np.inf]).auroc == 1


# The decoder's volume -------------------------------------------------------------------------------------------------


def linear(dim: int, outputs: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(draw(seed, dim, outputs))


def test_the_volume_of_a_linear_decoder_is_its_determinant() -> None:
    matrix = linear(5, 12)
    values, errors = log_volume(lambda z: z @ matrix, torch.zeros(3, 5, dtype=torch.float64))
    assert values.tolist() == pytest.approx([0.5 * torch.logdet(matrix @ matrix.T).item()] * 3)
    assert not errors.any()


def test_the_density_on_a_linear_manifold_is_that_of_the_gaussian_there() -> None:
    # x = z A with z ~ N(0, I): on the row space of A, x is Gaussian with covariance A^T A, whose pseudo-determinant counts.
    matrix, z = linear(3, 8), torch.from_numpy(draw(1, 4, 3))
    x = z @ matrix
    precision = torch.linalg.pinv(matrix.T @ matrix)
    pseudo = torch.linalg.eigvalsh(matrix.T @ matrix)[-3:].log().sum()
    expected = -0.5 * (torch.einsum("bi,ij,bj->b", x, precision, x) + pseudo + 3 * math.log(2 * math.pi))
    density = Gaussian(3).double().eval()
    value = density.log_prob(z) - log_volume(lambda codes: codes @ matrix, z)[0]
    assert value.tolist() == pytest.approx(expected.tolist())


def test_the_estimate_of_a_volume_is_within_its_error() -> None:
    matrix = linear(60, 100)
    expected = 0.5 * torch.logdet(matrix @ matrix.T).item()
    values, errors = log_volume(lambda z: z @ matrix, torch.zeros(8, 60, dtype=torch.float64), exact=0)
    assert (errors > 0).all()
    assert abs(values.mean().item() - expected) < 3 * errors.mean().item() / math.sqrt(8) + 0.5
    assert ((values - expected).abs() < 4 * errors).double().mean() > 0.8
    # With as many steps as dimensions and an identity there is nothing to estimate.
    values, errors = log_volume(lambda z: 3 * z, torch.zeros(2, 6, dtype=torch.float64), exact=0)
    assert values.tolist() == pytest.approx([6 * math.log(3)] * 2)
    assert errors.max() < 1e-6


def test_a_decoder_that_ignores_a_dimension_has_no_volume() -> None:
    values, _ = log_volume(lambda z: torch.cat([z[:, :1], z[:, :1]], dim=1), torch.zeros(1, 2, dtype=torch.float64))
    assert values.item() == -math.inf


def small_decoder(output: str = "tanh") -> Decoder:
    torch.manual_seed(0)
    options = ConvolutionOptions(blocks=1, latent_dim=3, base_channels=4, batch_norm_gain="ones")
    return Decoder(options, shape=(1, 8, 8), output=output).eval()


@pytest.mark.parametrize("output", ["sigmoid", "tanh"])
def test_the_volume_of_a_network_is_that_of_its_jacobian(output: str) -> None:
    decode = unit_decoder(small_decoder(output))
    codes = torch.from_numpy(draw(0, 4, 3)).float()
    values, _ = log_volume(decode, codes)
    for code, value in zip(codes, values, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda z: decode(z[None])[0], code).double()
        assert value.item() == pytest.approx(0.5 * torch.logdet(jacobian.T @ jacobian).item(), rel=1e-5)


def test_stretched_codes_keep_their_manifold_log_likelihood() -> None:
    decoder, density = small_decoder(), LatentDensityEstimator(3, components=2).eval()
    codes = torch.from_numpy(draw(0, 5, 3)).float()
    before, _ = manifold_log_likelihood(density, decoder, codes)
    with torch.no_grad():  # an autoencoder whose codes are twice as large
        decoder.layers[0].weight /= 2
        density.scale *= 2
        density.shift *= 2
    after, _ = manifold_log_likelihood(density, decoder, 2 * codes)
    assert after.tolist() == pytest.approx(before.tolist(), rel=1e-4)


# Terms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"order": 3}, {"blocks": "separate", "width": 8}], ids=str)
@pytest.mark.parametrize("transform", [None, "asinh"])
def test_terms_are_those_of_the_log_likelihood(options: dict, transform: str | None) -> None:
    from pipeline.densities.common.transforms import build_transform

    torch.manual_seed(0)
    z = torch.from_numpy(draw(0, 6, 4))
    density = LatentDensityEstimator(4, components=2, **options).double().eval()
    if transform is not None:
        density.transform = build_transform(transform, 4).double()
        density.transform.fit(z)
    density.standardise(z.mean(0), torch.linalg.cholesky(torch.cov(z.T)))
    terms = density.terms(z)
    with torch.no_grad():
        assert terms.sum(1).tolist() == pytest.approx(density.log_prob(z).tolist())


def test_terms_belong_to_their_dimensions() -> None:
    torch.manual_seed(0)
    density, z = LatentDensityEstimator(4, components=2, order=3).double().eval(), torch.from_numpy(draw(0, 6, 4))
    assert density.order is not None
    last = int(density.order[-1])
    assert last != 3
    other = z.clone()
    other[:, last] += 1  # nothing that is read later: the other terms stay
    changed = (density.terms(other) - density.terms(z)).abs().amax(0) > 1e-9
    assert changed.nonzero().flatten().tolist() == [last]


def test_other_likelihoods_have_no_terms() -> None:
    with pytest.raises(PipelineError, match="'gaussian' has no term for each dimension"):
        Gaussian(2).terms(torch.zeros(1, 2))
    averaged = LatentDensityEstimator(63, components=2, patch_orders=2)
    assert not averaged.has_terms
    assert LatentDensityEstimator(2, components=2).has_terms
    with pytest.raises(PipelineError, match="no term"):
        averaged.terms(torch.zeros(1, 63))
