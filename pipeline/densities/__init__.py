"""Densities of latent codes under one protocol; a family is a module with `Settings`, `build` and `Model`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.densities.common.density import Density, load_density
    from pipeline.densities.lde import LatentDensityEstimator

__all__ = ["ALIASES", "Density", "LatentDensityEstimator", "load_density"]

# Families that share a module; every other family has the module of its own name.
ALIASES = {"maf": "flows", "naf": "flows", "nsf": "flows", "realnvp": "flows"}

_HOMES = {"Density": "density", "LatentDensityEstimator": "lde", "load_density": "density"}


def __getattr__(name: str) -> Any:
    # Late, since importing torch takes seconds and settings are read without it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
