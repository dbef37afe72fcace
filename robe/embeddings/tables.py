"""One table of rows per feature, all in one array; and how large each may be where not all fit whole."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, TrainConfig, budget
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.declared import Weights
from robe.kernels.parts.hashing import slot_map
from robe.optim import RULES

CHUNK = 2**27  # weights drawn at a time


def tables(
    weights: Weights,
    bounds,
    config: TrainConfig,
    data: DataSpec,
    backend: Backend,
    dtype: str,
    stream: int = 1,
    row_of: Callable[[Any, Any], Any] | None = None,
) -> ArrayEmbedding:
    """Tables whose rows start uniform in (-bound, bound), `bounds` (T,).

    stream: of random numbers; row_of: of ArrayEmbedding.
    """
    return ArrayEmbedding(
        method=config.embedding.method,
        **initial_array(weights, bounds, config, backend, dtype, stream),
        weights=weights.count,
        base=backend.to_device(table_base(weights.rows)),
        slot_map=slot_map("table", weights.width, 1, max(1, weights.count), signed=False),
        optimizer=config.optimizer,
        backend=backend,
        row_of=row_of,
        chunks=weights.chunks,
        seed=config.seed,
        **whole(config, data),
    )


def initial_array(
    weights: Weights, bounds, config: TrainConfig, backend: Backend, dtype: str, stream: int = 1
) -> dict[str, Any]:
    """What an ArrayEmbedding whose tables start uniform in (-bound, bound) takes of its arrays."""
    arrays = weights.arrays(config, dtype)
    declared = arrays["memory"]
    in_codes = declared.dtype == "uint8"
    memory = declared.make(backend.xp) if in_codes else backend.empty(declared.shape, declared.dtype)
    if in_codes and not RULES[config.optimizer.optimizer].dense:  # a converted checkpoint is loaded into it
        return {"memory": memory, "arrays": arrays}

    def draw(number: int) -> Iterator[tuple[int, np.ndarray]]:
        rng = initial_random(config, stream, number)
        for start, drawn in initial_rows(weights.rows, bounds, weights.width, rng):
            yield start * weights.width, drawn.reshape(-1)

    rounding = config.embedding.rounding if config.embedding.master == "none" else None
    return {"memory": memory, "arrays": arrays, "draw": draw, "rounding": rounding}


def initial_random(config: TrainConfig, stream: int, number: int) -> np.random.Generator:
    """What draws the initial weights of a pass over the data, from 0 on.

    Each pass has its own. The vector of a rare id hardly leaves where it began, so if it began there in each
    pass, the MLPs could learn by heart which label it had. A 0 at the end of a seed changes nothing, so the
    first pass begins as a training of one pass does.
    """
    return np.random.default_rng([config.seed, stream, number])


def initial_rows(rows, bounds, width: int, rng) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first, rows (n, width) float32) of all tables in turn."""
    start = 0
    for n, bound in zip(rows, bounds, strict=True):
        end = start + int(n)
        while start < end:
            count = min(end - start, max(1, CHUNK // width))
            yield start, (2 * rng.random((count, width), np.float32) - 1) * np.float32(bound)
            start += count


def table_base(rows) -> np.ndarray:
    """(T,) uint64: the rows of all tables before each."""
    return np.cumsum((0, *rows))[: len(rows)].astype(np.uint64)


def whole(config: TrainConfig, data: DataSpec) -> dict:
    """What an embedding must know of the full table it stands for."""
    rows = sum(data.cardinalities)
    return {
        "table_weights": rows * config.model.width,
        "table_note": f"{rows:,} rows ({data.note})",
        "rows": np.array(data.cardinalities, np.uint32) if data.dialect != "hash" else None,
    }


def initial_bounds(config: TrainConfig, data: DataSpec) -> np.ndarray:
    """(F,): the vectors of a feature of n values start uniform in (-1/sqrt(n), 1/sqrt(n)), as in the DLRM.

    Where they are made of several weights, their elements have that variance.
    """
    return np.array([config.embedding.init_bound or 1 / np.sqrt(n) for n in data.cardinalities])


def given(least: int, config: TrainConfig, data: DataSpec) -> int:
    """The budget in weights; raises ConfigError if it is below `least`."""
    weights = budget(config.embedding, config.model.width, data.cardinalities)
    if weights < least:
        raise ConfigError(
            f"--method {config.embedding.method} takes at least {least:,} weights for these data, and is "
            f"given {weights:,}; give more, or train --method robe"
        )
    return weights


def largest(size: Callable[[int], int], most: int, config: TrainConfig, data: DataSpec) -> int:
    """The largest n in 1 .. most whose size(n), in weights, fits the budget; size must not decrease.

    Raises ConfigError if size(1) does not fit.
    """
    return bisect_right(range(1, most + 1), given(size(1), config, data), key=size)


def cut(full: np.ndarray, most: int) -> np.ndarray:
    """(F,) rows of tables that have `most` rows together, of `full` (F,): the largest ones are all cut to as
    many rows, to within one."""
    cap = bisect_right(range(1, int(full.max()) + 1), most, key=lambda cap: int(np.minimum(full, cap).sum()))
    rows = np.minimum(full, cap)
    rows[np.flatnonzero(full > cap)[: most - int(rows.sum())]] += 1
    return rows


def capped_rows(config: TrainConfig, data: DataSpec) -> np.ndarray:
    """(F,) rows of tables within the budget."""
    width = config.model.width
    return cut(np.array(data.cardinalities), given(len(data.cardinalities) * width, config, data) // width)


def capped_tables(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    """Tables of `capped_rows`, as a method declares them that has no others."""
    return {"": Weights(capped_rows(config, data), config.model.width)}
