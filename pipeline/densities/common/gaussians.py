"""Mixtures of Gaussians over vectors of which some numbers are given, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pipeline.densities.common.adaptation import by_class
from pipeline.densities.common.density import Density, standard_normal, uniform

__all__ = ["GaussianComponents", "GaussianDensity"]


@dataclass(frozen=True)
class GaussianComponents:
    r"""A mixture :math:`\sum_k \pi_k \, \mathcal{N}(z; \mu_k, \Sigma_k)`, in float64.

    Read with the observed numbers first, the Cholesky factor of a component's covariance gives all that is asked:

    .. math:: \begin{pmatrix} z_o \\ z_u \end{pmatrix} = \mu + \begin{pmatrix} L_{oo} & 0 \\ L_{uo} & L_{uu} \end{pmatrix}
        \begin{pmatrix} w_o \\ w_u \end{pmatrix}

    where :math:`w_o` follows from the observed numbers, and :math:`w_u` is N(0, I) whatever these are.

    Arguments:
        log_weights: The logarithms of the weights :math:`\pi_k`, with shape (K,).
        means: The means :math:`\mu_k`, with shape (K, D).
        covariances: The covariances :math:`\Sigma_k`, with shape (K, D, D).

    Example:
        >>> covariances = torch.tensor([[[1.0, 0.6], [0.6, 1.0]]])
        >>> components = GaussianComponents(torch.zeros(1), torch.zeros(1, 2), covariances)
        >>> z, given = torch.tensor([[2.0, 1.2]]), torch.tensor([[True, False]])
        >>> observed, missing = components.log_prob(z, given)
        >>> missing  # log N(1.2; 0.6 * 2, 1 - 0.6^2)
        tensor([-0.6958])
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor

    def mapped(self, matrix: Tensor) -> GaussianComponents:
        """The mixture of A z, for a matrix A with shape (D, D)."""
        return GaussianComponents(self.log_weights, self.means @ matrix.T, matrix @ self.covariances @ matrix.T)

    def _patterns(self, z: Tensor, given: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
        """Rows that are given the same numbers, one pattern after another.

        Yields:
            Their row numbers (b,); the order of the numbers, observed first (D,); the Cholesky factors (K, D, D) and the
            whitened numbers (K, b, D) in this order; and how many are observed.
        """
        patterns, members, counts = given.unique(dim=0, return_inverse=True, return_counts=True)
        for pattern, rows in zip(patterns, members.argsort(stable=True).split(counts.tolist()), strict=True):
            order = (~pattern).long().argsort(stable=True)
            factors: Tensor = torch.linalg.cholesky(self.covariances[:, order[:, None], order])
            offsets = z[rows][:, order] - self.means[:, None, order]
            white = torch.linalg.solve_triangular(factors.mT, offsets, upper=True, left=False)
            yield rows, order, factors, white, int(pattern.sum())

    def _log_joint(self, factors: Tensor, white: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Logs (K, b) of weight times density of the observed numbers, and of the density of the others given these."""
        log_scales = factors.diagonal(dim1=1, dim2=2).log()[:, None]
        terms = -0.5 * white.square() - log_scales - 0.5 * math.log(2 * math.pi)  # (K, b, D)
        return self.log_weights[:, None] + terms[..., :count].sum(dim=-1), terms[..., count:].sum(dim=-1)

    def log_prob(self, z: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities of the observed numbers, and of the missing ones given these, in nats.

        Arguments:
            z: The vectors, with shape (B, D).
            given: Which of their numbers are observed, booleans with shape (B, D).

        Returns:
            Two tensors with shape (B,).
        """
        wide = z.to(self.means)
        results, places = list[Tensor](), list[Tensor]()
        for rows, _, factors, white, count in self._patterns(wide, given):
            observed, missing = self._log_joint(factors, white, count)
            evidence = torch.logsumexp(observed, dim=0)
            results.append(torch.stack([evidence, torch.logsumexp(observed - evidence + missing, dim=0)]))
            places.append(rows)
        if not results:
            return z.new_zeros(0), z.new_zeros(0)
        observed, missing = torch.cat(results, dim=1)[:, torch.cat(places).argsort()].to(z)
        return observed, missing

    def sample(self, n: int, z: Tensor, given: Tensor, generator: Generator | None) -> Tensor:
        """Draws of the missing numbers.

        Arguments:
            n: Draws of each vector.
            z: The vectors, with shape (B, D); any finite number may be where one is missing.
            given: Which of their numbers are observed, booleans with shape (B, D).
            generator: Source of randomness.

        Returns:
            The completed vectors, with shape (n, B, D).
        """
        wide = z.to(self.means)
        levels = uniform((n, len(z)), wide, generator)
        normals = standard_normal((n, *z.shape), wide, generator)
        drawn = torch.empty_like(normals)
        for rows, order, factors, white, count in self._patterns(wide, given):
            observed, _ = self._log_joint(factors, white, count)
            cumulative = torch.softmax(observed, dim=0).cumsum(dim=0).T.contiguous()  # (b, K)
            place = (levels[:, rows] * cumulative[:, -1]).T.contiguous()  # (b, n)
            chosen = torch.searchsorted(cumulative, place, right=True).clamp_(max=len(self.means) - 1).T  # (n, b)
            latent = normals[:, rows]  # (n, b, D)
            latent[..., :count] = white[chosen, torch.arange(len(rows), device=chosen.device), :count]
            completed = torch.empty_like(latent)
            for k in chosen.unique().tolist():
                members = chosen == k
                completed[members] = self.means[k, order] + latent[members] @ factors[k].T
            drawn[:, rows[:, None], order] = completed
        return torch.where(given, z, drawn.to(z))


class GaussianDensity(Density):
    """A density that is a mixture of Gaussians, or one for each class, and so knows some dimensions given others exactly."""

    def _components(self, c: int | None = None) -> GaussianComponents:
        """The mixture of codes standardised by shift and scale alone; of a class if there are several."""
        raise NotImplementedError

    @property
    def has_given(self) -> bool:
        """True: in closed form."""
        return True

    def _log_prob_given(self, z: Tensor, given: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if context is None or self.context is None:
            return self._components().log_prob(z, given)

        def of_class(c: int, rows: Tensor) -> Tensor:
            values, mask = rows.chunk(2, dim=1)
            return torch.stack(self._components(c).log_prob(values, mask.bool()), dim=1)

        classes = self.context.classes(context)
        observed, missing = by_class(classes, torch.cat([z, given.to(z)], dim=1), of_class).unbind(dim=1)
        return observed, missing

    def _sample_given(
        self, n: int, z: Tensor, given: Tensor, generator: Generator | None, context: Tensor | None = None
    ) -> Tensor:
        if context is None or self.context is None:
            return self._components().sample(n, z, given, generator)

        def of_class(c: int, rows: Tensor) -> Tensor:
            values, mask = rows.chunk(2, dim=1)
            return self._components(c).sample(n, values, mask.bool(), generator).transpose(0, 1)

        classes = self.context.classes(context)
        return by_class(classes, torch.cat([z, given.to(z)], dim=1), of_class).transpose(0, 1)
