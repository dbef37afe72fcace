"""Exact rows for the first ids of each feature, and a ROBE array for all the others, in one array of weights.

The first ids are the most frequent ones, as in `frequency.py`. (The idea is that of CAFE, arXiv 2312.03256,
Zhang et al., which finds them in the stream, and whose other ids share rows that they are hashed to.) As many
ids of each feature have rows as fit into their share of the weights: the largest tables are all cut to one
size. Behind them the others are read as by `robe.py`: the family `hot` of kernels/parts/hashing.py.

Ids that no dictionary numbered (and with `online` others too) become hot in training, as in CAFE: a sketch
finds the important ones (sketched.py), which takes its part of the share of the weights.
"""

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, TrainConfig, robe_weights
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.declared import Weights
from robe.embeddings.robe import array_of_blocks, initial_bound
from robe.embeddings.sketched import (
    HOT,
    SketchedEmbedding,
    SketchedWeights,
    sketch_facts,
    weights_of_a_set,
)
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
    require_a_block(share, weights, weights - front_of(int(rows.sum()), width), block)
    return rows


def in_the_stream(config: TrainConfig, data: DataSpec) -> bool:
    """Whether a sketch finds the ids that are hot."""
    return config.embedding.online or data.dialect != "dictionary"


def sketched_weights(config: TrainConfig, data: DataSpec, weights: int) -> SketchedWeights:
    """As `declare` says it: rows that a sketch gives to ids, and the array behind; the sketch counted."""
    if config.embedding.memory == "fp16" and config.optimizer.optimizer != "none":
        raise ConfigError(
            "--memory fp16 of --method hot is for inference where a sketch finds the ids; train in fp32, "
            "then `robe convert RUN --to fp16 --out NEW`"
        )
    if config.average is not None:
        raise ConfigError(
            "--average is not for --method hot where a sketch finds the ids, since rows change hands; "
            "prepare the data with --ids dictionary and leave out --online, or leave out --average"
        )
    width, block, share = config.model.width, config.embedding.block, share_of(config, data, weights)
    sets = min(int(share * weights / weights_of_a_set(width)), -(-sum(data.cardinalities) // HOT))
    exact = sets * HOT * width
    array = weights - sets * (weights_of_a_set(width) - HOT * width) - exact
    require_a_block(share, weights, exact + array - front_of(sets * HOT, width), block)
    counts, features = np.array([exact, array]), len(data.cardinalities)
    return SketchedWeights(counts, 1, int(GROUP), block, sets=sets, features=features)


def require_a_block(share: float, weights: int, left: int, block: int) -> None:
    """Raise ConfigError where exact rows leave less than a block for all other ids."""
    if left < block:
        raise ConfigError(
            f"--hot-share {share:g} leaves {left} of {weights} weights for all other ids, less than a block "
            f"of {block}; give more weights, a smaller --block or a smaller --hot-share"
        )


def declare(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    """The exact rows of each feature, and last the array behind them; as rows of one weight."""
    settings, width = config.embedding, config.model.width
    weights = robe_weights(settings, width, data.cardinalities)
    if in_the_stream(config, data):
        return {"": sketched_weights(config, data, weights)}
    for name in ("importance", "half_life"):
        if getattr(settings, name) != vars(type(settings)())[name]:
            option = f"--{name.replace('_', '-')} {getattr(settings, name)}"
            raise ConfigError(f"{option} is for --online; without it the dictionary says which ids are hot")
    exact = exact_rows(config, data, weights) * width
    counts = np.append(exact, weights - exact.sum())
    return {"": Weights(counts, width=1, group=int(GROUP), block=settings.block)}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ArrayEmbedding:
    xp, weights = backend.xp, declare(config, data)[""]
    rows = weights.rows[:-1] // config.model.width
    exact, shift = int(rows.sum()), table_base(rows)
    bound = config.embedding.init_bound or initial_bound(data.cardinalities)
    made, facts = (config, data, backend, dtype, "hot", exact), whole(config, data)
    if isinstance(weights, SketchedWeights):
        last = xp.uint32(2**31)

        def cold(features, ids):
            # The map takes the numbers below `exact` for rows, so ids there have others.
            return xp.where(ids < exact, ids ^ last, ids)

        facts |= sketch_facts(config, data, backend, np.ones(len(data.cardinalities), bool))
        return array_of_blocks(weights, [0, bound], *made, SketchedEmbedding, cold=cold, **facts)
    bounds = np.append(initial_bounds(config, data), bound)
    rows, shift = (backend.to_device(each.astype(np.uint32)) for each in (rows, shift))
    behind = xp.uint32(exact)

    def row_of(ids, features):
        return xp.where(ids < rows[features], ids + shift[features], ids + behind)

    return array_of_blocks(weights, bounds, *made, row_of=row_of, **facts)
