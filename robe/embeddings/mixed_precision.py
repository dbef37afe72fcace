"""A table of quantised rows, and a float32 cache in which the rows in use are trained (Yang et al., 2020,
arXiv 2010.11305).

A step trains the rows of its batch in the cache; a row that leaves it is rounded at random, so that steps too
small for its codes count on average. Rows that find no place, because the batch wants more rows of one set
than it has ways, are stepped in the table and rounded at once; with --cache 0 all are.

A look-up reads a row where it is: in the cache exactly as it is trained, else in the table. It changes
nothing, so evaluation disturbs no training, and judges the very weights that are trained. `flush` writes the
cache back and empties it; what is then read is the table alone.

Adagrad keeps one sum of squared gradients a row, that of their mean over the row, in float32 for every row,
as FBGEMM's row-wise Adagrad does. Sums for the rows of the cache only, forgotten when a row leaves it, would
be nearer to the idea of the paper, but cost 0.047 of AUC in a run on synthetic data: rows that come back take
first steps again and again. Element by element they would also take more memory, from D = 20 on at 5%.

The table and the cache lie in the same memory, so rows are not fetched before their batch.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, OptimizerConfig, TrainConfig
from robe.embeddings.array import check_rows
from robe.embeddings.tables import initial_bounds, initial_rows, table_base
from robe.kernels.admit import COUNTED
from robe.kernels.parts.cache import EMPTY, WAYS
from robe.kernels.parts.codes import Form, row_bytes
from robe.kernels.parts.half import rounding_key


@dataclass
class MixedPrecisionEmbedding:
    """`table` (R, S) of quantised rows, of which `sets` * WAYS are in the cache; row = base[f] + id.

    seed, steps: what rows are rounded by; steps, the updates so far, is set by who resumes a training.
    """

    table: Any  # (R, S) uint8
    form: Form
    sets: int
    least_used: bool  # LFU, not LRU
    base: Any  # (F,) uint64
    optimizer: OptimizerConfig
    backend: Backend
    table_note: str
    rows: np.ndarray  # (F,) of each feature
    batch: int  # rows of a batch of training
    seed: int
    steps: int = field(init=False, default=0)
    tags: Any = field(init=False)  # (sets, WAYS) uint32
    used: Any = field(init=False)  # (sets, WAYS) uint32
    values: Any = field(init=False)  # (sets * WAYS, D) float32
    accumulator: Any = field(init=False)  # (R,) float32 for Adagrad, else (0,)
    counters: Any = field(init=False)  # (F, len(COUNTED)) int64
    sorted: Any = field(init=False)  # (2, B * F) uint32, scratch: hashes and look-ups of a batch
    places: Any = field(init=False)  # (2, B * F) int64, scratch: where its rows are, and who was there

    def __post_init__(self):
        zeros, lines, look_ups = self.backend.xp.zeros, self.sets * WAYS, self.batch * self.features
        adagrad = self.optimizer.optimizer == "adagrad"
        self.tags = self.backend.xp.full((self.sets, WAYS), EMPTY)
        self.used = zeros((self.sets, WAYS), "uint32")
        self.values = zeros((lines, self.width), "float32")
        self.accumulator = zeros(len(self.table) * adagrad, "float32")
        self.counters = zeros((self.features, len(COUNTED)), "int64")
        self.sorted = self.backend.empty((2, look_ups), "uint32")
        self.places = self.backend.empty((2, look_ups), "int64")

    @property
    def features(self) -> int:
        return len(self.base)

    @property
    def width(self) -> int:
        return self.form.width

    def check(self, ids: np.ndarray) -> None:
        """Raise ConfigError if an id (B, F), still on the host, has no row: kernels would read elsewhere."""
        check_rows(ids, self.rows)

    def lookup(self, ids, out) -> None:
        """Write the vectors of `ids` (B, F) to `out` (B, F, D)."""
        self.backend.kernels.cached_gather(*self._where(ids), out)

    def interact(self, ids, first, out) -> None:
        """Write the interaction of `first` (B, D) and the vectors of `ids` (B, F) to `out`."""
        self.backend.kernels.cached_interaction(*self._where(ids), first, out)

    def backward(self, d_out, vectors, ids, rate: float, d_vectors) -> None:
        """As that of array.py: the gradient by the interaction, then `update`."""
        self.backend.kernels.interaction_backward(d_out, vectors, d_vectors)
        self.update(ids, d_vectors[:, 1:], rate)

    def update(self, ids, d_vectors, rate: float) -> None:
        """One optimizer step on the rows that `ids` (B, F) name; d_vectors (B, F, D)."""
        kernels = self.backend.kernels
        keys, order = self.sorted[:, : ids.size]
        place, before = self.places[:, : ids.size]
        self.steps += 1
        kernels.sort_rows(ids, self.base, keys, order)
        cache = (self.tags, self.used, self.counters)
        kernels.admit(
            *(keys, order, ids, self.base, self.least_used, self.steps, *cache, place, before),
        )
        step = (rate, self.optimizer.eps, rounding_key(self.seed, self.steps), self.form)
        state = (self.table, self.values, self.accumulator)
        kernels.cached_step(d_vectors, order, place, before, ids, self.base, *step, *state)

    def flush(self) -> None:
        """Write all rows of the cache back to the table, and empty it."""
        self.write_back(self.table)
        self.tags[...] = EMPTY

    def write_back(self, table) -> None:
        """Write all rows of the cache to a table, (R, S) as its own."""
        key = rounding_key(self.seed, self.steps + 1)
        self.backend.kernels.quantise(self.values, self.tags.reshape(-1), key, self.form, table)

    def _where(self, ids) -> tuple:
        return self.table, self.form, self.tags, self.values, ids, self.base

    def state(self) -> dict[str, Any]:
        names = ("table", "tags", "used", "values", "counters")
        names += ("accumulator",) * (len(self.accumulator) > 0)
        return {f"embedding.{name}": getattr(self, name) for name in names}

    def bytes(self) -> dict[str, int]:
        return {
            "embedding weights": self.table.nbytes,
            "embedding cache": self.values.nbytes + self.tags.nbytes + self.used.nbytes,
            "embedding optimizer state": self.accumulator.nbytes,
            "embedding counters": self.counters.nbytes,
            "embedding scratch": self.sorted.nbytes + self.places.nbytes,
        }

    def counts(self) -> dict[str, int]:
        """Of all features: look-ups that hit and missed; rows loaded, evicted, or stepped in the table; and
        the bytes of rows that this moved."""
        totals = self.backend.to_host(self.counters).sum(axis=0).tolist()
        return _with_bytes(dict(zip(COUNTED, totals, strict=True)), self.table.shape[1])

    def describe(self) -> dict:
        """Numbers for the summary; `compression` is of the bytes, those of the cache included."""
        bytes_of, full = self.bytes(), 4 * int(self.table.shape[0]) * self.width
        stored = bytes_of["embedding weights"] + bytes_of["embedding cache"]
        counters = self.backend.to_host(self.counters).tolist()
        return {
            "method": "mixed_precision",
            "embedding_parameters": int(self.table.shape[0]) * self.width,
            "embedding_bytes": stored,
            "compression": full / stored,
            "compressed_from": f"{full:,} B: {self.table_note}, width {self.width}",
            "cache": {
                "bytes": bytes_of["embedding cache"],
                **self.counts(),
                "features": [
                    _with_bytes(dict(zip(COUNTED, counts, strict=True)), self.table.shape[1])
                    for counts in counters
                ],
            },
        }


def _with_bytes(counts: dict[str, int], row: int) -> dict[str, int]:
    """And the bytes of rows of the table that were read to be loaded, written back, or both."""
    return counts | {"bytes_moved": row * (counts["loads"] + counts["evictions"] + 2 * counts["direct"])}


def form_of(config: TrainConfig) -> Form:
    settings = config.embedding
    return Form(settings.bits, settings.rounding == "stochastic", config.model.width)


def cache_sets(config: TrainConfig, data: DataSpec) -> int:
    """Sets of the cache: the share of the rows that was asked for, to the nearest set, but one where any."""
    settings = config.embedding
    share = settings.cache if settings.cache is not None else 0.01 if settings.bits == 4 else 0.05
    return max(1, round(share * sum(data.cardinalities) / WAYS)) if share else 0


def planned(config: TrainConfig, data: DataSpec) -> tuple[dict[str, int], int]:
    """(`bytes()` without allocating any of them, those that a checkpoint holds)."""
    form, lines = form_of(config), cache_sets(config, data) * WAYS
    rows, features = sum(data.cardinalities), len(data.cardinalities)
    held = {
        "embedding weights": rows * row_bytes(form),
        "embedding cache": (4 * form.width + 8) * lines,
        "embedding optimizer state": 4 * rows * (config.optimizer.optimizer == "adagrad"),
        "embedding counters": 8 * len(COUNTED) * features,
    }
    return held | {"embedding scratch": 24 * config.batch * features}, sum(held.values())


def mixed_precision(
    config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32"
) -> MixedPrecisionEmbedding:
    """dtype: is not asked; the cache is float32."""
    rows, form = sum(data.cardinalities), form_of(config)
    if rows >= EMPTY:
        raise ConfigError(
            f"{rows:,} rows are too many for a mixed-precision table; it has room for {EMPTY:,}"
        )
    table, key = backend.empty((rows, row_bytes(form)), "uint8"), rounding_key(config.seed, 0)
    rng, bounds = np.random.default_rng([config.seed, 1]), initial_bounds(config, data)
    for start, drawn in initial_rows(data.cardinalities, bounds, form.width, rng):
        numbers = np.arange(start, start + len(drawn), dtype=np.uint32)
        arrays = (backend.to_device(drawn), backend.to_device(numbers))
        backend.kernels.quantise(*arrays, key, form, table)
    return MixedPrecisionEmbedding(
        *(table, form, cache_sets(config, data), config.embedding.policy == "lfu"),
        *(backend.to_device(table_base(data.cardinalities)), config.optimizer, backend),
        f"{rows:,} rows of float32 ({data.note})",
        np.array(data.cardinalities, np.uint32),
        config.batch,
        config.seed,
    )
