"""The full table: one row of D weights for every id of every feature, as in the DLRM."""

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.kernels.hashing import slot_map


def full_table(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> ArrayEmbedding:
    if data.dialect == "hash":
        raise ConfigError(
            "a full table needs ids that count from 0, and these data hold hashed ones; prepare them with "
            "`python run.py prepare FILE --ids dictionary --out DIR`, or train --method robe"
        )
    width, rows = config.model.width, sum(data.cardinalities)
    rng = np.random.default_rng([config.seed, 1])
    memory = np.empty((rows, width), dtype)
    start = 0
    for n in data.cardinalities:
        bound = config.embedding.init_bound or 1 / np.sqrt(n)
        memory[start : start + n] = (2 * rng.random((n, width), np.float32) - 1) * np.float32(bound)
        start += n
    base = np.cumsum((0, *data.cardinalities[:-1])) if data.cardinalities else np.zeros(0)
    return ArrayEmbedding(
        "full" if data.cardinalities else "none",
        backend.to_device(memory.reshape(-1)),
        backend.to_device(base.astype(np.uint64)),
        slot_map("table", width, 1, max(1, rows * width), signed=False),
        config.optimizer,
        backend,
        rows * width,
        f"{rows:,} rows ({data.note})",
        np.array(data.cardinalities, np.uint32),
    )
