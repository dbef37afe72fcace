"""CAFE (Zhang et al., SIGMOD 2024, arXiv 2312.03256): hot ids have rows of their own, all others are hashed.

An id is hot while a sketch counts it among the most important (sketched.py), where a look-up is as important
as the norm of its gradient. An id that is not has the row `id modulo rows` of a smaller table of its feature,
which it starts from when it becomes hot, and falls back to when it cools.

The share of the bytes that hot rows and sketch take follows the compression as in the paper (hot.py). A
feature whose ids all have a row needs no others.
"""

import dataclasses

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig, budget
from robe.embeddings.hot import share_of
from robe.embeddings.sketched import HOT, SketchedEmbedding, SketchedWeights, sketch_facts, weights_of_a_set
from robe.embeddings.tables import capped_rows, initial_array, initial_bounds, whole
from robe.kernels.parts.hashing import slot_map


def hot_sets(config: TrainConfig, data: DataSpec) -> int:
    """Sets of hot rows: the share of the bytes that is asked for, but no more rows than there are ids."""
    rows, width = sum(data.cardinalities), config.model.width
    weights = budget(config.embedding, width, data.cardinalities)
    sets = int(share_of(config, data, max(1, weights)) * weights / weights_of_a_set(width))
    return min(sets, -(-rows // HOT))


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
        **sketch_facts(config, data, backend, shared),
        cold=lambda features, ids: first[features] + ids % modulo[features],
    )
