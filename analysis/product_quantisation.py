"""Product quantisation of trained tables (Jegou et al., 2011): the step with which MEC ends, made afterwards.

The rows of a table are cut into parts. For each part there are 256 centroids (k-means), and a row is stored
as the numbers of its nearest ones, a byte a part. A table stays whole where that takes no more bytes.
"""

import numpy as np

from robe.config import DataSpec
from robe.embeddings import ArrayEmbedding
from robe.embeddings.clusters import clustered, means

CENTROIDS = 256
FLOAT = 4


def stored_bytes(rows: int, width: int, parts: int) -> int:
    """Of a table: its codes and centroids, or its weights where these take no more."""
    return min(rows * width * FLOAT, rows * parts + CENTROIDS * width * FLOAT)


def is_whole(rows: int, width: int, parts: int) -> bool:
    return stored_bytes(rows, width, parts) == rows * width * FLOAT


def coded(table: np.ndarray, parts: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, parts) uint8 and centroids (parts, 256, D / parts) of a table (n, D) of 256 rows or more."""
    codes = np.empty((len(table), parts), np.uint8)
    centroids = np.zeros((parts, CENTROIDS, table.shape[1] // parts), table.dtype)
    for j, points in enumerate(np.split(table, parts, axis=1)):
        codes[:, j] = clustered(np.ascontiguousarray(points), CENTROIDS, rng)
        centroids[j] = means(points, codes[:, j], centroids[j])
    return codes, centroids


def quantise(embedding: ArrayEmbedding, spec: DataSpec, parts: int, seed: int) -> None:
    """Give each row of full tables the values that its codes stand for."""
    rng, width, start = np.random.default_rng(seed), embedding.width, 0
    for rows in spec.cardinalities:
        stop = start + rows * width
        if not is_whole(rows, width, parts):
            codes, centroids = coded(embedding.read(start, stop).reshape(rows, width), parts, rng)
            embedding.write(start, centroids[np.arange(parts), codes].reshape(-1))
        start = stop
