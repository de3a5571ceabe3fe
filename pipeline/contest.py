"""The contest of families on the same codes, cheapest first, that the family `auto` runs.

1. A Gaussian behind each map of the columns: none, `power`, `quantile`, `asinh`; of few codes a shrunk one as well.
2. Kernel density estimates behind none and behind the best map, of kernels with the shape of the covariance and without.
3. More than 2,500 codes of up to 3 dimensions: boxes, without a map; a few steps say whether they are far behind.
4. Mixtures of K Gaussians behind each map, of five kinds of covariances. K grows, in larger steps while that clearly gains,
   and by what was passed over where it no longer does; then the ridge or the pooled codes follow, until held-out codes become
   less likely for several K. Heats of two and three Gaussians come first, since a few often do without a map that one needs;
   maps that are far behind in them come last, but for none up to 3 dimensions, where heats go on to 20 Gaussians: maps bend
   shapes, which few of them can't tell. Where there is too little time for heats, the map that suits one Gaussian goes on. Then
   the lane with the best score so far continues, before new ones.
5. Up to 2,500 codes, all other mixtures, the smallest first: many different fits together beat the best one. Mixtures get half
   of the time, or more while they clearly gain.
6. Latent density estimators behind the best map, in random orders of the dimensions, a small network and a larger one. Up to 3
   dimensions there are two larger ones, with and without the map.

Up to 2,500 codes are split into folds: each contestant is fitted once for each fold, to the other folds, and is the average of
these fits, unless the first of them fall far behind. Its score is the mean log-likelihood of all codes, each under the fit that
hasn't seen it. Of more codes validation codes are held out, and there is one fit: of networks to all training codes, of
Gaussians and mixtures to 30,000 of them.

The result is the mixture of contestants that makes held-out codes most likely (stacking), if it beats the best single one by
more than a standard error of paired differences; else the contestant with the fewest parameters within one such error of the
best. A mixture is scored by weights that were chosen on other held-out codes.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pipeline.densities import Density
from pipeline.densities.auto import Mixture, Settings, stacked_weights
from pipeline.densities.common.density import random_subset
from pipeline.densities.common.transforms import Transform, build_transform
from pipeline.errors import DataError, TrainingError
from pipeline.evaluation.moments import Mean, mean_and_error
from pipeline.settings import DensitySettings, build, implementation
from pipeline.storage.codes import ArrayCodes, CodeReader
from pipeline.storage.parts import Part
from pipeline.system.streams import stream

__all__ = ["Contest", "Contestant", "hold_contest"]

_Mapped = tuple[Transform | None, CodeReader]
Fit = Callable[[DensitySettings, CodeReader, str], Density]

FOLDED_CODES = 2_500  # training and validation codes that are split into folds, at most
HELD_OUT = 10_000  # validation codes of larger sets that contestants are scored on, at most
MIXTURE_CODES = 30_000  # training codes of larger sets that mixtures of Gaussians are fitted to, at most
TRANSFORMS = ("none", "power", "quantile", "asinh")
SAME = 0.02  # nats by which the Gaussians of two maps differ for a code, where the maps count as one
FULL_DIM = 256  # dimensions up to which mixtures with full covariances take part: all contestants are in memory
COMPONENTS = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128, 200, 320)
RIDGES = (1e-6, 1e-3, 1e-2, 1e-1, 0.4)
FINE_RIDGE = 1e-4  # between the first two, where codes are shapes
POOLED_CODES = (3, 10, 30, 100, 300)
# Kinds of covariances, in the order in which they are tried; each with its settings from the least regularised on.
COVARIANCES: dict[str, list[dict[str, Any]]] = {
    "pooled": [{"pooled_codes": codes, "ridge": [1e-4]} for codes in POOLED_CODES],
    "full": [{"ridge": [ridge]} for ridge in RIDGES],
    "tied": [{"covariance": "tied", "ridge": [ridge]} for ridge in RIDGES],
    "pooled, with a ridge": [{"pooled_codes": codes, "ridge": [5e-2]} for codes in POOLED_CODES],
    "diagonal": [{"covariance": "diagonal", "ridge": [ridge]} for ridge in RIDGES],
}
RACED = 20  # held-out codes from which a contestant can be told to be far behind
FAR = 4  # standard errors of paired differences by which a contestant is far behind
CLEAR = 2  # .. and by which one clearly gains, so that some numbers of Gaussians are passed over
STEEP = 0.5  # share of the gain before that one must have for that; else the best number is near, and larger ones take long
FRUITLESS = 4  # numbers of components without a gain after which a lane ends; one that clearly loses counts as two
HEATS, HEATS_OF_SHAPES = 2, 6  # numbers of Gaussians behind each map before the best goes on
HEAT_SHARE = 0.1  # of the time that these may take behind a map, for other maps to have theirs
SHRUNK = 10  # codes for each dimension up to which a shrunk Gaussian takes part
KERNEL_SHARE = 0.02  # of the time, for the kernels behind one map
TRIAL = {"train": 2_000, "valid": 500}  # codes of a set without folds on which kernels are tried before all
MIXTURE_SHARE = 0.5  # of the time, for mixtures of Gaussians
MIXTURE_SHARE_OF_SHAPES = 0.65  # which they follow better than a network does in as much time
REFINING_SHARE = 0.1  # of the time that must be left to try other ridges for the best number of Gaussians
MIXTURE_SHARE_ALONE = 0.9  # where no networks follow
NETWORK_CODES = 100  # training codes from which networks are tried
NETWORK_SHARE = 0.85  # of a network's time, for its training
NETWORKS = ((32, 10), (128, 30))  # width, Gaussians of a conditional
NETWORK_STEPS = 1_000  # that a network must have time for, where a larger one is to follow
LEAST_STEPS = 400  # that the smallest network must have time for, next to mixtures
OPERATIONS = 1e10  # of floating point in a second of training, about
NETWORK_EPOCHS = 10_000  # which the clock or the patience always end
PLANE_DIM = 3  # dimensions up to which codes are shapes: one larger network without a map, since maps bend edges, and one with
BOX_TRIAL, BOX_SHARE = 200, 0.25  # steps that say whether boxes are far behind; share of the time for all of their steps
SEPARATE_DIM, SEPARATE_NUMBERS = 64, 1_000_000  # dimensions, and codes times dimensions, up to which each has its network
PARTS = 5  # of held-out codes, each scored by weights that were chosen on the others
LEAST_WEIGHT = 0.003


@dataclass
class Contestant:
    """A family with its settings, fitted to all folds.

    Attributes:
        name: Transform, family and size, as shown to the user.
        densities: The fits, one for each fold.
        held_out: Log-likelihoods (N,) in nats of the codes held out, fold after fold.
        seconds: Time taken.
        weight: Weight in the result.
    """

    name: str
    densities: list[Density]
    held_out: np.ndarray
    seconds: float
    weight: float = 0.0

    @property
    def score(self) -> Mean:
        """Mean log-likelihood of held-out codes, in nats."""
        return mean_and_error(self.held_out)

    @property
    def parameters(self) -> int:
        """Free parameters of all fits."""
        return sum(density.parameter_count for density in self.densities)


@dataclass
class _Lane:
    """Mixtures of more and more Gaussians with one map of the columns and one kind of covariance."""

    transform: str
    covariance: str
    best: Contestant
    behind: bool = False  # whether this map is far behind others with few Gaussians
    components: int = 1  # index of the next in COMPONENTS: one Gaussian is the start
    reached: int = 0  # index in COMPONENTS of the best so far
    strength: int = 0  # index of the best so far in COVARIANCES[covariance]
    fruitless: int = 0
    climbing: bool = False  # whether the last number of Gaussians clearly gained
    gained: float = 0.0  # by it, in nats
    pace: float = 0.0  # seconds of the last fit for each of its Gaussians
    tried: set[tuple[int, int]] = field(default_factory=set)  # indices in COMPONENTS and of the strength

    @property
    def score(self) -> float:
        """Score of the best so far."""
        return self.best.score.mean

    @property
    def passed_over(self) -> list[int]:
        """Numbers of components next to the best so far that larger steps left out."""
        tried = {components for components, _ in self.tried}
        return [
            number for number in (self.reached - 1, self.reached + 1) if 0 < number < self.components and number not in tried
        ]

    @property
    def promise(self) -> tuple[bool, bool, bool, int, float]:
        """What goes on first: lanes that gain, then new ones, each kind behind all maps but those that are far behind."""
        new = not self.tried
        kind = -list(COVARIANCES).index(self.covariance) if new else 0
        return not self.behind, self.fruitless == 0, not new, kind, self.score


@dataclass
class Contest:
    """Result of a contest.

    Attributes:
        contestants: In the order of their fits.
        score: Mean log-likelihood of held-out codes under the result.
        seconds: Time taken.
        ended_by: `epochs` when all lanes came to an end, or `max_minutes`.
    """

    contestants: list[Contestant] = field(default_factory=list)
    score: Mean = field(default_factory=lambda: Mean(math.nan, math.nan, 0))
    seconds: float = 0.0
    ended_by: str = "epochs"

    def without_densities(self) -> Contest:
        """The same in plain types, as processes exchange it."""
        return replace(self, contestants=[replace(contestant, densities=[]) for contestant in self.contestants])

    def table(self) -> list[dict[str, float | str]]:
        """Rows of the contest, best first: family, score and its standard error in nats, seconds, weight in the result."""
        return [
            {
                "family": contestant.name,
                "valid_log_likelihood": contestant.score.mean,
                "standard_error": contestant.score.standard_error,
                "seconds": round(contestant.seconds, 3),
                "weight": contestant.weight,
            }
            for contestant in sorted(self.contestants, key=lambda contestant: -contestant.score.mean)
        ]


def hold_contest(settings: Settings, codes: CodeReader, fit: Fit, label: str, quiet: bool = False) -> tuple[Mixture, Contest]:
    """Runs the contest.

    Arguments:
        settings: A row of `densities` with the family `auto`.
        codes: The codes.
        fit: Fits the density that a row describes to codes; the last argument is its name in progress messages.
        label: Prefix of progress messages.
        quiet: Whether to print nothing.

    Raises:
        DataError: When no contestant can be fitted.
    """
    return _Judge(settings, codes, fit, label, quiet).result()


class _Judge:
    def __init__(self, settings: Settings, codes: CodeReader, fit: Fit, label: str, quiet: bool) -> None:
        self.settings, self.fit, self.label, self.quiet = settings, fit, label, quiet
        self.started, self.limit = time.monotonic(), settings.max_minutes * 60
        self.dim, self.log_volume = codes.index.dim, codes.index.log_volume
        self.folds = _folds(codes, settings.folds, settings.seed)
        # Networks read all training codes.
        self.network_folds = self.folds if len(self.folds) > 1 else [_AllTraining(codes, self.folds[0].load("valid", 0))]
        self.held_out = [fold.load("valid", 0)["codes"] for fold in self.folds]
        # A fit alone decides at once what to leave out; in folds it has its turn in the end, and the mixture gains by it.
        self.alone = len(self.folds) == 1
        self.shapes = self.dim <= PLANE_DIM and self.alone
        self.covariances = {kind: _with_fine_ridge(values) if self.shapes else values for kind, values in COVARIANCES.items()}
        self.mixtures = "gmm" in settings.families
        self.networks = "lde" in settings.families and self._in_time_for_networks()
        beside_networks = MIXTURE_SHARE_OF_SHAPES if self.shapes else MIXTURE_SHARE
        self.mixture_share = (beside_networks if self.networks else MIXTURE_SHARE_ALONE) if self.mixtures else 0.0
        self.mapped = dict[str, list[_Mapped]]()
        self.contest = Contest()
        self.best = -math.inf
        self.failure = ""

    def _spent(self) -> float:
        """Share of the time used."""
        return (time.monotonic() - self.started) / self.limit

    def _in_time_for_networks(self) -> bool:
        """Whether there are codes for networks, and next to mixtures time for a few hundred steps of the smallest."""
        count = self.network_folds[0].index.count("train")
        seconds = (1 - MIXTURE_SHARE) * self.limit / len(self.folds)
        steps = _steps(self.dim, _network(self.dim, count, *NETWORKS[0]), seconds)
        return count >= NETWORK_CODES and (steps >= LEAST_STEPS or not self.mixtures)

    def _behind(self, kind: str) -> list[_Mapped]:
        """The folds behind a map of the columns, which is fitted to each once for all mixtures."""
        if kind not in self.mapped:
            self.mapped[kind] = [_mapped(kind, fold) for fold in self.folds]
        return self.mapped[kind]

    def _enter(
        self, name: str, family: str, transform: str, rival: Contestant | None = None, **values: Any
    ) -> Contestant | None:
        """Fits a contestant to all folds; None if that fails, or if after some folds it is far behind a rival."""
        started = time.monotonic()
        densities, scores = list[Density](), list[np.ndarray]()
        for number, codes in enumerate(self.held_out):
            try:
                if family == "lde":
                    order = {"order": 1 + self.settings.seed + number} if self.dim > 1 else {}
                    fold = self.network_folds[number]
                    density = self._fit(name, family, fold, transform=transform, **values, **order)
                else:
                    mapped = self._behind(transform)[number]
                    density = self._fit_mapped(name, family, mapped, **values)
            except (DataError, TrainingError) as error:
                self.failure = str(error)
                return None
            densities.append(density)
            scores.append(self._scores(density, codes))
            so_far = np.concatenate(scores)
            if rival is not None and number + 1 < len(self.folds) and len(so_far) >= RACED:
                ahead = mean_and_error(so_far - rival.held_out[: len(so_far)])
                if not ahead.mean > -FAR * ahead.standard_error:
                    return None
        contestant = Contestant(name, densities, np.concatenate(scores), time.monotonic() - started)
        score = contestant.score.mean
        if not math.isfinite(score):
            return None
        self.contest.contestants.append(contestant)
        if score > self.best:
            self.best = score
            if not self.quiet:
                print(
                    f"{self.label}: {name}: {score:.5g} nats held out, {contestant.seconds:.1f} s", file=sys.stderr, flush=True
                )
        return contestant

    def _fit(self, name: str, family: str, codes: CodeReader, **values: Any) -> Density:
        row = {"codes": self.settings.codes, "dataset": self.settings.dataset, "family": family, "seed": self.settings.seed}
        settings = implementation("pipeline.densities", family, "family").Settings
        return self.fit(build(settings, row | values, name), codes, f"{self.label}: {name}")

    def _fit_mapped(self, name: str, family: str, mapped: _Mapped, **values: Any) -> Density:
        """Fits to codes behind a map, which becomes a part of the density."""
        transform, codes = mapped
        density = self._fit(name, family, codes, **values)
        density.transform = copy.deepcopy(transform).to(density.shift.device) if transform is not None else None
        return density

    def _scores(self, density: Density, codes: np.ndarray) -> np.ndarray:
        """Log-likelihoods of codes, in nats in the units of the table."""
        with torch.no_grad():
            each = density.log_prob(torch.from_numpy(codes).to(density.shift.device))
        scores: np.ndarray = each.double().cpu().numpy() + self.log_volume
        return scores

    def _gaussians(self) -> list[_Lane]:
        """Fits the Gaussian behind each map, where the mixtures start; a map that changes nothing gets no mixtures."""
        kept, lanes = list[Contestant](), list[_Lane]()
        for transform in TRANSFORMS:
            gaussian = self._enter(f"{transform}, Gaussian", "gaussian", transform=transform, ridge=1e-6)
            if gaussian is None or any(np.abs(gaussian.held_out - other.held_out).mean() < SAME for other in kept):
                continue
            kept.append(gaussian)
            shrunk = self._enter_shrunk(transform) or gaussian
            best = max(gaussian, shrunk, key=lambda contestant: contestant.score.mean)
            lanes += [_Lane(transform, kind, best) for kind in self._kinds()]
        return lanes

    def _enter_shrunk(self, transform: str) -> Contestant | None:
        """The Gaussian with correlations shrunk towards 0, where codes are few for its covariances."""
        if min(fold.index.count("train") for fold in self.folds) > SHRUNK * self.dim or self.dim == 1:
            return None
        name = f"{transform}, Gaussian, shrunk"
        shape: dict[str, Any] = {"standardise": "cholesky", "shrinkage": True, "covariance": "diagonal"}
        return self._enter(name, "gmm", transform=transform, components=[1], ridge=[1e-6], **shape)

    def _kinds(self) -> list[str]:
        """The kinds of covariances: no large matrices, and none pooled where the codes of a Gaussian tell its few numbers."""
        if self.dim > FULL_DIM:
            return [kind for kind in COVARIANCES if kind in ("tied", "diagonal")]
        return [kind for kind in COVARIANCES if "pooled" not in kind or len(self.folds) > 1 or self.dim > PLANE_DIM]

    def _kernels(self, lanes: list[_Lane]) -> None:
        """Fits kernel density estimates behind the first map, which is none, and behind the best one."""
        if "kde" not in self.settings.families or not lanes:
            return
        minutes = KERNEL_SHARE * self.limit / 60 / len(self.folds)
        gaussians = {lane.transform: lane.best for lane in lanes}
        best = max(gaussians, key=lambda transform: gaussians[transform].score.mean)
        for transform in dict.fromkeys((next(iter(gaussians)), best)):
            gaussian = gaussians[transform]
            for standardise in ("dimension", "cholesky") if self.dim > 1 else ("dimension",):
                name = f"{transform}, kernels, {'correlated' if standardise == 'cholesky' else 'round'}"
                values = {"standardise": standardise, "shrinkage": standardise == "cholesky", "max_minutes": minutes}
                if len(self.folds) == 1 and self._trial_fails(name, transform, gaussian, values):
                    return
                kernels = self._enter(name, "kde", transform=transform, rival=gaussian, **values)
            gain = _gain(kernels, gaussian)
            if gain.mean < -FAR * gain.standard_error:
                return  # too many dimensions for so few codes

    def _trial_fails(self, name: str, transform: str, gaussian: Contestant, values: Mapping[str, Any]) -> bool:
        """Whether kernels around a few codes of a large set are far behind; all of its codes would take minutes to say so."""
        fitted, fold = self._behind(transform)[0]
        train, valid = (fold.load(split, 0)["codes"][:count] for split, count in TRIAL.items())
        try:
            density = self._fit_mapped(name, "kde", (fitted, ArrayCodes(train, valid)), **values)
        except DataError:
            return False  # of all codes it may be none
        ahead = mean_and_error(self._scores(density, self.held_out[0][: len(valid)]) - gaussian.held_out[: len(valid)])
        return ahead.mean < -FAR * ahead.standard_error

    def _boxes(self) -> None:
        """Fits boxes to shapes without a map, which would bend their edges."""
        if not self.shapes or "boxes" not in self.settings.families:
            return
        minutes = BOX_SHARE * self.limit / 60
        trial = self._enter("none, boxes, tried", "boxes", transform="none", steps=BOX_TRIAL, max_minutes=minutes)
        gain = _gain(trial, self._leader())
        if gain.mean >= -FAR * gain.standard_error:
            self._enter("none, boxes", "boxes", transform="none", max_minutes=minutes)

    def _mixtures(self, lanes: list[_Lane]) -> None:
        """Goes on in the lane with the best score, while any gains; then, in folds, tries all that is left, smallest first."""
        running = self._heats(lanes) if self.mixtures else []
        share = self._share(lanes)
        while running and self._spent() < share:
            lane = max(running, key=lambda lane: lane.promise)
            self._advance(lane)
            share = self._share([lane])
            if lane.fruitless >= FRUITLESS or not self._affordable(lane, share):
                running.remove(lane)
        lanes.sort(key=lambda lane: -lane.score)
        if self.shapes and self.mixtures and lanes:
            self._refine(lanes[0])
        for components in range(len(COMPONENTS)) if len(self.folds) > 1 else ():
            for lane in lanes:
                for strength in range(len(self.covariances[lane.covariance])):
                    if (components, strength) not in lane.tried and self._supported(components):
                        if self._spent() >= self.mixture_share:
                            return
                        self._enter_mixture(lane, components, strength, self._leader())

    def _refine(self, lane: _Lane) -> None:
        """Tries other ridges for the best number of Gaussians, which may be one that was passed over at first."""
        for step in (-1, 1):
            number = lane.strength + step
            while (
                0 <= number < len(self.covariances[lane.covariance])
                and (lane.reached, number) not in lane.tried
                and self._spent() + REFINING_SHARE < 1
                and self._in_time(lane, lane.reached, 1)
            ):
                contestant = self._enter_mixture(lane, lane.reached, number, lane.best)
                if contestant is None or contestant.score.mean <= lane.score:
                    break
                lane.best, lane.strength = contestant, number
                number += step

    def _heats(self, lanes: list[_Lane]) -> list[_Lane]:
        """Fits few Gaussians of the first kind behind each map, and marks the maps that are far behind.

        Returns:
            The lanes to go on in.
        """
        firsts, heated = [lane for lane in lanes if lane.covariance == lanes[0].covariance], list[_Lane]()
        for lane in sorted(firsts, key=lambda lane: -lane.score):
            before = self._spent()
            for components in range(1, 1 + (HEATS_OF_SHAPES if self.dim <= PLANE_DIM else HEATS)):
                if self._spent() < self.mixture_share and self._supported(components):
                    lane.components = components
                    self._advance(lane)
            heated.append(lane)
            if self._spent() - before > HEAT_SHARE:
                break  # too little time to compare maps: the one that suits one Gaussian goes on
        for lane in heated:
            if lane.transform == "none" and self.dim <= PLANE_DIM:
                continue  # these can't tell either: many Gaussians follow shapes that a map bends
            gain = _gain(lane.best, max(heated, key=lambda first: first.score).best)
            if gain.mean < -FAR * gain.standard_error:
                for other in lanes:
                    other.behind |= other.transform == lane.transform
        return [lane for lane in lanes if self._affordable(lane, self._share(lanes))]

    def _share(self, lanes: list[_Lane]) -> float:
        """Share of the time up to which mixtures go on: more of it while one of these lanes leads and clearly gains."""
        climbs = any(lane.climbing and lane.best is self._leader() for lane in lanes)
        return MIXTURE_SHARE_ALONE if climbs else self.mixture_share

    def _advance(self, lane: _Lane) -> None:
        """Fits the next number of Gaussians of a lane; where it doesn't clearly gain, also what was passed over."""
        before, fits = lane.best, {lane.components: self._of_best_strength(lane)}
        gains = {lane.components: _gain(fits[lane.components], before)}
        lane.climbing = gains[lane.components].mean > CLEAR * gains[lane.components].standard_error
        steep = not self.alone or gains[lane.components].mean > STEEP * lane.gained
        lane.gained = gains[lane.components].mean
        for number in () if lane.climbing else lane.passed_over:
            if not self._in_time(lane, number, MIXTURE_SHARE_ALONE):
                continue
            fits[number] = self._enter_mixture(lane, number, lane.strength, before)
            gains[number] = _gain(fits[number], before)
        number = max(gains, key=lambda number: gains[number].mean)
        best, gain = fits[number], gains[number]
        if best is not None and gain.mean > 0:
            lane.best, lane.reached, lane.fruitless = best, number, int(self.alone and number < lane.components)
        else:
            lane.fruitless += 2 if gain.mean < -gain.standard_error else 1
        lane.components += 2 if lane.climbing and steep else 1

    def _leader(self) -> Contestant:
        """The contestant with the best score."""
        return max(self.contest.contestants, key=lambda contestant: contestant.score.mean)

    def _of_best_strength(self, lane: _Lane) -> Contestant | None:
        """The next number of Gaussians, as regularised as the last one; where that doesn't clearly gain, more or less.

        Of many codes also less where it does: the more Gaussians, the narrower they are, and one that suited few blurs them.
        """
        best, start = self._enter_mixture(lane, lane.components, lane.strength, lane.best), lane.strength
        gain = _gain(best, lane.best)
        if gain.mean > CLEAR * gain.standard_error:
            steps = [-1] if self.alone and "pooled" not in lane.covariance else []
        else:
            too_many = self.alone and lane.passed_over and gain.mean < -CLEAR * gain.standard_error
            steps = [] if too_many else [-1, 1]
        for step in steps:
            number = start + step
            while (
                0 <= number < len(self.covariances[lane.covariance])
                and self._spent() < self.mixture_share
                and self._in_time(lane, lane.components, MIXTURE_SHARE_ALONE)
            ):
                contestant = self._enter_mixture(lane, lane.components, number, best)
                if contestant is None or (best is not None and contestant.score.mean <= best.score.mean):
                    break
                best, lane.strength = contestant, number
                number += step
            if lane.strength != start:
                break
        return best

    def _enter_mixture(self, lane: _Lane, components: int, strength: int, rival: Contestant | None) -> Contestant | None:
        count, started = COMPONENTS[components], time.monotonic()
        lane.tried.add((components, strength))
        values = self.covariances[lane.covariance][strength]
        name = f"{lane.transform}, {count} Gaussian{'s' * (count > 1)}, {values.get('covariance', 'full')}"
        if "pooled_codes" in values:
            name += f", {values['pooled_codes']} pooled codes"
        contestant = self._enter(
            f"{name}, ridge {values['ridge'][0]:g}", "gmm", transform=lane.transform, rival=rival, components=[count], **values
        )
        lane.pace = (time.monotonic() - started) / count
        return contestant

    def _supported(self, components: int) -> bool:
        """Whether there are two codes for each Gaussian."""
        return components < len(COMPONENTS) and COMPONENTS[components] * 2 <= min(
            fold.index.count("train") for fold in self.folds
        )

    def _affordable(self, lane: _Lane, share: float) -> bool:
        """Whether there are codes, and within a share of the time, for the next number of Gaussians of a lane."""
        if not self._supported(lane.components):
            return False
        return self._in_time(lane, lane.components, share)

    def _in_time(self, lane: _Lane, components: int, share: float) -> bool:
        """Whether a fit of this number of Gaussians ends within a share of the time, at the pace of the lane's last one."""
        return lane.pace * COMPONENTS[components] < (share - self._spent()) * self.limit

    def _networks(self) -> None:
        count = self.network_folds[0].index.count("train")
        contestants = self.contest.contestants
        if not self.networks or not contestants:
            return
        best = max(contestants, key=lambda contestant: contestant.score.mean).name.partition(",")[0]
        waiting = [(best, *size) for size in NETWORKS]
        if self.dim <= PLANE_DIM:
            waiting = [(transform, *NETWORKS[-1]) for transform in dict.fromkeys(("none", best))]
        while waiting:
            transform, width, components = waiting.pop(0)
            seconds = NETWORK_SHARE * (1 - self._spent()) * self.limit / (1 + len(waiting)) / len(self.folds)
            values = _network(self.dim, count, width, components)
            if waiting and _steps(self.dim, values, seconds / 2) < NETWORK_STEPS:
                waiting = []  # no time for the others: this one gets it all
                seconds = NETWORK_SHARE * (1 - self._spent()) * self.limit / len(self.folds)
            if seconds > 0:
                self._enter(
                    f"{transform}, LDE of width {width}", "lde", transform=transform, max_minutes=seconds / 60, **values
                )

    def _weights(self, held_out: np.ndarray) -> np.ndarray:
        weights = stacked_weights(torch.from_numpy(held_out)).numpy()
        kept = weights >= min(LEAST_WEIGHT, weights.max())
        weights[~kept] = 0
        weights[kept] = stacked_weights(torch.from_numpy(held_out[:, kept])).numpy()
        return weights

    def result(self) -> tuple[Mixture, Contest]:
        """Runs the rounds and chooses the result."""
        lanes = self._gaussians()
        self._kernels(lanes)
        self._boxes()
        self._mixtures(lanes)
        self._networks()
        contestants = self.contest.contestants
        if not contestants:
            raise DataError(f"no family can be fitted to these codes: {self.failure}")
        held_out = np.stack([contestant.held_out for contestant in contestants], axis=1)  # (N, C)
        parts = stream("parts of held-out codes", self.settings.seed).permutation(len(held_out)) % PARTS
        stacked = np.empty(len(held_out))
        for part in range(PARTS) if len(held_out) >= PARTS else ():
            weights = self._weights(held_out[parts != part])
            stacked[parts == part] = _log_mixture(held_out[parts == part], weights)
        best = int(held_out.mean(axis=0).argmax())
        gain = mean_and_error(stacked - held_out[:, best])
        if len(held_out) >= PARTS and gain.mean > gain.standard_error:
            weights, chosen = self._weights(held_out), stacked
        else:
            losses = [mean_and_error(held_out[:, best] - held_out[:, i]) for i in range(len(contestants))]
            level = [i for i, loss in enumerate(losses) if i == best or loss.mean <= loss.standard_error]
            simplest = min(level, key=lambda i: contestants[i].parameters)
            weights, chosen = np.eye(len(contestants))[simplest], held_out[:, simplest]
        members, shares = list[Density](), list[float]()
        for contestant, weight in zip(contestants, weights, strict=True):
            contestant.weight = float(weight)
            if weight > 0:
                members += contestant.densities
                shares += [float(weight) / len(contestant.densities)] * len(contestant.densities)
        self.contest.score, self.contest.seconds = mean_and_error(chosen), time.monotonic() - self.started
        if self._spent() >= 1:
            self.contest.ended_by = "max_minutes"
        return Mixture.of(members, shares), self.contest


