"""The hashing trick, as `--max-ind-range` of the DLRM: ids modulo the rows of a smaller table.

Features that fit keep a row per id. A dictionary numbers frequent values first, so those that share a row
are then a frequent value and rare ones, seldom two frequent ones: better than what a hash would do.
"""

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.tables import capped_tables, initial_bounds, tables

declare = capped_tables


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ArrayEmbedding:
    weights = declare(config, data)[""]
    modulo = backend.to_device(weights.rows.astype(np.uint32))
    bounds = initial_bounds(config, data)

    def rows(ids, features):
        return ids % modulo[features]

    return tables(weights, bounds, config, data, backend, dtype, row_of=rows)
