"""KID, FID, precision, recall, density, coverage, feature networks, interpolation, MMD: closed forms and constructed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, SettingsError
from pipeline.evaluation import features, interpolation, quality, two_sample
from pipeline.settings import QualitySettings
from pipeline.storage.parts import write_index
from pipeline.storage.shards import ShardIndex, ShardReader, ShardWriter

GENERATOR = np.random.default_rng(0)


def normal(n, d=4, shift=0.0, scale=1.0, seed=0):
    return shift + scale * np.random.default_rng(seed).normal(size=(n, d))


# KID and FID --------------------------------------------------------------------------------------------------------


def naive_mmd(x, y):
    n, d = x.shape
    k = [[(float(a @ b) / d + 1) ** 3 for b in np.concatenate([x, y])] for a in np.concatenate([x, y])]
    k = np.array(k)
    xx, yy, xy = k[:n, :n], k[n:, n:], k[:n, n:]
    return (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1)) - 2 * xy.mean()


def test_kid_of_one_subset_is_the_unbiased_mmd():
    x, y = normal(8), normal(8, shift=1, seed=1)
    assert quality.kid(x, y, subsets=1).mean == pytest.approx(naive_mmd(x, y), rel=1e-9)


def test_kid_is_unbiased_and_its_error_is_honest():
    # Over many draws of one distribution: mean 0, and the spread that the standard error says.
    results = [quality.kid(normal(200, seed=2 * i), normal(200, seed=2 * i + 1)) for i in range(60)]
    z = np.array([r.mean / r.standard_error for r in results])
    means = np.array([r.mean for r in results])
    assert abs(means.mean()) < 3 * means.std(ddof=1) / np.sqrt(len(means))
    assert 0.7 < np.sqrt(np.mean(z**2)) < 1.6
    assert quality.kid(normal(200), normal(200, shift=1, seed=1)).mean > 0.5


def test_fid_of_gaussians_is_the_closed_form():
    n = 200_000
    a, b = np.array([1.0, 2.0, 0.5]), np.array([2.0, 1.0, 0.5])
    x, y = normal(n, 3) * a, normal(n, 3, seed=1) * b + [1.0, 0, 0]
    # Diagonal covariances: ||mu||^2 + sum (a - b)^2.
    assert quality.fid(x, y) == pytest.approx(1 + ((a - b) ** 2).sum(), rel=0.02)


def test_fid_identities():
    x, y = normal(500), normal(400, shift=0.5, scale=2, seed=1)
    assert quality.fid(x, x) == pytest.approx(0, abs=1e-6)
    assert quality.fid(x, y) == pytest.approx(quality.fid(y, x), rel=1e-6)
    rotation = np.linalg.qr(normal(4, seed=5))[0]
    assert quality.fid(x @ rotation, y @ rotation) == pytest.approx(quality.fid(x, y), rel=1e-6)
    assert quality.fid(x + 1000, y + 1000) == pytest.approx(quality.fid(x, y), rel=1e-6)
    assert quality.fid(x, x + np.array([3, 0, 0, 0])) == pytest.approx(9, rel=1e-6)


# Precision, recall, density, coverage -------------------------------------------------------------------------------


def naive_manifolds(real, fake, k, dk):
    def radius(x, k):
        return np.array([np.sort(np.linalg.norm(x - p, axis=1))[k] for p in x])

    d = np.linalg.norm(real[:, None] - fake[None], axis=-1)  # (n, m)
    r, rd, s = radius(real, k), radius(real, dk), radius(fake, k)
    return (
        (d <= r[:, None]).any(0).mean(),
        (d <= s[None]).any(1).mean(),
        (d <= rd[:, None]).sum() / (dk * len(fake)),
        (d <= rd[:, None]).any(1).mean(),
    )


def test_manifolds_equal_a_naive_twin(monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", 17)
    real, fake = normal(80, 3), normal(60, 3, shift=0.5, scale=0.8, seed=1)
    found = quality.manifolds(real, fake)
    expected = naive_manifolds(real, fake, 3, 5)
    assert [found.precision.mean, found.recall.mean, found.density.mean, found.coverage.mean] == pytest.approx(expected)


def test_a_collapsed_model_is_precise_and_covers_little():
    real = np.concatenate([normal(100, 2), normal(100, 2, shift=50, seed=1)])
    fake = normal(200, 2, seed=2)  # one of the two modes
    found = quality.manifolds(real, fake)
    assert found.precision.mean > 0.8
    assert found.recall.mean <= 0.5
    assert found.coverage.mean <= 0.5
    assert found.density.mean > 0.7
    p = found.precision.mean
    assert found.precision.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 199), rel=1e-6)


def test_an_outlier_among_the_real_images_fools_precision_less_than_density():
    real = np.concatenate([normal(100, 2), [[100.0, 100.0]]])  # its ball reaches over everything
    fake = normal(100, 2, shift=60, seed=2)
    found = quality.manifolds(real, fake)
    assert found.precision.mean == 1
    assert found.density.mean == pytest.approx(0.2)  # one ball out of k = 5


def test_scores_carry_the_networks_name():
    metrics = quality.score("vgg19", normal(100).astype(np.float32), normal(60, seed=1).astype(np.float32)).metrics()
    assert set(metrics) >= {"vgg19_kid", "vgg19_kid_se", "vgg19_fid", "vgg19_precision", "vgg19_coverage_se", "vgg19_samples"}
    assert all(np.isfinite(v) for v in metrics.values())
    again = quality.score("vgg19", normal(100).astype(np.float32), normal(60, seed=1).astype(np.float32)).metrics()
    assert metrics == again


@pytest.mark.parametrize("bad", [np.zeros((5, 3)), np.full((20, 4), np.nan), np.zeros((0, 4)), np.zeros(4)])
def test_bad_features_are_refused(bad):
    for function in (quality.kid, quality.fid, quality.manifolds):
        with pytest.raises(DataError):
            function(normal(20), bad)


def test_too_few_examples_are_refused():
    with pytest.raises(DataError, match="too few"):
        quality.kid(normal(19), normal(19))
    with pytest.raises(DataError, match="too few"):
        quality.manifolds(normal(5), normal(50))


def test_nearest_image_over_blocks():
    images = GENERATOR.random((50, 1, 4, 4)).astype(np.float32)
    queries = images[[7, 33, 49]] + 0.01
    found, distances = quality.nearest(queries, np.split(images, 5))
    np.testing.assert_array_equal(found, images[[7, 33, 49]])
    np.testing.assert_allclose(distances, 0.01, rtol=1e-4)
    with pytest.raises(DataError, match="no training images"):
        quality.nearest(queries, [])


# Feature networks ---------------------------------------------------------------------------------------------------


def bars(count, seed):
    """Images with a horizontal (0) or a vertical (1) bar."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=count)
    images = 0.1 * generator.random((count, 1, 12, 12))
    for image, label, at in zip(images, labels, generator.integers(12, size=count), strict=True):
        image[0, at if label == 0 else slice(None), slice(None) if label == 0 else at] += 0.9
    return images.astype(np.float32), labels


