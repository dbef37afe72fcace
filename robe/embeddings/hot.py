"""Exact rows for the first ids of each feature, and a ROBE array for all the others, in one array of weights.

The first ids are the most frequent ones, as in `frequency.py`. (The idea is that of CAFE, arXiv 2312.03256,
Zhang et al., which finds them in the stream, and whose other ids share rows that they are hashed to.) As many
ids of each feature have rows as fit into their share of the weights: the largest tables are all cut to one
size. Behind them the others are read as by `robe.py`: the family `hot` of kernels/parts/hashing.py.
"""

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, TrainConfig, robe_weights
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.declared import Weights
from robe.embeddings.robe import array_of_blocks, initial_bound
from robe.embeddings.tables import cut, initial_bounds, table_base, whole
from robe.kernels.parts.groups import GROUP
from robe.kernels.parts.hashing import ALIGNED, front_of

# Compression -> share of the weights that are exact rows, as CAFE chose them for Criteo.
SHARES = {10: 0.5, 100: 0.7, 1000: 0.8, 10_000: 0.9}


def share_of(config: TrainConfig, data: DataSpec, weights: int) -> float:
    """The share that is asked for, or what SHARES say of this compression, or of those next to it."""
    if config.embedding.hot_share is not None:
        return config.embedding.hot_share
    compression = sum(data.cardinalities) * config.model.width / weights
    return float(np.interp(np.log(compression), np.log(list(SHARES)), list(SHARES.values())))


def exact_rows(config: TrainConfig, data: DataSpec, weights: int) -> np.ndarray:
    """(F,): how many ids of each feature have a row, of so many weights in all."""
    width, block = config.model.width, config.embedding.block
    share = share_of(config, data, weights)
    # So many that the weights in front of the ring are no more than their share.
    rows = cut(np.array(data.cardinalities), int(share * weights) // ALIGNED * ALIGNED // width)
    if (left := weights - front_of(int(rows.sum()), width)) < block:
        raise ConfigError(
            f"--hot-share {share:g} leaves {left} of {weights} weights for all other ids, less than a block "
            f"of {block}; give more weights, a smaller --block or a smaller --hot-share"
        )
    return rows


def declare(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    """The exact rows of each feature, and last the array behind them; as rows of one weight."""
    settings, width = config.embedding, config.model.width
    weights = robe_weights(settings, width, data.cardinalities)
    exact = exact_rows(config, data, weights) * width
    counts = np.append(exact, weights - exact.sum())
    return {"": Weights(counts, width=1, group=int(GROUP), block=settings.block)}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ArrayEmbedding:
    xp, weights = backend.xp, declare(config, data)[""]
    rows = weights.rows[:-1] // config.model.width
    exact, shift = int(rows.sum()), table_base(rows)
    bound = config.embedding.init_bound or initial_bound(data.cardinalities)
    bounds = np.append(initial_bounds(config, data), bound)
    rows, shift = (backend.to_device(each.astype(np.uint32)) for each in (rows, shift))
    behind = xp.uint32(exact)

    def row_of(ids):
        return xp.where(ids < rows, ids + shift, ids + behind)

    return array_of_blocks(
        weights, bounds, config, data, backend, dtype, "hot", exact, row_of=row_of, **whole(config, data)
    )
