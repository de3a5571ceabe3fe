"""Missing values of tables: our densities against scikit-learn's imputers, by the protocol of ACE.

Run with `python -m benchmarks.imputation [--sets wine iris ..] [--methods MICE ..] [--splits 3] [--seconds 30]`. Results are
added to `benchmarks/results/imputation.json`, split by split, and the table is written again to `imputation.md`; a split that
has a result with the same seconds isn't run again.

Each value of a test row is observed with probability 1/2, and each row is masked five times. All methods have the same masks.
The scores are:

- the log-likelihood of missing values given the observed ones, in nats per row, of columns in units of their training standard
  deviations, for methods that have one;
- the normalised root mean squared error (NRMSE) of imputed values: of each column, in units of its training standard deviation,
  then the mean over columns. Densities impute means of 100 draws.

`--sets bsds300` is the protocol's own table at a size for a CPU, from `data/raw/bsds300`: 8x8 patches of natural images, 63
numbers each, the images split as for RNADE; 60,000 training patches, 500 test patches, each masked once, means of 20 draws.
Its log-likelihoods are in the units of the patches. The published 87.01 nats and 0.300 of DEformer are of other test patches,
those of MAF, and of a network trained on a GPU.

Other tables and splits are those of `benchmarks.tables`, of whose test rows the first 200 count. Methods choose on validation
rows taken from the training rows. MICE is fitted to the training rows twice, whole and masked in the same way, since it learns
nothing from whole rows alone. Each method has one thread, and our densities the given CPU seconds at most.

References:
    | Arbitrary Conditional Distributions with Energy (Strauss, Oliva, 2021), for the protocol
    | https://arxiv.org/abs/2102.04426
    | DEformer: an order-agnostic distribution estimating transformer (Alcorn, Nguyen, 2021), for the published scores
    | https://arxiv.org/abs/2106.06989
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer

from benchmarks.recorded import Recorded
from benchmarks.tables import TABLES, _patches, split_of  # also sets the clock to CPU time
from pipeline.errors import PipelineError
from pipeline.estimators import CodeDensity
from pipeline.settings import build
from pipeline.sources import bsds300

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "imputation.json"


class Protocol(NamedTuple):
    """How a set is scored.

    Attributes:
        test_rows: Test rows, at most, the first of the split's.
        masks: How often each is masked.
        draws: Draws behind each imputed mean.
        own_units: Whether log-likelihoods are in the units of the table, not of standardised columns.
    """

    test_rows: int = 200
    masks: int = 5
    draws: int = 100
    own_units: bool = False


PATCHES = "bsds300"
PROTOCOLS = {PATCHES: Protocol(500, 1, 20, own_units=True)}
PATCH_COUNTS = {"train_count": 60_000, "valid_count": 1_000, "test_count": 500}

TABLES["patches-36"] = lambda: _patches(8_000, 6)
SETS = ("iris", "wine", "breast-cancer-benign", "breast-cancer", "diabetes", "digits-pca8", "patches-36")


class Fitted(NamedTuple):
    """What a method has learned.

    Attributes:
        impute: Standardised rows with NaN, (N, D), and a number of draws for those who draw -> the same rows without.
        log_prob: Standardised rows (N, D), and which values are observed -> log-likelihoods (N,); none for imputers.
    """

    impute: Callable[[np.ndarray, int], np.ndarray]
    log_prob: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


Method = Callable[[np.ndarray, int, float], Fitted]


def masks(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Which values are observed, each with probability 1/2."""
    return np.random.default_rng(seed).random(shape) < 0.5