def test_classifier_learns_and_is_deterministic():
    images, labels = bars(600, 0)

    def blocks():
        yield images[:350], labels[:350]
        yield images[350:], labels[350:]

    before = torch.random.get_rng_state()
    network = features.train_classifier(blocks, classes=2, seed=1, epochs=6, batch_size=32)
    assert torch.equal(before, torch.random.get_rng_state())
    test, truth = bars(200, 1)
    assert (network(torch.from_numpy(test)).argmax(1).numpy() == truth).mean() > 0.95
    again = features.train_classifier(blocks, classes=2, seed=1, epochs=6, batch_size=32)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True))
    found = features.extract_features(features.classifier_network(network), [test[:90], test[90:]], batch_size=64)
    assert found.shape == (200, 128)
    assert found.dtype == np.float32
    # Noise is far from bars, other bars are near.
    noise = features.extract_features(features.classifier_network(network), [np.random.default_rng(2).random((200, 1, 12, 12))])
    real = features.extract_features(features.classifier_network(network), [bars(200, 3)[0]])
    assert quality.fid(real, noise) > 10 * quality.fid(real, found)


def test_images_without_labels_are_told_by_their_orientation(tmp_path):
    images, _ = bars(200, 0)
    turned, turns = features.rotated(images)
    assert turned.shape == (800, 1, 12, 12)
    assert all(np.array_equal(np.rot90(turned[turns == k], -k, axes=(2, 3)), images) for k in range(4))
    shards = {}
    for split in ("train", "valid", "test"):
        with ShardWriter(tmp_path, split) as writer:
            writer.write(examples=np.uint8(255 * images))
        shards[split] = tuple(writer.shards)
    write_index(tmp_path, ShardIndex(kind="images", shape=(1, 12, 12), dtype="uint8", value_range=(0.0, 1.0), **shards))
    settings = QualitySettings(network="classifier", classifier_examples=100, classifier_epochs=1)
    reader = ShardReader(tmp_path)
    assert features.write_features(tmp_path / "features", settings, reader) == (200, 128)
    network = features.load_classifier(tmp_path / "features" / features.CLASSIFIER)
    assert network.head.out_features == 4
    # The first 100 images, each in all four orientations.
    pixels = np.uint8(255 * images[:100]).astype(np.float32) / 255
    twin = features.train_classifier(lambda: [features.rotated(pixels)], classes=4, seed=0, epochs=1)
    assert torch.allclose(twin.head.weight, network.head.weight, atol=1e-4)


