"""The full table: one row of D weights for every id of every feature, as in the DLRM."""

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.tables import initial_bounds, tables


def full_table(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> ArrayEmbedding:
    return tables(data.cardinalities, initial_bounds(config, data), config, data, backend, dtype)


def full_weights(config: TrainConfig, data: DataSpec) -> int:
    return sum(data.cardinalities) * config.model.width
