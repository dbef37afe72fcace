"""A table of quantised rows, and a float32 cache in which the rows in use are trained (Yang et al., 2020,
arXiv 2010.11305).

A step trains the rows of its batch in the cache; a row that leaves it is rounded at random, so that steps too
small for its codes count on average. Where a batch wants more rows of one set than it has ways, those left
over are stepped in the table and rounded at once; with --cache 0 all rows are.

A look-up reads a row where it is: in the cache exactly as it is trained, else in the table. It changes
nothing, so evaluation disturbs no training, and judges the very weights that are trained. `flush` writes the
cache back and empties it; what is then read is the table alone.

Adagrad keeps one sum of squared gradients a row, that of their mean over the row, in float32 for every row,
as FBGEMM's row-wise Adagrad does. Sums for the rows of the cache only, forgotten when a row leaves it, would
be nearer to the idea of the paper, but cost 0.047 of AUC in a run on synthetic data: rows that come back take
first steps again and again. Element by element they would also take more memory, from D = 20 on at 5%.

The table and the cache lie in the same memory, so rows are not fetched before their batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, OptimizerConfig, TrainConfig
from robe.embeddings.array import check_rows, flawed_codes
from robe.embeddings.declared import Array, Declared
from robe.embeddings.tables import initial_bounds, initial_random, initial_rows, table_base
from robe.kernels.admit import COUNTED
from robe.kernels.parts.cache import EMPTY, WAYS, hash_row, set_of
from robe.kernels.parts.codes import Form, row_bytes
from robe.kernels.parts.half import rounding_key
from robe.optim import rounded_rule


@dataclass(frozen=True)
class CachedTable:
    """The rows of all tables in `form`, of which `sets` * WAYS are in the cache."""

    rows: int
    features: int
    form: Form
    sets: int

    @property
    def count(self) -> int:
        """Weights that are stored."""
        return self.rows * self.form.width

    def arrays(self, config: TrainConfig, dtype="float32") -> dict[str, Array]:
        """Name -> each of its arrays. dtype: is not asked; the cache is float32."""
        lines, look_ups = self.sets * WAYS, config.batch * self.features
        adagrad = "accumulator" in rounded_rule(config.optimizer).state
        cache, scratch = "embedding cache", "embedding scratch"
        return {
            "table": Array((self.rows, row_bytes(self.form)), "uint8", "embedding weights"),
            "tags": Array((self.sets, WAYS), "uint32", cache, fill=EMPTY),
            "used": Array((self.sets, WAYS), "uint32", cache),
            "values": Array((lines, self.form.width), "float32", cache),
            "accumulator": Array((self.rows * adagrad,), "float32", "embedding optimizer state", adagrad),
            "counters": Array((self.features, len(COUNTED)), "int64", "embedding counters"),
            "sorted": Array((2, look_ups), "uint32", scratch, kept=False),
            "lines": Array((2, look_ups), "int64", scratch, kept=False),
        }


@dataclass
class MixedPrecisionEmbedding(Declared):
    """`table` (R, S) of quantised rows, of which some are in the cache; row = base[f] + id.

    arrays: of CachedTable.arrays; those besides `table` are made here.
    draw: number of a pass, from 0 on -> its initial rows in pieces, (number of the first, (n, D) float32).
    seed, steps: what rows are rounded by; steps, the updates so far, is set by who resumes a training.
    held: what `changing` gives, in arrays (1,) on the device, where an update is to read them there.
    """

    table: Any  # (R, S) uint8
    arrays: dict[str, Array]
    form: Form
    least_used: bool  # LFU, not LRU
    base: Any  # (F,) uint64
    optimizer: OptimizerConfig
    backend: Backend
    table_note: str
    rows: np.ndarray  # (F,) of each feature
    draw: Callable[[int], Iterator[tuple[int, np.ndarray]]]
    seed: int
    steps: int = field(init=False, default=0)
    held: Sequence = field(init=False, default=())
    tags: Any = field(init=False)  # (sets, WAYS) uint32
    used: Any = field(init=False)  # (sets, WAYS) uint32
    values: Any = field(init=False)  # (sets * WAYS, D) float32
    accumulator: Any = field(init=False)  # (R,) float32 for Adagrad, else (0,)
    counters: Any = field(init=False)  # (F, len(COUNTED)) int64
    sorted: Any = field(init=False)  # (2, B * F) uint32, scratch: hashes and look-ups of a batch
    lines: Any = field(init=False)  # (2, B * F) int64, scratch: where in `values` its rows are, and who was

    method = "mixed_precision"
    looks_up_by = "cached_gather"
    adds: ClassVar[Literal[False]] = False
    counts_look_ups: ClassVar[bool] = True

    def __post_init__(self):
        self.make_arrays()
        self.begin(0)

    def begin(self, number: int) -> None:
        """As of ArrayEmbedding; the cache is empty then, too. What was counted stays."""
        kernels, to_device = self.backend.kernels, self.backend.to_device
        for start, drawn in self.draw(number):
            rows = np.arange(start, start + len(drawn), dtype=np.uint32)
            drawn, rows = to_device(drawn), to_device(rows)
            kernels.quantise(drawn, rows, rounding_key(self.seed, 0), self.form, self.table)
        for name in ("tags", "used", "values", "accumulator"):
            getattr(self, name)[...] = self.arrays[name].fill

    @property
    def sets(self) -> int:
        return len(self.tags)

    @property
    def weights(self) -> int:
        return int(self.table.shape[0]) * self.width

    @property
    def parts(self) -> dict[str, "MixedPrecisionEmbedding"]:
        """As of ComposedEmbedding: itself alone."""
        return {"": self}

    @property
    def features(self) -> int:
        return len(self.base)

    @property
    def width(self) -> int:
        return self.form.width

    def check(self, ids: np.ndarray, features: np.ndarray | None = None) -> None:
        """Raise ConfigError if an id (B, F), still on the host, has no row: kernels would read elsewhere."""
        check_rows(ids, self.rows, features)

    def lookup(self, ids, out, features=None) -> None:
        """Write the vectors of `ids` (B, F) to `out` (B, F, D)."""
        self.backend.kernels.cached_gather(*self.operands(ids, features), out)

    def update(self, ids, d_vectors, rate: float, features=None) -> None:
        """One optimizer step on the rows that `ids` (B, F) name; d_vectors (B, F, D)."""
        kernels = self.backend.kernels
        keys, order = self.scratch("sorted", ids.size)
        line, before = self.scratch("lines", ids.size)
        number, key = self.held or self.changing()
        self.steps += 1
        ids, base = self._rows(ids, features)
        kernels.sort_rows(ids, base, keys, order)
        cache = (self.tags, self.used, self.counters)
        kernels.admit(keys, order, ids, self.base, self.least_used, number, *cache, line, before)
        step = (rate, self.optimizer.eps, key, self.form)
        state = (self.table, self.values, self.accumulator)
        kernels.cached_step(d_vectors, order, line, before, ids, base, *step, *state)

    def _rows(self, ids, features) -> tuple:
        """(ids (B, F), base), or of ids (N, 1) of features (N,): (rows of the table, (N, 1), 0)."""
        if features is None:
            return ids, self.base
        return (self.base[features][:, None] + ids).astype("uint32"), self.base[:1]

    def changing(self) -> tuple:
        """What the next update takes that is another number each time: its own, from 1 on, and a key."""
        number = self.steps + 1
        return np.uint32(number), rounding_key(self.seed, number)

    def flaw(self) -> str | None:
        """What is wrong with the table, the tags or the counters, if anything.

        Kernels write where the tags say, and look for a row in its own set alone.
        """
        tags, counters = self.backend.to_host(self.tags), self.backend.to_host(self.counters)
        sets, ways = np.nonzero(tags != EMPTY)
        rows = tags[sets, ways]
        if (wrong := np.flatnonzero(rows >= len(self.table))).size:
            return f"its cache holds row {rows[wrong[0]]} of a table of {len(self.table)}"
        if (wrong := np.flatnonzero(set_of(hash_row(rows), self.sets) != sets)).size:
            return f"its cache holds row {rows[wrong[0]]} in a set that is not its own"
        if np.unique(rows).size < rows.size:
            return "its cache holds a row twice"
        if (counters < 0).any():
            return "it has counted fewer look-ups or rows than none"
        return flawed_codes(self.table, self.form, self.backend)

    def flush(self) -> None:
        """Write all rows of the cache back to the table, and empty it."""
        self.write_back(self.table)
        self.tags[...] = EMPTY

    def write_back(self, table) -> None:
        """Write all rows of the cache to a table, (R, S) as its own."""
        key = rounding_key(self.seed, self.steps + 1)
        self.backend.kernels.quantise(self.values, self.tags.reshape(-1), key, self.form, table)

    def copy_codes(self, memory) -> bool:
        """Write the table, with what the cache holds, to an array of the same codes; whether it is one.

        What the cache holds is rounded as in training.
        """
        if memory.dtype != self.table.dtype or memory.shape != self.table.shape:
            return False
        memory[...] = self.table
        self.write_back(memory)
        return True

    @property
    def unit(self) -> int:
        """Weights can be read from multiples of this on."""
        return self.width

    def read(self, start: int, stop: int) -> np.ndarray:
        """Weights (stop - start,) float32 as look-ups read them; `start` begins a row."""
        rows = np.arange(start // self.width, stop // self.width, dtype=np.uint32)[:, None]
        out = np.empty((len(rows), 1, self.width), np.float32)
        where = self.table, self.form, self.tags, self.values
        self.backend.kernels.cached_gather(*where, rows, np.zeros(1, np.uint64), out)
        return out.reshape(-1)

    def operands(self, ids, features=None) -> tuple:
        return self.table, self.form, self.tags, self.values, *self._rows(ids, features)

    def counts(self) -> dict[str, int]:
        """Of all features: look-ups that hit and missed; rows loaded, evicted, or stepped in the table; and
        the bytes of rows that this moved."""
        totals = self.backend.to_host(self.counters).sum(axis=0).tolist()
        return _with_bytes(dict(zip(COUNTED, totals, strict=True)), self.table.shape[1])

    def describe(self) -> dict:
        """Numbers for the summary; `compression` is of the bytes, those of the cache included."""
        bytes_of, full = self.bytes(), 4 * self.weights
        stored = bytes_of["embedding weights"] + bytes_of["embedding cache"]
        counters = self.backend.to_host(self.counters).tolist()
        return {
            "method": self.method,
            "embedding_parameters": self.weights,
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


def declare(config: TrainConfig, data: DataSpec) -> dict[str, CachedTable]:
    rows, features = sum(data.cardinalities), len(data.cardinalities)
    return {"": CachedTable(rows, features, form_of(config), cache_sets(config, data))}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> MixedPrecisionEmbedding:
    declared = declare(config, data)[""]
    rows, form, arrays = declared.rows, declared.form, declared.arrays(config)
    if rows >= EMPTY:
        raise ConfigError(
            f"{rows:,} rows are too many for a mixed-precision table; it has room for {EMPTY:,}"
        )
    bounds = initial_bounds(config, data)
    return MixedPrecisionEmbedding(
        table=backend.empty(arrays["table"].shape, "uint8"),
        arrays=arrays,
        form=form,
        least_used=config.embedding.policy == "lfu",
        base=backend.to_device(table_base(data.cardinalities)),
        optimizer=config.optimizer,
        backend=backend,
        table_note=f"{rows:,} rows of float32 ({data.note})",
        rows=np.array(data.cardinalities, np.uint32),
        draw=lambda number: initial_rows(
            data.cardinalities, bounds, form.width, initial_random(config, 1, number)
        ),
        seed=config.seed,
    )