def test_labels_out_of_range_and_no_images_are_refused():
    with pytest.raises(DataError, match="expected 0 to 1"):
        features.train_classifier(lambda: [(np.zeros((2, 1, 12, 12)), np.array([0, 2]))], classes=2, seed=0)
    with pytest.raises(DataError, match="no labelled images"):
        features.train_classifier(lambda: [], classes=2, seed=0)
    with pytest.raises(DataError, match="no images"):
        features.extract_features(features.FeatureNetwork("x", lambda x: x), [])


def test_vgg19_features_of_grey_and_coloured_images():
    g = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    weights = {f"features.{i}.weight": 0.05 * torch.randn(*s, 3, 3, generator=g) for i, s in shapes.items()}
    weights |= {f"features.{i}.bias": torch.zeros(s[0]) for i, s in shapes.items()}
    network = features.vgg19_network(weights)
    grey = GENERATOR.random((3, 1, 16, 16)).astype(np.float32)
    found = features.extract_features(network, [grey])
    assert found.shape == (3, 256)
    np.testing.assert_allclose(found, features.extract_features(network, [grey.repeat(3, axis=1)]), rtol=1e-5)


@pytest.mark.parametrize("network", ["vgg19", "inception"])
def test_a_file_of_weights_needs_the_digest_of_its_content(network, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"weights")
    settings = QualitySettings(network=network, weights=str(tmp_path / "weights.pth"))
    with pytest.raises(SettingsError, match=r"^quality.weights: write .*weights.pth@sha256:[0-9a-f]{12} \("):
        features._network(settings, tmp_path)


def test_inception_without_its_weights_is_refused(tmp_path):
    with pytest.raises(DataError, match="is missing"):
        features.inception_network(tmp_path / "none.pth")
    (tmp_path / "weights.pth").write_bytes(b"")
    if not __import__("importlib.util").util.find_spec("torch_fidelity"):
        with pytest.raises(DataError, match="torch-fidelity"):
            features.inception_network(tmp_path / "weights.pth")


# Interpolation ------------------------------------------------------------------------------------------------------


def test_pairs_within_and_across_labels():
    labels = GENERATOR.permutation(np.repeat([0, 3, 7], [5, 20, 75]))
    for same in (True, False):
        pairs = interpolation.draw_pairs(labels, 5000, same, seed=1)
        assert ((labels[pairs[:, 0]] == labels[pairs[:, 1]]) == same).all()
        assert (pairs[:, 0] != pairs[:, 1]).all()
        np.testing.assert_array_equal(pairs, interpolation.draw_pairs(labels, 5000, same, seed=1))
        # Every example is drawn in either place, the first ones uniformly.
        assert len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1])) == 100
        assert np.bincount(pairs[:, 0]).std() < 12
    partners = interpolation.draw_pairs(labels, 20_000, False, seed=2)
    small = partners[labels[partners[:, 0]] == 0, 1]
    assert np.bincount(small, minlength=100)[labels != 0].min() > 0