def _network(dim: int, count: int, width: int, components: int) -> dict[str, Any]:
    """Settings of an LDE for so many codes: a network for each dimension, while there are few; else convolutions."""
    separate = dim <= SEPARATE_DIM and count * dim <= SEPARATE_NUMBERS
    return {
        **({"blocks": "separate"} if separate else {"blocks": "residual", "position_embedding": True}),
        "width": width,
        "components": components,
        **({"start": "spread", "layers": 3} if dim <= PLANE_DIM else {"start": "gaussian"}),
        "standardise": "cholesky",
        "shrinkage": True,
        "noise": 0.0 if dim <= PLANE_DIM else min(0.2, math.sqrt(dim / count)),
        "batch_size": min(512 if separate else 128, max(32, count // 40)),
        "epochs": NETWORK_EPOCHS,
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "gradient_clip": 1.0,
        "ema_decay": 0.99,
        "patience": 20,
    }


def _steps(dim: int, network: dict[str, Any], seconds: float) -> float:
    """Training steps that an LDE takes in so many seconds, about."""
    width = network["width"]
    layers = network.get("layers", 2) if network["blocks"] == "separate" else math.ceil(math.log2(dim))
    weights = width * (3 * width * layers + 3 * network["components"])  # of a dimension
    # Each is used twice forward and four times backward.
    return float(seconds * OPERATIONS / (6 * weights * dim * network["batch_size"]))


def _with_fine_ridge(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings of covariances with one in between, for many codes of few dimensions: they can be as thin as a line."""
    finest, *others = values
    return [finest, finest | {"ridge": [FINE_RIDGE]}, *others]


class _AllTraining(CodeReader):
    """A folder of codes with other validation codes."""

    def __init__(self, codes: CodeReader, valid: dict[str, np.ndarray]) -> None:
        self.codes, self.valid = codes, valid
        part = Part(name="valid", count=len(valid["codes"]), bytes=0, sha256="")
        self.index = replace(codes.index, valid=(part,))

    def load(self, split: str, number: int) -> dict[str, np.ndarray]:
        """One file of training codes, or the validation codes."""
        return self.valid if split == "valid" else self.codes.load(split, number)


def _mapped(kind: str, codes: CodeReader) -> _Mapped:
    """A map fitted to training codes, None for none; and the codes behind it."""
    if kind == "none":
        return None, codes
    train, valid = (torch.from_numpy(codes.load(split, 0)["codes"]) for split in ("train", "valid"))
    transform = build_transform(kind, train.shape[1])
    transform.fit(train.double())
    return transform, ArrayCodes(transform(train).numpy(), transform(valid).numpy())


def _gain(contestant: Contestant | None, before: Contestant) -> Mean:
    """Mean difference of log-likelihoods for held-out codes, with its standard error; minus infinity without a contestant."""
    return Mean(-math.inf, 0.0, 0) if contestant is None else mean_and_error(contestant.held_out - before.held_out)


def _log_mixture(each: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Log-likelihoods (N,) under a mixture, from those under its members (N, C)."""
    kept = weights > 0
    total: np.ndarray = np.logaddexp.reduce(each[:, kept] + np.log(weights[kept]), axis=1)
    return total


def _folds(codes: CodeReader, count: int, seed: int) -> list[CodeReader]:
    """The codes with each fold held out in turn; of large sets a random subset of training codes, validation codes held out."""
    total = codes.index.count("train") + codes.index.count("valid")
    if total > FOLDED_CODES:
        train = random_subset(map(torch.from_numpy, codes.stream("train")()), MIXTURE_CODES, seed).numpy()
        return [ArrayCodes(train, np.concatenate([block["codes"] for block in codes.blocks("valid", HELD_OUT)]))]
    pool = np.concatenate([block["codes"] for split in ("train", "valid") for block in codes.blocks(split)])
    count = min(count, len(pool))
    fold = stream("folds", seed).permutation(len(pool)) % count
    return [ArrayCodes(pool[fold != number], pool[fold == number]) for number in range(count)]