def hidden(rows: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Rows with NaN where a value isn't observed."""
    return np.where(observed, rows, np.nan)


def _means(train: np.ndarray, seed: int, seconds: float) -> Fitted:
    return Fitted(lambda rows, draws: np.where(np.isnan(rows), train.mean(axis=0), rows))


def _neighbours(train: np.ndarray, seed: int, seconds: float) -> Fitted:
    order = np.random.default_rng(seed).permutation(len(train))
    valid, rest = train[order[: len(train) // 10]], train[order[len(train) // 10 :]]
    observed = masks(valid.shape, seed)

    def error(count: int) -> float:
        found = KNNImputer(n_neighbors=count).fit(rest).transform(hidden(valid, observed))
        return float(np.square(found - valid)[~observed].mean())

    imputer = KNNImputer(n_neighbors=min((c for c in (1, 2, 3, 5, 8, 12, 20, 32) if c <= len(rest)), key=error)).fit(train)
    return Fitted(lambda rows, draws: imputer.transform(rows))


def _mice(train: np.ndarray, seed: int, seconds: float) -> Fitted:
    imputer = IterativeImputer(max_iter=20, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it hasn't converged
        imputer.fit(np.concatenate([train, hidden(train, masks(train.shape, seed))]))
    return Fitted(lambda rows, draws: imputer.transform(rows))


def _ours(family: str, **settings: Any) -> Method:
    def fit(train: np.ndarray, seed: int, seconds: float) -> Fitted:
        density = CodeDensity(family=family, minutes=seconds / 60, seed=seed, settings=settings).fit(train)
        return Fitted(
            lambda rows, draws: density.sample(draws, seed=seed, given=rows).mean(axis=0),
            lambda rows, observed: density.score_samples(rows, given=observed),
        )

    return fit


def _lde(train: np.ndarray, seed: int, seconds: float) -> Fitted:
    """The best of several amounts of noise on training rows, by held-out rows; each has an equal share of the time."""
    row = {"blocks": "attention", "orders": "any", "averaged_orders": 4, "width": 64, "layers": 3, "components": 10}
    row |= {"epochs": 10_000, "patience": 20, "learning_rate": 1e-3, "batch_size": 128, "dropout": 0.1, "max_log_scale": 2.0}
    if train.shape[1] > 40:  # patches: a larger network, whose learning rate follows the clock
        row |= {"width": 128, "layers": 4, "components": 20, "averaged_orders": 2, "dropout": 0.0, "min_log_scale": -6.0}
        row |= {"optimizer": "muon", "weight_decay": 0.01, "schedule": "cosine", "warm_up": 0.03, "gradient_clip": 5.0}
    noises = (0.05, 0.2) if len(train) < 5_000 else (0.0,)
    fits = [
        CodeDensity(family="lde", minutes=seconds / 60 / len(noises), seed=seed, settings=row | {"noise": noise}).fit(train)
        for noise in noises
    ]
    density = max(fits, key=lambda fit: fit.held_out_score_)
    return Fitted(
        lambda rows, draws: density.sample(draws, seed=seed, given=rows).mean(axis=0),
        lambda rows, observed: density.score_samples(rows, given=observed),
    )


METHODS: dict[str, Method] = {
    "means": _means,
    "k nearest": _neighbours,
    "MICE": _mice,
    "Gaussian": _ours("gaussian", ridge=1e-6),
    "GMM": _ours("gmm", components=[1, 2, 3, 5, 8, 12, 20, 32, 50, 80], ridge=[1e-6, 1e-4, 1e-3, 1e-2, 1e-1]),
    "LDE, any order": _lde,
}


def patches(split: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and test patches of BSDS300, drawn by the number of the split."""
    root = PROJECT / "data/raw/bsds300"
    row = {"source": "bsds300", "root": str(root), "split_seed": split} | PATCH_COUNTS
    source = bsds300.open_source(build(bsds300.Settings, row, PATCHES), root)
    train, test = (source.read(part, 0, PATCH_COUNTS[f"{part}_count"]).examples for part in ("train", "test"))
    return train.astype(np.float64), test.astype(np.float64)


def scores(fitted: Fitted, test: np.ndarray, seed: int, protocol: Protocol, std: np.ndarray) -> dict[str, float]:
    """NRMSE, and log-likelihood in nats where there is one; `std` is the unit of the standardised test rows."""
    rows = np.repeat(test, protocol.masks, axis=0)
    observed = masks(rows.shape, 1000 + seed)
    errors = np.square(fitted.impute(hidden(rows, observed), protocol.draws) - rows)
    columns = zip(errors.T, observed.T, strict=True)
    found = {"nrmse": float(np.mean([math.sqrt(column[~kept].mean()) for column, kept in columns]))}
    if fitted.log_prob is None:
        return found
    values = fitted.log_prob(rows, observed) - (~observed @ np.log(std) if protocol.own_units else 0.0)
    error = float(values.reshape(len(test), -1).mean(axis=1).std(ddof=1)) / math.sqrt(len(test))
    return found | {"log_likelihood": float(values.mean()), "log_likelihood_se": error}


def markdown(runs: list[dict[str, Any]]) -> str:
    """Two tables: one line per set, one column per method."""
    lines = [
        "# Missing values of small tables",
        "",
        "Half of the values of test rows, drawn at random, are missing. Means ± standard errors over splits; the best of a set",
        "is bold; seconds are the most CPU seconds of a fit of ours. Log-likelihoods of bsds300 are in the units of its",
        "patches. Written by `python -m benchmarks.imputation`, which says what is compared and how.",
    ]
    for key, title, best in (
        ("log_likelihood", "Log-likelihood of missing values, nats per row of standardised columns (higher is better)", max),
        ("nrmse", "Normalised root mean squared error (lower is better)", min),
    ):
        methods = [method for method in METHODS if any(run["method"] == method and key in run for run in runs)]
        lines += [
            "",
            f"## {title}",
            "",
            f"| set | splits | seconds | {' | '.join(methods)} |",
            f"|---|--:|--:|{'--:|' * len(methods)}",
        ]
        for name in dict.fromkeys(run["set"] for run in runs):
            values = {m: np.array([r[key] for r in runs if r["set"] == name and r["method"] == m]) for m in methods}
            values = {method: found for method, found in values.items() if len(found)}
            if not values:
                continue
            winner = best(values, key=lambda method: values[method].mean())
            cells = []
            for method in methods:
                if method not in values:
                    cells.append("-")
                    continue
                mean = f"{values[method].mean():.3f}"
                error = values[method].std(ddof=1) / math.sqrt(len(values[method])) if len(values[method]) > 1 else math.nan
                cells.append(f"**{mean}**" if method == winner else mean)
                cells[-1] += "" if math.isnan(error) else f" ± {error:.3f}"
            seconds = max(run["seconds"] for run in runs if run["set"] == name)
            lines.append(f"| {name} | {max(map(len, values.values()))} | {seconds:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Runs the chosen splits that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=[*TABLES, PATCHES], default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="CPU seconds of a fit of ours")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recorded = Recorded(options.results, markdown, ("set", "method", "split"))
    asked = [(split, name, method) for split in range(options.splits) for name in options.sets for method in options.methods]
    for split, name, method in asked:
        key = {"set": name, "method": method, "split": split, "seconds": options.seconds}
        if recorded.holds(key):
            continue
        protocol = PROTOCOLS.get(name, Protocol())
        train, test = patches(split) if name == PATCHES else split_of(name, split, 0)
        test = test[: protocol.test_rows]
        mean, std = train.mean(axis=0), train.std(axis=0)
        started = time.process_time()
        try:
            fitted = METHODS[method]((train - mean) / std, split, options.seconds)
            found = scores(fitted, (test - mean) / std, split, protocol, std)
        except (PipelineError, ValueError) as error:
            print(f"{name}, split {split}, {method}: {error}", flush=True)
            continue
        recorded.add(key | {"cpu_seconds": round(time.process_time() - started, 2)} | found)


if __name__ == "__main__":
    main()
