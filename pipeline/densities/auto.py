"""The winner of a contest of families: one density, or a mixture of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pipeline.densities.common.density import Density, build_described, uniform
from pipeline.settings import Checked, DensitySettings, check_that

__all__ = ["Mixture", "Options", "Settings"]

FAMILIES = ("kde", "gmm", "boxes", "lde")


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of the contest.

    Attributes:
        folds: Parts of up to 2,500 training and validation codes; each is held out once, and what is fitted to the others is
            averaged. More codes are fitted as every family is: on training codes, chosen on validation codes.
        families: What takes part next to the Gaussians, among `kde`, `gmm`, `boxes` and `lde`.
    """

    folds: int = 5
    families: tuple[str, ...] = FAMILIES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.folds >= 2, "folds", "must be at least 2")
        check_that(set(self.families) <= set(FAMILIES), "families", f"must be among {', '.join(FAMILIES)}")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """A contest of families within `max_minutes`, see `pipeline.contest`; `seed` is the only other key that matters."""

    max_minutes: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.max_minutes > 0, "max_minutes", "must be positive for the family auto")


class Mixture(Density):
    r"""A mixture of densities, :math:`p(z) = \sum_m w_m \, p_m(z)`.

    Arguments:
        dim: The number of dimensions :math:`D`.
        members: What each of them is made of, as `Density.description` gives it; by default one untrained Gaussian.
        options: The fields of `Options`.

    Attributes:
        members: The densities :math:`p_m`.

    Example:
        >>> from pipeline.densities.gaussian import Gaussian
        >>> mixture = Mixture.of([Gaussian(2), Gaussian(2)], [0.25, 0.75])
        >>> mixture.log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    family = "auto"
    options_type = Options
    trained_by_gradient = False

    log_weights: Tensor

    options: Options

    def __init__(self, dim: int, members: Sequence[Mapping[str, Any]] = (), **options: Any) -> None:
        super().__init__(dim, **options)
        described = members or [{"family": "gaussian", "arguments": {"dim": dim}}]
        self._set([build_described(member) for member in described], torch.full((len(described),), 1 / len(described)))

    def _set(self, members: Sequence[Density], weights: Tensor) -> None:
        self.members = nn.ModuleList(members)
        self.register_buffer("log_weights", weights.log().to(self.shift))
        self.has_meta = all(member.has_meta for member in members)
        self.has_vmap = all(member.has_vmap for member in members)

    @classmethod
    def of(cls, members: Sequence[Density], weights: Sequence[float]) -> Mixture:
        """The mixture of densities of the same codes.

        Arguments:
            members: The densities.
            weights: Their weights, which sum to 1.
        """
        mixture = cls(members[0].dim)
        mixture.to(members[0].shift)
        mixture._set(members, torch.tensor(weights, dtype=torch.float64))
        return mixture.eval()

    def arguments(self) -> dict[str, Any]:
        """The members' descriptions."""
        members = [member.description() | {"factor": member.factor is not None} for member in self._members()]
        return {"dim": self.dim, "members": members}

    def _members(self) -> list[Density]:
        return [member for member in self.members if isinstance(member, Density)]

    @property
    def parameter_count(self) -> int:
        """Those of all members, and the weights, which sum to 1."""
        return sum(member.parameter_count for member in self._members()) + len(self.members) - 1

    def _log_prob(self, z: Tensor) -> Tensor:
        each = torch.stack([member.log_prob(z) for member in self._members()])
        return torch.logsumexp(self.log_weights[:, None] + each, dim=0)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        cumulative = self.log_weights.exp().cumsum(dim=0)
        levels = uniform((n,), self.shift, generator) * cumulative[-1]
        chosen = torch.searchsorted(cumulative, levels, right=True).clamp_(max=len(cumulative) - 1)
        z = self.shift.new_empty(n, self.dim)
        for number, member in enumerate(self._members()):
            rows = torch.nonzero(chosen == number).flatten()
            if len(rows):
                z[rows] = member.sample(len(rows), generator)
        return z

    @property
    def has_given(self) -> bool:
        """Whether all members know some dimensions given others, and no matrix mixes these before."""
        return self.factor is None and all(member.has_given for member in self._members())

    def _log_prob_given(self, z: Tensor, given: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = torch.stack([torch.stack(member._observed_and_missing(z, given)) for member in self._members()], dim=1)
        observed, missing = self.log_weights[:, None] + parts[0], parts[1]  # (M, B)
        evidence = torch.logsumexp(observed, dim=0)
        return evidence, torch.logsumexp(observed - evidence + missing, dim=0)

    def _sample_given(
        self, n: int, z: Tensor, given: Tensor, generator: Generator | None, context: Tensor | None = None
    ) -> Tensor:
        observed = torch.stack([member._observed_and_missing(z, given)[0] for member in self._members()])
        cumulative = torch.softmax(self.log_weights[:, None] + observed, dim=0).cumsum(dim=0)  # (M, B)
        levels = uniform((n, len(z)), self.shift, generator) * cumulative[-1]
        chosen = (cumulative[:, None] <= levels).sum(dim=0).clamp_(max=len(cumulative) - 1)  # (n, B)
        drawn, values = z.repeat(n, 1, 1), torch.where(given, z, torch.nan).expand(n, *z.shape)
        for number, member in enumerate(self._members()):
            drawn[chosen == number] = member.sample(1, generator, given=values[chosen == number])[0]
        return drawn


def stacked_weights(held_out: Tensor, iterations: int = 100) -> Tensor:
    r"""Weights of a mixture that make held-out codes most likely, by expectation maximisation from equal weights.

    .. math:: w_m \leftarrow \frac{1}{N} \sum_n \frac{w_m \, p_m(z_n)}{\sum_l w_l \, p_l(z_n)}

    References:
        | Linearly combining density estimators via stacking (Smyth, Wolpert, 1999)
        | https://doi.org/10.1023/A:1007511322260

    Arguments:
        held_out: Log-likelihoods of codes that the densities weren't fitted to, float64 with shape (N, M).
        iterations: Steps of expectation maximisation.

    Returns:
        The weights, with shape (M,).

    Example:
        >>> stacked_weights(torch.tensor([[0.0, -1.0], [0.0, -2.0]]), 1000)
        tensor([1., 0.])
    """
    weights = torch.full_like(held_out[0], 1 / held_out.shape[1])
    likelihood = (held_out - held_out.amax(dim=1, keepdim=True)).exp()
    for _ in range(iterations):
        joint = likelihood * weights
        weights = (joint / joint.sum(dim=1, keepdim=True)).mean(dim=0)
    return weights


Model = Mixture
