"""Arrays in front of which some rows stand that belong to the ids that are hot, as a sketch of the ids says.

A step first trains the rows that its look-ups read. Then the sketch takes note of the batch
(kernels/space_saving.py), and the rows that it gives to other ids change hands. An id that becomes hot starts
from what the array behind says of it, in weights and in what the optimizer keeps: sums of squares that began
at 0 would make its first steps as long as those of a new model, where the weights are trained already.

An id that cools falls back to what the array says, and what its row learned since is lost. The array could be
given the difference, so that the id went on to read what its row had; but the ids that share these weights
would read it too. On a synthetic stream whose hot ids change (8 features of 20,000 ids, 400 batches of 256,
six seeds) that cost `hot` 0.020 of AUC at a compression of 1,000, with every seed, and 0.002 at 100.

A look-up changes nothing. Tags and importances are kept to serve, and counted as 4 bytes a weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding, description
from robe.embeddings.declared import Array, Weights
from robe.kernels.parts.cache import hash_token, set_of
from robe.kernels.parts.codes import NO_ROW
from robe.kernels.parts.hashing import LOW32, S32
from robe.kernels.space_saving import EMPTY, HOT, WAYS
from robe.optim import RULES, SQUARES

SKETCH = "embedding sketch"
STORED = ("tags", "importance", "halved")  # the arrays of the sketch


@dataclass(frozen=True)
class SketchedWeights(Weights):
    """Weights of an array with `sets` * HOT rows of hot ids in front.

    features: F.
    """

    sets: int = 0
    features: int = 0

    @property
    def summable(self) -> bool:
        return False

    def arrays(self, config: TrainConfig, dtype="float32") -> dict[str, Array]:
        optimizer = config.optimizer.optimizer
        if RULES[optimizer].grouped:
            raise ConfigError(
                f"--optimizer {optimizer} is not for rows that change hands (--method cafe, adaembed, hot "
                "--online), as weights of several share a sum; choose adagrad"
            )
        trained = RULES[optimizer].dense is not None
        look_ups, scratch = trained * config.batch * self.features, "embedding scratch"
        return super().arrays(config, dtype) | {
            "tags": Array((self.sets, WAYS), "uint64", SKETCH, fill=int(EMPTY)),
            "importance": Array((self.sets, WAYS), "float32", SKETCH),
            "halved": Array((self.sets,), "uint32", SKETCH),
            "sorted": Array((2, look_ups), "uint32", scratch, kept=False),
            "moved": Array((look_ups,), "int64", scratch, kept=False),
        }


def weights_of_a_set(width: int) -> int:
    """How many weights take as many bytes as the rows of a set and its part of the sketch."""
    return HOT * width + 3 * WAYS + 1


def sketch_facts(config: TrainConfig, data: DataSpec, backend: Backend, watched) -> dict[str, Any]:
    """What a SketchedEmbedding is told of its sketch; watched (F,): the features whose ids may be hot."""
    return {
        "tokens": backend.to_device(np.arange(len(watched), dtype=np.uint64) << S32),
        "scale": backend.to_device(watched.astype(np.float32)),
        "by_count": config.embedding.importance == "count",
        "half_life": config.embedding.half_life,
    }


@dataclass
class SketchedEmbedding(ArrayEmbedding):
    """An array whose first sets * HOT rows belong to hot ids.

    tokens: what is added to an id to make its token in the sketch.
    scale: how much a look-up of each feature counts: 1, or 0 where every id has a row anyway.
    by_count: look-ups count alike; else by the norm of their gradient.
    half_life: steps in which importances are halved.
    cold: (features, ids, alike or broadcast) -> the rows, uint32, that stand for ids which are not hot.
    """

    tokens: Any = None  # (F,) uint64
    scale: Any = None  # (F,) float32
    by_count: bool = False
    half_life: int = 1
    cold: Callable[[Any, Any], Any] | None = None
    tags: Any = field(init=False)  # (sets, WAYS) uint64
    importance: Any = field(init=False)  # (sets, WAYS) float32
    halved: Any = field(init=False)  # (sets,) uint32
    sorted: Any = field(init=False)  # (2, B * F) uint32, scratch: hashes and look-ups of a batch
    moved: Any = field(init=False)  # (B * F,) int64, scratch: rows that it gives to other ids

    carried: ClassVar[tuple[str, ...]] = STORED
    summable: ClassVar[Literal[False]] = False
    counts_look_ups: ClassVar[bool] = True

    def __post_init__(self):
        self.row_of = self._rows
        self.columns = self.backend.to_device(np.arange(len(self.tokens)))
        self.once = self.backend.xp.ones(1, "float32")
        self.all_watched = bool((self.scale > 0).all())
        super().__post_init__()
        self.adds = False

    def begin(self, number: int) -> None:
        """As of ArrayEmbedding; no id is hot then."""
        for name in STORED:
            getattr(self, name)[...] = self.arrays[name].fill
        super().begin(number)

    def _rows(self, ids, features):
        """The rows (B, F) that ids are read from."""
        rows, tokens, base, columns = self.backend.empty(ids.shape, "uint32"), ids, self.tokens, self.columns
        if not isinstance(features, slice):
            tokens, base, columns = base[features] + ids, base[:1], features
        self.backend.kernels.hot_rows(tokens, base, self.tags, rows)
        return self.backend.xp.where(rows == NO_ROW, self.cold(columns, ids), rows)

    def update(self, ids, d_vectors, rate: float, features=None) -> None:
        *_, period = self.held or self.changing()
        super().update(ids, d_vectors, rate, features)
        base, scale = self.tokens, self.scale
        if features is not None:
            if not self.all_watched:
                watched = self.backend.xp.flatnonzero(scale[features])
                ids, d_vectors, features = ids[watched], d_vectors[watched], features[watched]
            ids, base, scale = base[features][:, None] + ids, base[:1], self.once
        kernels, (keys, order) = self.backend.kernels, self.scratch("sorted", ids.size)
        moved = self.scratch("moved", ids.size)
        kernels.sort_rows(ids, base, keys, order)
        batch = keys, order, ids, base, d_vectors, scale, self.by_count, period
        kernels.space_saving(*batch, self.tags, self.importance, self.halved, moved)
        changed = self.backend.xp.flatnonzero(moved >= 0)
        if changed.size:
            self._move(moved[changed])

    def changing(self) -> tuple:
        """As of ArrayEmbedding, and last the period of the next update."""
        return *super().changing(), np.uint32(self.steps // self.half_life)

    def _move(self, rows) -> None:
        """Give hot rows (n,) to the ids that the sketch names."""
        to, where = self._slots(self.tags[:, :HOT].reshape(-1)[rows]), self.slot_map
        for name, kept in {"": self.stepped, **self.sums}.items():
            read_as = where._replace(signed=False) if name in SQUARES else where
            self._own(kept)[rows] = self._cold_vectors(kept, to, read_as)
        if self.master is not None:
            self._fill_up()
            self.backend.kernels.quantise_touched(
                rows.astype("uint32")[:, None], self.tokens[:1], where, self.master, self.memory
            )

    def _own(self, kept):
        """The rows of hot ids (sets * HOT, D), a view of an array like the weights."""
        return kept[: self.tags.shape[0] * HOT * self.width].reshape(-1, self.width)

    def _cold_vectors(self, kept, slots: tuple, slot_map):
        """What an array like the weights has for cold ids (n, D)."""
        found = self.backend.empty((len(slots[0]), 1, self.width), kept.dtype)
        self.backend.kernels.gather(kept, *slots, slot_map, found)
        return found[:, 0]

    def _slots(self, tokens) -> tuple:
        """Rows (n, 1) and base (1,) of cold ids, for a kernel; tokens (n,) of the sketch."""
        features, ids = (tokens >> S32).astype("int64"), (tokens & LOW32).astype("uint32")
        return (self.base[features] + self.cold(features, ids))[:, None], self.tokens[:1]

    def flaw(self) -> str | None:
        """What is wrong with the sketch or the codes, if anything.

        Kernels write where a tag lies, and look for a token in its own set alone.
        """
        tags = self.backend.to_host(self.tags)
        sets, ways = np.nonzero(tags != EMPTY)
        tokens = tags[sets, ways]
        if (wrong := np.flatnonzero(tokens >> S32 >= len(self.tokens))).size:
            return f"its sketch holds an id of feature {tokens[wrong[0]] >> S32} of {len(self.tokens)}"
        if (wrong := np.flatnonzero(set_of(hash_token(tokens), len(tags)) != sets)).size:
            return f"its sketch holds token {tokens[wrong[0]]} in a set that is not its own"
        if np.unique(tokens).size < tokens.size:
            return "its sketch holds an id twice"
        if (self.backend.to_host(self.importance) < 0).any():
            return "its sketch has an importance below 0"
        return super().flaw()

    def describe(self) -> dict:
        """As of ArrayEmbedding; the compression counts the sketch, as 4 bytes a weight."""
        sketch = self.bytes()[SKETCH]
        said = description(self, self.weights, int(self.memory.nbytes) + sketch)
        hot = self.backend.to_host(self.tags[:, :HOT])
        return said | {
            "compression": self.table_weights / (self.weights + sketch / 4),
            "hot": {"rows": hot.size, "in_use": int((hot != EMPTY).sum()), "sketch_bytes": sketch},
        }
