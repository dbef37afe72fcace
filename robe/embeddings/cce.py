"""Clustered compositional embeddings (CCE, Tsang and Ahle, arXiv 2210.05974): what collides is learned.

    chunk j of vector(f, id) = table[f, j, index[f, id, j]] + helper[f, j, h(id)]

At first the index is a hash too. In the middle of each pass the ids of a feature are clustered, chunk by
chunk, by what they have become (k-means): the centroids are the new table, and the index tells the cluster
of each id. The helper begins again at 0, with another hash, so that ids of a cluster can part. A row of the
table keeps the mean of what the optimizer kept for its ids.

Table and helper have k rows each, the most for all features that the budget allows. A feature keeps a row per
id, and has no index, where that takes no more bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.clusters import clustered, means
from robe.embeddings.composed import INDEX, Chosen, ComposedEmbedding, composed
from robe.embeddings.compositional import HALF, chunk_width, hashed
from robe.embeddings.declared import Array, Weights
from robe.embeddings.tables import initial_bounds, largest, tables
from robe.kernels.parts.hashing import slot_map

HASHES = np.uint64(2**52)  # from the tokens of one hash to those of the next
DRAWS = 3  # of random numbers, beside those that the weights of the parts are drawn from


@dataclass(frozen=True)
class Index:
    """The rows (ids, chunks) of the table that each id of the clustered features has, below k."""

    ids: int
    chunks: int
    k: int
    count: ClassVar[int] = 0  # weights

    def arrays(self, config: TrainConfig, dtype="float32") -> dict[str, Array]:
        smallest = str(np.min_scalar_type(self.k - 1))
        return {
            "rows": Array((self.ids, self.chunks), smallest, INDEX),
            "clusterings": Array((1,), "uint32", INDEX),  # so far
        }


def sizes(config: TrainConfig, data: DataSpec) -> tuple[int, np.ndarray]:
    """k, and (F,) whether a feature is clustered, within the budget."""
    n, width, chunks = np.array(data.cardinalities), config.model.width, config.embedding.chunks

    def of(k: int) -> np.ndarray:
        index = chunks * np.min_scalar_type(k - 1).itemsize / 4  # of an id, in weights
        return n * width > 2 * k * width + n * index

    def size(k: int) -> int:
        return int(np.where(of(k), 2 * k, n).sum()) * width

    k = largest(size, -(-int(n.max()) // 2), config, data)
    return k, of(k)


def declare(config: TrainConfig, data: DataSpec) -> dict[str, Any]:
    width, chunks, n = chunk_width(config), config.embedding.chunks, np.array(data.cardinalities)
    k, parted = sizes(config, data)
    return {
        "tables": Weights(np.where(parted, k, n).repeat(chunks), width, chunks=chunks),
        "helper": Weights(np.full(parted.sum() * chunks, k), width, chunks=chunks),
        "index": Index(int(n[parted].sum()), chunks, k),
    }


@dataclass(kw_only=True)
class ClusteredEmbedding(ComposedEmbedding):
    """Its parts are the tables and the helper, and `beside` holds the arrays of Index.

    clustered: (C,) numbers of the features that have an index; starts: (C,) where it begins.
    k: rows of a table. hashed_rows: (which hash, number (c) of these features, ids (n,)) -> rows (n, chunks)
    seed: of the points that clusterings begin with.
    """

    clustered: np.ndarray
    starts: np.ndarray
    k: int
    hashed_rows: Callable[[int, int, np.ndarray], np.ndarray]
    seed: int

    def __post_init__(self):
        self._hash_ids()

    def begin(self, number: int) -> None:
        super().begin(number)
        self._hash_ids()

    def _hash_ids(self) -> None:
        index, clusterings = self.beside.values()
        clusterings[...] = 0
        for c, ids, where in self._ids_clustered():
            index[where] = self.backend.to_device(self.hashed_rows(0, c, ids).astype(index.dtype))

    def _ids_clustered(self) -> Iterator[tuple[int, np.ndarray, slice]]:
        """The number, the ids (n,) and their part of the index, of each feature that has one."""
        for c, (n, start) in enumerate(zip(self.rows[self.clustered], self.starts, strict=True)):
            yield c, np.arange(n, dtype=np.uint64), slice(start, start + int(n))

    def flaw(self) -> str | None:
        beyond = bool((self.beside["index.rows"] >= self.k).any())
        return f"its index names rows that are not among {self.k}" if beyond else super().flaw()

    def halfway(self) -> None:
        """Cluster the ids of each feature, chunk by chunk, and begin with another helper."""
        to_host, to_device = self.backend.to_host, self.backend.to_device
        (table, helper), (index, clusterings) = self.parts.values(), self.beside.values()
        chunks, width, number = table.chunks, int(table.slot_map.width), 1 + int(clusterings[0])
        rng = np.random.default_rng([self.seed, DRAWS, number])
        rows, first = to_host(index).copy(), to_host(table.base).reshape(-1, chunks)[self.clustered]
        helped = to_host(helper.stepped).reshape(-1, chunks, self.k, width)
        weights, *sums = (
            to_host(a).reshape(table.weights // width, -1).copy()  # a row has one sum, or one for each weight
            for a in (table.stepped, *table.sums.values())
        )
        for c, ids, where in self._ids_clustered():
            hashes = self.hashed_rows(number, c, ids)
            for j, (start, help_by) in enumerate(zip(first[c].tolist(), helped[c], strict=True)):
                own, before = slice(start, start + len(help_by)), rows[where, j].copy()
                points = weights[own][before] + help_by[hashes[:, j]]
                rows[where, j] = now = clustered(points, len(help_by), rng)
                weights[own] = means(points, now, weights[own])
                for kept in sums:
                    kept[own] = means(kept[own][before], now, kept[own])
        table.restart([(0, weights.reshape(-1))])
        for array, kept in zip(table.sums.values(), sums, strict=True):
            array[...] = to_device(kept.reshape(-1))
        helper.restart([(0, np.zeros(helper.weights, weights.dtype))])
        index[...], clusterings[...] = to_device(rows), number


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ComposedEmbedding:
    xp, chunks, weights = backend.xp, config.embedding.chunks, declare(config, data)
    k, parted = sizes(config, data)
    clustered, n = np.flatnonzero(parted), np.array(data.cardinalities)
    beside = {f"index.{name}": a.make(xp) for name, a in weights["index"].arrays(config).items()}
    index, clusterings = beside.values()
    key = slot_map("mix", config.model.width, 1, 1, config.embedding.hash_seed).key
    starts = np.cumsum((0, *n[clustered]))[: clustered.size]
    numbers = (clustered[:, None] * chunks + np.arange(chunks)).astype(np.uint64) << HALF
    offsets, tokens = map(backend.to_device, (starts, numbers))
    chosen = Chosen(clustered, n.size, backend)

    def hashed_rows(which: int, c: int, ids: np.ndarray) -> np.ndarray:
        return hashed(key, numbers[c] + np.uint64(which) * HASHES, ids[:, None], np.uint64(k))

    def indexed(ids, features):
        rows = xp.repeat(ids[..., None], chunks, axis=2)
        place = chosen.place(None if isinstance(features, slice) else features[:, 0])
        first = offsets if place.features is None else offsets[place.features][:, None]
        rows[place.at] = index[first + place.take(ids)]
        return rows.reshape(len(ids), ids.shape[1] * chunks)

    def helping(ids, features):
        which = tokens[features] + (clusterings.astype(np.uint64) + np.uint64(1)) * HASHES
        rows = hashed(key, which, ids[..., None], np.uint64(k))
        return rows.astype(np.uint32).reshape(len(ids), ids.shape[1] * chunks)

    def compose(rows, out, places):
        out[...], helped = rows
        out[places["helper"].at] += helped

    def gradients(rows, d_vectors, places):
        return d_vectors, places["helper"].take(d_vectors)

    bounds = initial_bounds(config, data)
    bounds[parted] /= np.sqrt(2)  # of a sum of two
    made = config, data, backend, dtype
    parts = {
        "tables": tables(weights["tables"], bounds.repeat(chunks), *made, row_of=indexed),
        "helper": tables(weights["helper"], bounds[parted].repeat(chunks), *made, stream=2, row_of=helping),
    }
    further = {"clustered": clustered, "starts": starts, "k": k, "hashed_rows": hashed_rows}
    further |= {"seed": config.seed, "beside": beside, "chosen": {"helper": chosen}}
    return composed(config, data, backend, parts, compose, gradients, ClusteredEmbedding, **further)
