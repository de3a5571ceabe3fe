"""Controls of the Parzen score: training images, and their k-means centroids, taken as samples.

The score can be gamed: centroids of the training set beat true samples (Theis, van den Oord and Bethge, A Note on the
Evaluation of Generative Models, 2016). Compare a model's score with these two, at the same number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.evaluation.blocks import Blocks, count_rows, rebatch
from pipeline.system.progress import Progress
from pipeline.system.streams import stream, stream_seed

__all__ = ["kmeans_centroids", "training_samples"]


def training_samples(blocks: Blocks, count: int, seed: int) -> Blocks:
    """A random choice of rows without replacement, streamed, as samples.

    Each row gets a random key in order of the stream; the rows with the smallest keys are chosen. So the choice depends only on
    the seed and the order of rows, not on where blocks end, and a larger choice contains every smaller one. Memory holds
    `count` keys and one block; the rows are read twice.

    Arguments:
        blocks: Gives a pass over blocks of training rows, in an order that is always the same.
        count: Number of rows to choose; all if there are fewer.
        seed: Seed of the keys.

    Returns:
        A factory of passes over blocks of the min(count, N) chosen rows, in order of the stream.

    Example:
        >>> rows = [np.arange(4), np.arange(4, 10)]
        >>> [block.tolist() for block in training_samples(lambda: rows, 4, seed=0)()]
        [[0], [5, 8, 9]]
    """
    if count < 1:
        raise ValueError(f"count must be at least 1: {count}")
    generator = stream("control images", seed)
    smallest = np.empty(0)
    for block in blocks():
        smallest = np.concatenate([smallest, generator.random(len(block))])
        if len(smallest) > count:
            smallest = np.partition(smallest, count - 1)[:count]
    if not len(smallest):
        raise DataError("there are no training images to take as samples")
    threshold = float(smallest.max())

    def chosen() -> Iterator[np.ndarray]:
        generator = stream("control images", seed)
        for block in blocks():
            rows = block[generator.random(len(block)) <= threshold]
            if len(rows):
                yield rows

    return chosen


def kmeans_centroids(blocks: Blocks, count: int, seed: int, batch_size: int = 4096, epochs: int = 10) -> NDArray[np.float32]:
    """Centroids of mini-batch k-means, started at a random choice of training rows.

    Memory holds the centroids and one batch of at least `count` rows. With no more rows than centroids, each row is its own
    centroid and the rows are returned: the control is then the same as `training_samples`.

    Sculley, Web-Scale K-Means Clustering, 2010, as in scikit-learn

    Arguments:
        blocks: Gives a pass over blocks of training rows, each with shape (n, ...), in an order that is always the same.
        count: Number of centroids.
        seed: Seed of the start and of reassigned centroids.
        batch_size: Rows in a step.
        epochs: Passes over the rows.

    Returns:
        The centroids, float32, with shape (min(count, N), ...).
    """
    start = np.concatenate(list(training_samples(blocks, count, seed)())).astype(np.float32)
    rows = count_rows(blocks)
    if len(start) < count or rows == count:
        return start

    from sklearn.cluster import MiniBatchKMeans  # takes over a second to import

    state = stream_seed("control centroids", seed, bits=32)
    means = MiniBatchKMeans(count, init=start.reshape(count, -1), n_init=1, random_state=state, compute_labels=False)
    batch_size = max(batch_size, count)  # which scikit-learn asks of the first batch
    with Progress(epochs * rows, "k-means", unit="images") as progress:
        for _ in range(epochs):
            for batch in rebatch(blocks(), batch_size):
                means.partial_fit(np.asarray(batch, dtype=np.float32).reshape(len(batch), -1))
                progress.advance(len(batch))
    return np.asarray(means.cluster_centers_, dtype=np.float32).reshape(start.shape)
