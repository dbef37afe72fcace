"""Clusters of points, by Lloyd's algorithm (k-means)."""

import numpy as np

ROUNDS = 10
SAMPLE = 256  # points per cluster that the rounds look at, as FAISS does
AT_ONCE = 2**24  # distances


def clustered(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) the cluster, below k, of each of n >= k points (n, d) float; some may be empty."""
    sample = points[rng.permutation(len(points))[: SAMPLE * k]]
    centroids = sample[:k]
    for _ in range(ROUNDS):
        centroids = means(sample, nearest(sample, centroids), centroids)
    return nearest(points, centroids)


def nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(n,) the number of the nearest centroid (k, d) of each point (n, d); any where they are not finite."""
    # SciPy's vq does the same, but returns numbers beyond k where points are not finite.
    step, lengths = max(1, AT_ONCE // len(centroids)), (centroids**2).sum(axis=1)
    parts = (points[start : start + step] for start in range(0, len(points), step))
    return np.concatenate([(lengths - 2 * part @ centroids.T).argmin(axis=1) for part in parts])


def means(values: np.ndarray, clusters: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """The mean (k, d) of the values (n, d) in each of the clusters (n,); where there are none, `empty`."""
    k = len(empty)
    count = np.bincount(clusters, minlength=k)[:, None]
    sums = np.stack([np.bincount(clusters, column, k) for column in values.T], axis=1)
    return np.where(count, sums / np.maximum(count, 1), empty).astype(values.dtype)
