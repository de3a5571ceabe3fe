"""The base classes that `docs/extending.md` names, each tried by the smallest subclass."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.autoencoders.common.base import Objective
from pipeline.densities import Density, load_density
from pipeline.densities.common.density import build_density
from pipeline.preparation import prepare_shards
from pipeline.settings import AutoencoderSettings, DatasetSettings, DensitySettings, Params, params
from pipeline.sources.common.source import Block, Source
from pipeline.storage.shards import ShardReader
from pipeline.training.trainable import Step


@dataclass(frozen=True, kw_only=True)
class SourceSettings(DatasetSettings):
    shape = (2,)


class Constant(Source):
    kind = "vectors"
    counts = {"train": 5, "valid": 2, "test": 2}

    def read(self, split: str, start: int, stop: int) -> Block:
        return Block(examples=np.zeros((stop - start, 2), np.float32))


class Halved(Objective):
    trained = False
    latent_dim, decoder = 2, None

    def encode(self, examples: torch.Tensor) -> torch.Tensor:
        return examples / 2

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes * 2

    def open_dimensions(self, step: Step) -> int:
        return 2


class Uniform(Density):
    family = "smallest"

    def _log_prob(self, z: torch.Tensor) -> torch.Tensor:
        return torch.where((z.abs() < 1).all(1), 0.0, -torch.inf)

    def _sample(self, n: int, generator: torch.Generator | None) -> torch.Tensor:
        return torch.rand(n, self.dim, generator=generator)


@pytest.fixture
def smallest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Params]:
    """Params whose rows are made of a source, an objective and a family named `smallest`."""
    modules = {
        "sources": {"Settings": SourceSettings, "open_source": lambda settings, root: Constant()},
        "autoencoders": {"Settings": AutoencoderSettings, "build": lambda settings, shape, value_range: Halved()},
        "densities": {"Settings": DensitySettings, "Model": Uniform},
    }
    known = params.choices
    monkeypatch.setattr(params, "choices", lambda package: [*known(package), "smallest"])
    for folder, members in modules.items():
        module = types.ModuleType(f"pipeline.{folder}.smallest")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Params(
        {
            "datasets": {"d": {"source": "smallest", "root": "params.yaml"}},
            "autoencoders": {"a": {"dataset": "d", "objective": "smallest"}},
            "densities": {"p": {"codes": "a", "dataset": "d", "family": "smallest"}},
            "sampling": {},
            "evaluations": {"d": {}},
        }
    )


def test_rows_of_the_smallest_subclasses_have_no_problem(smallest: Params) -> None:
    assert list(smallest.problems()) == []


def test_the_smallest_source_is_prepared(smallest: Params, tmp_path: Path) -> None:
    prepare_shards(smallest.dataset("d"), tmp_path / "shards", processes=1)
    assert ShardReader(tmp_path / "shards").index.count("train") == 5


def test_the_smallest_density_is_saved_and_scored(smallest: Params, tmp_path: Path) -> None:
    density = build_density(smallest.density("p"), 2)
    density.standardise(torch.ones(2), torch.full((2,), 2.0))
    density.save(tmp_path / "density.safetensors")
    loaded = load_density(tmp_path / "density.safetensors")
    assert loaded.log_prob(torch.tensor([[1.0, 2.0], [9.0, 0.0]])).tolist() == pytest.approx([-2 * np.log(2), -np.inf])
    assert loaded.sample(3).shape == (3, 2)
