"""Random streams: no two coincide."""

from __future__ import annotations

import ast
import itertools
import typing
from pathlib import Path

import pytest

from pipeline.sources.common.source import generator
from pipeline.system.streams import Purpose, stream, stream_seed

PURPOSES = typing.get_args(Purpose)
PLACES = [(), (0,), (1,), (0, 0), (1, 0), (0, 1), (3,), (3, 0), (2**32,), (1, 2**32 + 1)]


def test_all_named_streams_differ_pairwise() -> None:
    streams = {
        (purpose, seed, place): tuple(stream(purpose, seed, *place).integers(2**63, size=2).tolist())
        for purpose, seed, place in itertools.product(PURPOSES, (0, 1, 3, 2**32), PLACES)
    }
    seeds = [stream_seed(*key[:2], *key[2]) for key in streams]
    assert len(set(streams.values())) == len(set(seeds)) == len(streams)
    assert all(0 <= seed < 2**63 for seed in seeds)
    of_sources = (generator(seed, name) for seed in (0, 1) for name in ("digits", "grid"))
    drawn = [tuple(source.integers(2**63, size=2).tolist()) for source in of_sources]
    assert not set(drawn) & set(streams.values())


def test_a_stream_is_always_the_same() -> None:
    assert stream("samples", 3, 1).random() == stream("samples", 3, 1).random()
    assert stream_seed("samples", 3, 1) == 3129178303635184843
    assert stream_seed("control centroids", 3, bits=32) < 2**32


def test_an_unknown_purpose_is_refused() -> None:
    with pytest.raises(ValueError, match="no purpose of a random stream: 'noise'"):
        stream("noise", 0)  # type: ignore[arg-type]


SEEDED = {"default_rng", "SeedSequence", "manual_seed", "RandomState"}
ELSEWHERE = {
    "pipeline/system/streams.py",
    "pipeline/sources/common/source.py",  # tagged by source and split; which rows a split holds stays as it is
    "pipeline/densities/common/orders.py",  # the seed is the name of an order
    "pipeline/densities/common/density.py",  # given a seed of a stream
    "pipeline/sources/tabular.py",  # published rows are of the authors' seed
}


def test_nothing_seeds_a_generator_by_itself() -> None:
    root = Path(__file__).resolve().parents[1]
    for path in sorted((root / "pipeline").rglob("*.py")):
        name = str(path.relative_to(root))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SEEDED:
                derived = any("stream_seed" in ast.unparse(argument) for argument in node.args)
                derived |= name in ("pipeline/training/loop.py", "pipeline/autoencoders/aae.py")  # of a seed from a stream
                assert name in ELSEWHERE or derived, f"{name}:{node.lineno} {ast.unparse(node)}"
