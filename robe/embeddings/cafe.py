"""CAFE (Zhang et al., SIGMOD 2024, arXiv 2312.03256): hot ids have rows of their own, all others are hashed.

An id is hot while a sketch counts it among the most important (sketched.py), where a look-up is as important
as the norm of its gradient. An id that is not has the row `id modulo rows` of a smaller table of its feature,
which it starts from when it becomes hot, and falls back to when it cools.

The paper gives the hot rows 0.5 of the bytes at 10 times less than the full table, 0.7 at 100, 0.8 at 1,000
and 0.9 at 10,000; between them the share follows the logarithm. A feature whose ids all have a row needs no
others.
"""

import dataclasses

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig, budget
from robe.embeddings.robe import token_base
from robe.embeddings.sketched import HOT, SketchedEmbedding, SketchedWeights, weights_of_a_set
from robe.embeddings.tables import capped_rows, initial_array, initial_bounds, whole
from robe.kernels.parts.hashing import slot_map

SHARES = (0.5, 0.7, 0.8, 0.9)  # of the bytes that hot rows take, at a compression of 10, 100, ...


def hot_sets(config: TrainConfig, data: DataSpec) -> int:
    """Sets of hot rows: the share of the bytes that is asked for, but no more rows than there are ids."""
    rows, width = sum(data.cardinalities), config.model.width
    weights, share = budget(config.embedding, width, data.cardinalities), config.embedding.hot_share
    if share is None:
        share = np.interp(np.log10(rows * width / max(1, weights)), (1, 2, 3, 4), SHARES)
    return min(int(share * weights / weights_of_a_set(width)), -(-rows // HOT))


def declare(config: TrainConfig, data: DataSpec) -> dict[str, SketchedWeights]:
    sets, settings, width = hot_sets(config, data), config.embedding, config.model.width
    left = budget(settings, width, data.cardinalities) - sets * weights_of_a_set(width)
    settings = dataclasses.replace(settings, weights=left, megabytes=None, compression=None)
    tail = capped_rows(dataclasses.replace(config, embedding=settings), data)
    return {"": SketchedWeights(np.array([sets * HOT, *tail]), width, sets=sets, features=len(tail))}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> SketchedEmbedding:
    settings, weights = config.embedding, declare(config, data)[""]
    to_device, tail = backend.to_device, weights.rows[1:]
    first = to_device(np.cumsum(weights.rows)[:-1].astype(np.uint32))
    modulo = to_device(tail.astype(np.uint32))
    shared = (tail < data.cardinalities) | (data.dialect == "hash")
    return SketchedEmbedding(
        method=settings.method,
        **initial_array(weights, [0, *initial_bounds(config, data)], config, backend, dtype),
        weights=weights.count,
        base=to_device(np.zeros(len(tail), np.uint64)),
        slot_map=slot_map("table", weights.width, 1, weights.count, signed=False),
        optimizer=config.optimizer,
        backend=backend,
        **whole(config, data),
        tokens=to_device(token_base(config, data)),
        scale=to_device(shared.astype(np.float32)),
        by_count=settings.importance == "count",
        half_life=settings.half_life,
        cold=lambda features, ids: first[features] + ids % modulo[features],
    )
