"""The tables that claims are tried on: drawn from laws, or trained."""

from pathlib import Path

import numpy as np

from robe import checkpoint
from robe.backend import select
from robe.config import ConfigError, DataSpec, EmbeddingConfig, TrainConfig, resolve
from robe.model import build

WIDTH = 16
ROWS_PER_FEATURE, FEATURES = 1000, 4


def zipf_rows(rows: int, exponent: float = 1.0) -> np.ndarray:
    """Scale of the rows of a Zipf table, the most frequent first."""
    return (1.0 + np.arange(rows)) ** -exponent


def vectors(
    n: int, rng: np.random.Generator, trained: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind -> two vectors (n,) of that kind. trained (rows, D) has 2n weights at least."""
    gauss = rng.normal(size=(2, n))
    scale = np.repeat(zipf_rows(-(-n // WIDTH)), WIDTH)[:n]
    kinds = {
        "flat": np.ones((2, n)),
        "gauss": gauss,
        "positive": np.abs(gauss),
        "sparse": gauss * (rng.random((2, n)) < 0.05),
        "heavy": rng.standard_t(2.5, (2, n)),
        "zipf": rng.normal(size=(2, n)) * scale,
        "trained": trained.ravel()[: 2 * n].reshape(2, n).astype(float),
    }
    return {kind: (pair[0], pair[1]) for kind, pair in kinds.items()}


def trained_table(run: Path | None = None, seed: int = 0, steps: int = 300) -> np.ndarray:
    """A trained table (rows, D): of a run with full tables, or of a small DLRM trained here.

    The small one learns clicks of a planted law, a sum of effects of Zipf-distributed ids; rows are in the
    order of frequency, feature by feature.
    """
    if run is not None:
        model, config, _, _ = checkpoint.load_model(run, "cpu")
        if (config.embedding.method, config.embedding.memory) != ("full", "fp32"):
            raise ConfigError(f"{run}: not a run with full tables in fp32; train one with --method full")
        return model.embedding.memory.reshape(-1, model.embedding.width)
    rng = np.random.default_rng([seed, 7])
    spec = DataSpec(13, (ROWS_PER_FEATURE,) * FEATURES, "dictionary", "", "planted")
    config = resolve(TrainConfig(embedding=EmbeddingConfig("full"), seed=seed))
    model = build(config, spec, select("cpu"))
    effects = rng.normal(size=(FEATURES, ROWS_PER_FEATURE))
    law = zipf_rows(ROWS_PER_FEATURE) / zipf_rows(ROWS_PER_FEATURE).sum()
    for _ in range(steps):
        ids = rng.choice(ROWS_PER_FEATURE, (config.batch, FEATURES), p=law).astype(np.uint32)
        logit = effects[np.arange(FEATURES), ids].sum(axis=1)
        label = (rng.random(config.batch) < 1 / (1 + np.exp(-logit))).astype(np.float32)
        model.step(label, rng.normal(size=(config.batch, 13)).astype(np.float32), ids, config.optimizer.lr)
    return model.embedding.memory.reshape(-1, model.embedding.width)
