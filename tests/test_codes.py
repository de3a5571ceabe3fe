"""Codes on disk: round trip, moments, streaming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.storage.codes import CodeIndex, CodeReader, write_part
from pipeline.storage.columns import VectorMoments
from pipeline.storage.parts import write_index


def write(folder: Path, counts: dict[str, list[int]], dim: int = 3, labels: bool = True) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    codes, parts = {}, {}
    moments = VectorMoments(dim)
    for split, sizes in counts.items():
        codes[split] = generator.normal(5, 2, (sum(sizes), dim)).astype(np.float32)
        pieces = np.split(codes[split], np.cumsum(sizes)[:-1])
        parts[split] = tuple(
            write_part(folder, split, i, piece, np.arange(len(piece)) if labels else None) for i, piece in enumerate(pieces)
        )
        if split == "train":
            moments.update(codes[split])
    write_index(folder, CodeIndex(dim=dim, mean=tuple(moments.mean), std=tuple(moments.std), source_digest="", **parts))
    return codes


@pytest.mark.parametrize("labels", [True, False])
def test_round_trip(tmp_path: Path, labels: bool) -> None:
    codes = write(tmp_path, {"train": [5, 4], "valid": [2], "test": [1, 1, 1]}, labels=labels)
    reader = CodeReader(tmp_path)
    assert {split: reader.counts(split) for split in codes} == {"train": [5, 4], "valid": [2], "test": [1, 1, 1]}
    for split, expected in codes.items():
        stream = reader.stream(split)
        for _ in range(2):
            assert np.array_equal(np.concatenate(list(stream())), expected)
    assert ("labels" in reader.load("train", 0)) == labels
    assert reader.decoder_path is None
    assert reader.index == CodeReader(tmp_path).index


@pytest.mark.parametrize("limit", [1, 5, 6, 9, 100])
def test_a_limit_cuts_the_stream(tmp_path: Path, limit: int) -> None:
    codes = write(tmp_path, {"train": [5, 4], "valid": [2], "test": [1]})
    blocks = list(CodeReader(tmp_path).blocks("train", limit))
    assert np.array_equal(np.concatenate([b["codes"] for b in blocks]), codes["train"][:limit])
    assert all(len(b["labels"]) == len(b["codes"]) for b in blocks)


def test_same_codes_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"train": [5, 4], "valid": [2], "test": [1]})
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert CodeReader(tmp_path / "a").index.digest == CodeReader(tmp_path / "b").index.digest


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(-1e4, 1e4))
def test_moments_of_a_stream_are_those_of_the_whole(sizes: list[int], shift: float) -> None:
    whole = np.random.default_rng(1).normal(shift, 3, (sum(sizes), 2))
    moments = VectorMoments(2)
    for piece in np.split(whole, np.cumsum(sizes)[:-1]):
        moments.update(piece)
    if len(whole):
        assert np.allclose(moments.mean, whole.mean(0), rtol=1e-12, atol=1e-12)
        assert np.allclose(moments.std, whole.std(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_codes_that_arent_finite_are_never_written(tmp_path: Path, value: float) -> None:
    codes = np.zeros((3, 2), np.float32)
    codes[1, 1] = value
    with pytest.raises(DataError, match="finite"):
        write_part(tmp_path, "train", 0, codes, None)
    assert not list(tmp_path.iterdir())
