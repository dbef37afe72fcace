"""Compositional embeddings: each chunk of a vector has a hash and a table of its own.

    vector(f, id) = rows h_1(id), ..., h_c(id) of tables (f, 1), ..., (f, c), each of D / c elements

Two ids share a whole vector only if all c hashes agree. These are the hashed sketches of CCE (arXiv
2210.05974, Tsang and Ahle; after Shi et al., 1909.02107), without its clustering. A ROBE array of blocks of
D / c is the same with one table for all, blocks that begin anywhere, and signs. Features that
fit keep a row per id.
"""

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.declared import Weights
from robe.embeddings.tables import capped_rows, initial_bounds, tables
from robe.kernels.parts.hashing import slot_map, word_of

HALF = np.uint64(32)


def chunk_width(config: TrainConfig) -> int:
    """Elements of a chunk; ConfigError if chunks would differ."""
    chunks, width = config.embedding.chunks, config.model.width
    if width % chunks:
        raise ConfigError(f"--chunks {chunks} must divide the width {width}")
    return width // chunks


def hashed(key, table, ids, rows):
    """The row, below `rows`, of ids in tables of these numbers << HALF; all uint64, and broadcast."""
    return (word_of(key, table + ids) >> HALF) * rows >> HALF


def declare(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    chunks, width = config.embedding.chunks, chunk_width(config)
    return {"": Weights(capped_rows(config, data).repeat(chunks), width, chunks=chunks)}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ArrayEmbedding:
    chunks, weights, xp = config.embedding.chunks, declare(config, data)[""], backend.xp
    rows = weights.rows[::chunks]
    fits = (rows == data.cardinalities) & (data.dialect != "hash")
    key = slot_map("mix", config.model.width, 1, 1, config.embedding.hash_seed).key
    table = np.arange(rows.size * chunks, dtype=np.uint64).reshape(-1, chunks) << HALF
    table, high, fits = map(backend.to_device, (table, rows.astype(np.uint64)[:, None], fits[:, None]))

    def row_of(ids, features):
        ids = ids[..., None]
        rows = xp.where(fits[features], ids, hashed(key, table[features], ids, high[features]))
        return rows.astype(np.uint32).reshape(len(ids), rows.shape[1] * chunks)

    bounds = initial_bounds(config, data).repeat(chunks)
    return tables(weights, bounds, config, data, backend, dtype, row_of=row_of)
