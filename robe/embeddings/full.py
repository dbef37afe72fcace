"""The full table: one row of D weights for every id of every feature, as in the DLRM."""

from collections.abc import Iterator

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.kernels.hashing import slot_map

CHUNK = 2**27  # weights drawn at a time


def require_numbered(data: DataSpec, method: str) -> None:
    """Raise ConfigError unless ids count from 0."""
    if data.dialect == "hash":
        raise ConfigError(
            f"{method} needs ids that count from 0, and these data hold hashed ones; prepare them with "
            "`python run.py prepare FILE --ids dictionary --out DIR`, or train --method robe"
        )


def initial_rows(config: TrainConfig, data: DataSpec) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first, rows (n, D) float32) of all tables in turn, uniform as in the DLRM."""
    width, start, rng = config.model.width, 0, np.random.default_rng([config.seed, 1])
    for rows in data.cardinalities:
        bound, end = np.float32(config.embedding.init_bound or 1 / np.sqrt(rows)), start + rows
        while start < end:
            count = min(end - start, max(1, CHUNK // width))
            yield start, (2 * rng.random((count, width), np.float32) - 1) * bound
            start += count


def table_base(data: DataSpec) -> np.ndarray:
    """(F,) uint64: the rows of all tables before that of a feature."""
    return np.cumsum((0, *data.cardinalities))[: len(data.cardinalities)].astype(np.uint64)


def full_table(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> ArrayEmbedding:
    require_numbered(data, "a full table")
    width, rows = config.model.width, sum(data.cardinalities)
    memory = np.empty((rows, width), dtype)
    for start, drawn in initial_rows(config, data):
        memory[start : start + len(drawn)] = drawn
    return ArrayEmbedding(
        "full" if data.cardinalities else "none",
        backend.to_device(memory.reshape(-1)),
        backend.to_device(table_base(data)),
        slot_map("table", width, 1, max(1, rows * width), signed=False),
        config.optimizer,
        backend,
        rows * width,
        f"{rows:,} rows ({data.note})",
        np.array(data.cardinalities, np.uint32),
    )