def test_pairs_that_cannot_be_drawn():
    with pytest.raises(DataError, match="different labels"):
        interpolation.draw_pairs([1, 1, 1], 4, same=False, seed=0)
    with pytest.raises(DataError, match="the same label"):
        interpolation.draw_pairs([1, 2, 3], 4, same=True, seed=0)


def test_log_likelihood_falls_between_two_modes_and_not_within_one():
    labels = np.repeat([0, 1], 200)
    codes = normal(400, 3) + 8.0 * labels[:, None]

    def log_prob(z):
        modes = [-(z - c).square().sum(1) / 2 for c in (0.0, 8.0)]
        return torch.logaddexp(*modes) - math.log(2) - 1.5 * math.log(2 * math.pi)

    curves = {}
    for same in (True, False):
        pairs = interpolation.draw_pairs(labels, 300, same, seed=0)
        curves[same] = interpolation.log_likelihood_curve(codes, pairs, log_prob, batch_size=100)
    assert curves[True].weights == interpolation.WEIGHTS
    assert curves[True].fall.mean < 0 < 10 < curves[False].fall.mean
    cross = curves[False]
    assert (cross.lower < cross.upper).all()
    ends = log_prob(torch.from_numpy(codes[pairs[:, 0]]).float()).double()
    assert cross.mean[0] == pytest.approx(float(ends.mean()), rel=1e-6)
    assert cross.standard_error[0] == pytest.approx(float(ends.std()) / math.sqrt(300), rel=1e-5)


def test_interpolated_images_begin_and_end_with_the_decoded_codes():
    def decode(z):
        return z.reshape(-1, 1, 2, 2)

    z0, z1 = torch.arange(4.0), torch.ones(4)
    images = interpolation.interpolated_images(z0, z1, decode)
    assert images.shape == (6, 1, 2, 2)
    np.testing.assert_allclose(images[0], decode(z0)[0])
    np.testing.assert_allclose(images[-1], decode(z1)[0])


# Two samples --------------------------------------------------------------------------------------------------------


def test_mmd_equals_a_naive_twin_in_any_tiles(monkeypatch):
    monkeypatch.setattr(two_sample, "TILE", 7)
    x, y, widths = normal(20, 2), normal(15, 2, shift=1, seed=1), [0.5, 2.0]

    def kernel(a, b):
        return np.mean([np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * h * h)) for h in widths], axis=0)

    within = [(kernel(v, v).sum() - len(v)) / (len(v) * (len(v) - 1)) for v in (x, y)]
    assert two_sample.mmd_squared(x, y, widths) == pytest.approx(sum(within) - 2 * kernel(x, y).mean(), rel=1e-5)


def test_mmd_of_gaussians_is_the_closed_form():
    # E k(x, y) of x ~ N(0, 1), y ~ N(m, 1) under exp(-(x - y)^2 / (2 h^2)) is h / sqrt(h^2 + 2) exp(-m^2 / (2 (h^2 + 2))).
    h, m = 1.0, 1.5
    x, y = normal(4000, 1), normal(4000, 1, shift=m, seed=1)
    expected = 2 * h / math.sqrt(h**2 + 2) * (1 - math.exp(-(m**2) / (2 * (h**2 + 2))))
    assert two_sample.mmd_squared(x, y, [h]) == pytest.approx(expected, rel=0.05)
    assert abs(two_sample.mmd_squared(x, normal(4000, 1, seed=2), [h])) < 1e-3
    with pytest.raises(DataError, match="one length"):
        two_sample.mmd_squared(x, normal(10, 2))


def test_share_in_box():
    points = np.random.default_rng(0).uniform(0, 1, size=(10_000, 2))
    share = two_sample.share_in_box(points, [0.0, 0.25], [0.5, 0.75])
    assert share.mean == pytest.approx(0.25, abs=0.02)
    assert share.standard_error == pytest.approx(math.sqrt(share.mean * (1 - share.mean) / 9999), rel=1e-6)
