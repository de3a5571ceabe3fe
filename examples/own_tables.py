"""The density of a table: likely and unlikely rows, new rows, and held-out scores, in half a minute.

Run with `python -m examples.own_tables [FILE.csv]` from the project's folder. Without a file, it takes the chemical analysis of
178 wines that comes with scikit-learn. A file has a line of names, then one row of numbers per line.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
from sklearn.datasets import load_wine

from pipeline.estimators import CodeDensity

if len(sys.argv) > 1:
    table = pd.read_csv(sys.argv[1]).select_dtypes("number").dropna()
else:
    wine = load_wine(as_frame=True)
    table = wine.data
rows = table.to_numpy(float)
rows = rows[:, rows.std(0) > 0]
order = np.random.default_rng(0).permutation(len(rows))
train, test = rows[order[: len(rows) * 4 // 5]], rows[order[len(rows) * 4 // 5 :]]

# A contest of families, and one Gaussian to compare with. Both score the same rows, so the error is that of differences.
density = CodeDensity(family="auto", minutes=0.2, seed=0).fit(train)
gaussian = CodeDensity(family="gaussian", settings={"ridge": 0.01}).fit(train)
difference = density.score_samples(test) - gaussian.score_samples(test)
print(f"{len(train)} rows to fit, {len(test)} to test, {rows.shape[1]} columns")
print(f"test log-likelihood {density.score(test):.2f} nats; one Gaussian {gaussian.score(test):.2f}")
print(f"difference {difference.mean():.2f} ± {difference.std(ddof=1) / np.sqrt(len(test)):.2f}")
best = density.contest_[0]
print(f"first in the contest: {best['family']}")

# Rows that don't belong: each column drawn from another row, so that columns no longer fit each other.
mixed = np.random.default_rng(0).permuted(test, axis=0)
likely, unlikely = density.score_samples(test), density.score_samples(mixed)
share = (unlikely < likely[:, None]).mean()
print(f"rows with mixed columns: {unlikely.mean():.2f} nats, less likely than a real row in {share:.0%} of pairs")
print("two new rows:")
print(np.round(density.sample(2, seed=0), 2))
