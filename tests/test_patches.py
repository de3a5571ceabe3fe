"""The preprocessing of BSDS300: grey levels, positions, noise, mean, order, and the way back."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.sources.common.patches import PatchPool, dequantise, preprocess, restore, to_grey


def test_grey_rounds_to_integers() -> None:
    # 0.299 * 10 + 0.587 * 20 + 0.114 * 30 = 18.15; 0.299 * 2 + 0.587 * 1 + 0.114 * 1 = 1.299; 0.587 * 50 = 29.35
    pixels = np.array([[[10, 20, 30], [2, 1, 1], [0, 50, 0]]], np.uint8)
    assert to_grey(pixels).tolist() == [[18, 1, 29]]
    # Exactly a half: 0.299 * 250 + 0.587 * 250 + 0.114 * 0 = 221.5 goes up.
    assert to_grey(np.array([[[250, 250, 0]]], np.uint8)).tolist() == [[222]]


def test_grey_of_grey_is_itself() -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_grey(np.stack([levels] * 3, axis=-1)[None]), levels[None])


def test_hand_computed_patch() -> None:
    # 63 pixels of level 10 and one, the second of the first row, of level 74; noise 0.5 everywhere.
    # Values 10.5 / 256 and 74.5 / 256; their mean is (63 * 10.5 + 74.5) / 64 / 256 = 11.5 / 256.
    patch = np.full((1, 8, 8), 10, np.uint8)
    patch[0, 0, 1] = 74
    vector = dequantise(patch, np.full((1, 8, 8), 0.5))
    assert vector.shape == (1, 63)
    assert vector.dtype == np.float32
    expected = np.full(63, -1 / 256, np.float32)
    expected[1] = 63 / 256
    np.testing.assert_allclose(vector[0], expected, rtol=1e-6)


def test_last_pixel_is_dropped_and_restored() -> None:
    patch = np.zeros((1, 8, 8), np.uint8)
    patch[0, 7, 7] = 64  # mean 1
    vector = dequantise(patch, np.zeros((1, 8, 8)))
    np.testing.assert_allclose(vector, np.full((1, 63), -1 / 256), rtol=1e-6)
    restored = restore(vector)
    np.testing.assert_allclose(restored[0, 7, 7], 63 / 256, rtol=1e-5)
    np.testing.assert_allclose(restored[0, :7], -1 / 256, rtol=1e-6)


def test_restore_is_the_inverse_up_to_the_mean() -> None:
    random = np.random.default_rng(0)
    patches = random.integers(0, 256, (50, 8, 8)).astype(np.uint8)
    noise = random.random((50, 8, 8))
    values = (patches + noise) / 256
    np.testing.assert_allclose(
        restore(dequantise(patches, noise).astype(np.float64)), values - values.mean((1, 2), keepdims=True), atol=1e-5
    )


def test_noise_is_uniform() -> None:
    vectors = preprocess(np.full((20_000, 8, 8), 7, np.uint8), np.random.default_rng(0))
    # (u_i - mean u) / 256 has variance (1 / 12) * (63 / 64) / 256^2.
    assert vectors.var() * 256**2 == pytest.approx(63 / 64 / 12, rel=0.01)
    assert abs(vectors.mean()) < 1e-5


def test_extract_equals_slices_of_images_of_any_size() -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, shape).astype(np.uint8) for shape in [(8, 8), (9, 30), (40, 11)]]
    pool = PatchPool(images, ["a", "b", "c"])
    members, tops, lefts = np.array([2, 0, 1, 2]), np.array([32, 0, 1, 5]), np.array([3, 0, 22, 0])
    patches = pool.extract(members, tops, lefts)
    for patch, m, top, left in zip(patches, members, tops, lefts, strict=True):
        assert np.array_equal(patch, images[m][top : top + 8, left : left + 8])


def test_positions_are_uniform_and_reach_every_edge() -> None:
    image = np.arange(100, dtype=np.uint8).reshape(10, 10)
    patches = PatchPool([image], ["ramp"]).draw(np.zeros(9000, np.int64), np.random.default_rng(0))
    corners, counts = np.unique(patches[:, 0, 0], return_counts=True)
    assert corners.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000))


def test_small_image_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"tiny\.jpg: 7x20"):
        PatchPool([np.zeros((7, 20), np.uint8)], ["tiny.jpg"])
