"""The ROBE array (Desai et al., arXiv 2108.02191): M shared weights for every element of every table."""

import math
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, TrainConfig, robe_weights
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.declared import Weights
from robe.embeddings.tables import initial_array, whole
from robe.kernels.parts.groups import GROUP
from robe.kernels.parts.hashing import slot_map


def initial_bound(cardinalities: tuple[int, ...]) -> float:
    """Bound a of the initial weights, uniform in (-a, a).

    A full DLRM table of n rows starts in (-1/sqrt(n), 1/sqrt(n)). Every element read from the array has
    the law of the array's weights, so one bound serves all tables; this one gives the virtual table the
    energy that the full tables have together: a^2 * sum(n) = sum(n * 1/n) = F. The published code takes
    1/sqrt(largest n), which is close, since the large tables make up nearly all rows. Drawing a full
    table and projecting it would not do: its variance grows by the compression.
    """
    return math.sqrt(len(cardinalities) / sum(cardinalities))


def token_base(config: TrainConfig, data: DataSpec) -> np.ndarray:
    """(F,) uint64: what is added to an id to make its token.

    feature * 2^32 needs no cardinalities. The published hash counts rows on from table to table, so with
    `affine` and ids from 0 on the base is the sum of the cardinalities before the feature.
    """
    if config.embedding.hash == "affine" and data.dialect != "hash":
        return np.cumsum((0, *data.cardinalities[:-1])).astype(np.uint64)
    return np.arange(len(data.cardinalities), dtype=np.uint64) << np.uint64(32)


def declare(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    weights = robe_weights(config.embedding, config.model.width, data.cardinalities)
    return {"": Weights(np.array([weights]), width=1, group=int(GROUP), block=config.embedding.block)}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ArrayEmbedding:
    bounds = [config.embedding.init_bound or initial_bound(data.cardinalities)]
    weights = declare(config, data)[""]
    facts = whole(config, data) | {"rows": None}  # any id can be looked up
    return array_of_blocks(weights, bounds, config, data, backend, dtype, config.embedding.hash, **facts)


def array_of_blocks(
    weights: Weights,
    bounds,
    config: TrainConfig,
    data: DataSpec,
    backend: Backend,
    dtype: str,
    family: str,
    exact: int = 0,
    kind: type[ArrayEmbedding] = ArrayEmbedding,
    **facts: Any,
) -> ArrayEmbedding:
    """An array that is read by a map of that family, and starts uniform in (-bound, bound), `bounds` (T,).

    exact: of slot_map; kind: the class to make; facts: what else it is told.
    """
    settings = config.embedding
    how = family, config.model.width, settings.block, weights.count, settings.hash_seed, settings.sign
    try:
        where = slot_map(*how, exact)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return kind(
        method=settings.method,
        **initial_array(weights, bounds, config, backend, dtype),
        weights=weights.count,
        base=backend.to_device(token_base(config, data)),
        slot_map=where,
        optimizer=config.optimizer,
        backend=backend,
        seed=config.seed,
        **facts,
    )
