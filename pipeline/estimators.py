"""Densities of tables in Python, without params.yaml: an estimator that follows scikit-learn's conventions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from pipeline.densities.auto import Mixture
from pipeline.densities.common.density import load_density
from pipeline.errors import DataError, SettingsError
from pipeline.fitting import fit_density
from pipeline.settings import build, implementation
from pipeline.storage.codes import ArrayCodes
from pipeline.system.ranks import Ranks
from pipeline.system.streams import stream, stream_seed

__all__ = ["CodeDensity"]

VALID_SHARE = 0.1  # of the rows, held out for choices


class CodeDensity(DensityMixin, BaseEstimator):
    r"""The density of the rows of a table, as an estimator of scikit-learn.

    Columns are standardised in float64. A random tenth of the rows is held out for choices. With up to 2,500 rows, the family
    `auto` holds out each row once.

    Arguments:
        family: A family of `pipeline/densities`; `auto` chooses the best.
        minutes: Time for the fit, at most.
        seed: Seed of all randomness.
        settings: More settings of the family, as a row of params.yaml has them.
        verbose: Whether `auto` prints each new best.

    Attributes:
        density_: The fitted density, in the units of X, float64.
        contest_: For `auto`, one row per contestant, best first: family, held-out log-likelihood in nats in the units of X and
            its standard error, seconds, weight in the result.
        held_out_score_: Mean log-likelihood of held-out rows, in nats; NaN if the family has none.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(200, 2)) * [1.0, 1000.0]
        >>> density = CodeDensity(family="gaussian").fit(X)
        >>> density.score_samples(X[:3]).shape, density.sample(5).shape
        ((3,), (5, 2))
    """

    density_: Mixture
    contest_: list[dict[str, float | str]]
    held_out_score_: float
    n_features_in_: int

    def __init__(
        self,
        family: str = "auto",
        minutes: float = 1.0,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ) -> None:
        self.family = family
        self.minutes = minutes
        self.seed = seed
        self.settings = settings
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Fits the density.

        Arguments:
            X: The rows, with shape (N, D); N must be at least 3, one of them to hold out.
            y: Ignored.

        Raises:
            ValueError: When X isn't a table of finite numbers, or a column doesn't vary.
            SettingsError: For unknown or impossible settings.
        """
        rows = validate_data(self, X, dtype=np.float64, ensure_min_samples=3)
        row = {"codes": "rows", "dataset": "rows", "family": self.family, "seed": self.seed, "max_minutes": self.minutes}
        row |= dict(self.settings or {})
        row = {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()}  # of a grid search
        module = implementation("pipeline.densities", str(self.family), "family")
        settings = build(module.Settings, row, f"CodeDensity({self.family!r})")
        if settings.context:
            raise SettingsError(f"CodeDensity({self.family!r}).context: only rows of params.yaml have a context; leave it out")
        mean, std = rows.mean(axis=0), rows.std(axis=0)
        constant = np.flatnonzero(~(std > 1e-12 * np.abs(mean)))
        if len(constant):
            raise ValueError(
                f"columns {', '.join(map(str, constant))} (counted from 0) don't vary, so there is no density; drop them"
            )
        codes = ((rows - mean) / std).astype(np.float32)[stream("validation rows", self.seed).permutation(len(rows))]
        held_out = max(1, round(VALID_SHARE * len(codes)))
        ranks = Ranks(0, 1, torch.device("cpu"))
        try:
            density, training = fit_density(
                settings,
                ArrayCodes(codes[held_out:], codes[:held_out]),
                ranks,
                f"fitting {self.family}",
                quiet=not self.verbose,
            )
        except DataError as error:
            raise ValueError(str(error)) from error
        mixture = density if isinstance(density, Mixture) else Mixture.of([density], [1.0])
        mixture.double().standardise(torch.from_numpy(mean), torch.from_numpy(std))
        log_det = float(np.log(std).sum())  # of the standardisation
        key = "valid_log_likelihood"
        self.density_, self.held_out_score_ = mixture, training.best.get(key, np.nan) - log_det
        self.contest_ = [contestant | {key: float(contestant[key]) - log_det} for contestant in training.contest]
        return self

    def score_samples(self, X: ArrayLike, *, given: ArrayLike | None = None) -> np.ndarray:
        """Log-likelihood of each row, in nats in the units of X, with shape (N,).

        Arguments:
            X: The rows, with shape (N, D).
            given: Which values are observed, booleans with shape (D,) or (N, D); then it is the likelihood of the others.
        """
        check_is_fitted(self, "density_")
        rows = torch.from_numpy(np.ascontiguousarray(validate_data(self, X, dtype=np.float64, reset=False)))
        with torch.no_grad():
            mask = None if given is None else torch.from_numpy(_booleans(given))
            values: np.ndarray = self.density_.log_prob(rows, given=mask).numpy()
        return values

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Mean log-likelihood of the rows, in nats: the sum over rows divided by N, comparable across sizes."""
        return float(self.score_samples(X).mean())

    def sample(self, n: int = 1, seed: int | None = None, *, given: ArrayLike | None = None) -> np.ndarray:
        """New rows, with shape (n, D), or completed ones, with shape (n, N, D).

        Arguments:
            n: How many, of each row that is given.
            seed: Seed of the draw; by default the estimator's.
            given: Rows to complete, with shape (N, D), NaN where a value is missing.
        """
        check_is_fitted(self, "density_")
        if isinstance(n, bool) or not isinstance(n, Integral) or n < 0:
            raise ValueError(f"n must be a whole number, at least 0, not {n!r}")
        values = None
        if given is not None:
            rows = validate_data(self, given, dtype=np.float64, reset=False, ensure_all_finite="allow-nan")
            values = torch.from_numpy(np.ascontiguousarray(rows))
        generator = torch.Generator().manual_seed(stream_seed("samples", self.seed if seed is None else seed))
        return self.density_.sample(int(n), generator, given=values).numpy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the density to a safetensors file, which `load` and `pipeline.densities.load_density` read."""
        check_is_fitted(self, "density_")
        self.density_.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote, or the file of any other density with a likelihood.

        Raises:
            DataError: When the file is missing, damaged, or no density.
        """
        density = load_density(path)
        if not density.has_log_prob:
            raise DataError(f"{path} holds a density of the family '{density.family}', which has no likelihood")
        estimator = cls(family=density.family)
        mixture = density if isinstance(density, Mixture) else Mixture.of([density], [1.0])
        estimator.density_, estimator.contest_, estimator.held_out_score_ = mixture.double(), [], np.nan
        estimator.n_features_in_ = density.dim
        return estimator


def _booleans(given: ArrayLike) -> np.ndarray:
    mask = np.array(given)
    if mask.dtype != bool:
        raise ValueError(f"given must be booleans with shape (D,) or (N, D), not {mask.dtype}: True where a value is observed")
    return mask
