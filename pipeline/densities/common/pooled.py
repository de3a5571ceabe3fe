"""Expectation maximisation of a mixture of Gaussians whose covariances are shrunk to their mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.mixture import GaussianMixture
from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

__all__ = ["PooledMixture"]


class PooledMixture(GaussianMixture):
    r"""Full covariances that are shrunk to their mean: as if that were the one of :math:`r` more codes of each Gaussian.

    .. math:: \Sigma_k = \frac{n_k S_k + r \, \Sigma}{n_k + r}, \qquad \Sigma = \frac{1}{N} \sum_k n_k S_k

    with the scatter :math:`S_k` of its codes, to which the ridge is added as everywhere. Between `full` (r = 0) and `tied`
    (r infinite): where codes are few, Gaussians differ in shape only as far as their codes can tell.

    References:
        | Regularized discriminant analysis (Friedman, 1989)
        | https://doi.org/10.1080/01621459.1989.10478752
        | Bayesian regularization for normal mixture estimation and model-based clustering (Fraley, Raftery, 2007)
        | https://doi.org/10.1007/s00357-007-0004-5

    Attributes:
        pooled_codes: The number r, which isn't an argument, since scikit-learn's estimators copy all of theirs.
    """

    pooled_codes = 1.0

    def _initialize(self, X: np.ndarray, resp: np.ndarray, **others: Any) -> None:
        super()._initialize(X, resp, **others)
        self._pool(len(X))

    def _m_step(self, X: np.ndarray, log_resp: np.ndarray, **others: Any) -> None:
        super()._m_step(X, log_resp, **others)
        self._pool(len(X))

    def _pool(self, total: int) -> None:
        counts = self.weights_[:, None, None] * total
        own: np.ndarray = self.covariances_
        pooled = (counts * own).sum(axis=0) / total
        self.covariances_: np.ndarray = (counts * own + self.pooled_codes * pooled) / (counts + self.pooled_codes)
        self.precisions_cholesky_ = _compute_precision_cholesky(self.covariances_, "full")
