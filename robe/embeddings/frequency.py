"""Tables of the frequent values only: all others of a feature share its last row.

Frequent are the values of the first ids. A dictionary by falling count (`prepare --order count`) makes that
exact; one by first appearance comes near, since what is frequent appears early. Nothing but the dictionary is
stored for it. (One threshold for all features is a full table after `prepare --min-count`.)
"""

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.tables import capped_tables, initial_bounds, tables

declare = capped_tables


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ArrayEmbedding:
    weights = declare(config, data)[""]
    last = backend.to_device((weights.rows - 1).astype(np.uint32))
    bounds, xp = initial_bounds(config, data), backend.xp

    def rows(ids, features):
        return xp.minimum(ids, last[features])

    return tables(weights, bounds, config, data, backend, dtype, row_of=rows)
