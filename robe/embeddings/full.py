"""The full table: one row of D weights for every id of every feature, as in the DLRM."""

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.declared import Weights
from robe.embeddings.tables import initial_bounds, tables


def declare(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    return {"": Weights(np.array(data.cardinalities), config.model.width)}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ArrayEmbedding:
    weights = declare(config, data)[""]
    return tables(weights, initial_bounds(config, data), config, data, backend, dtype)
