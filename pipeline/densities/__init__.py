"""Densities of latent codes under one protocol; a family is a file with `Options`, `Settings` and `Model`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.densities.common.density import Density, load_density
    from pipeline.densities.lde import LatentDensityEstimator

__all__ = ["Density", "LatentDensityEstimator", "load_density"]

_HOMES = {"Density": "common.density", "LatentDensityEstimator": "lde", "load_density": "common.density"}


def __getattr__(name: str) -> Any:
    # Late, since importing torch takes seconds and settings are read without it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
