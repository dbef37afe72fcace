"""Embeddings that are one array of weights and a map from (feature, id, element) to a slot of it.

The ROBE array and tables differ only in the map, in the initial weights and in which rows stand for an id.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.config import CODE_BITS, ConfigError, EmbeddingConfig, OptimizerConfig
from robe.kernels.parts.codes import Form, row_bytes
from robe.kernels.parts.groups import GROUP, group_length, quantised
from robe.kernels.parts.half import rounding_key
from robe.kernels.parts.hashing import SlotMap


def check_rows(ids: np.ndarray, rows: np.ndarray | None) -> None:
    """Raise ConfigError if an id (B, F) is not below rows (F,); None where any has a place."""
    if rows is not None and (ids >= rows).any():
        b, f = np.argwhere(ids >= rows)[0]
        raise ConfigError(
            f"feature {f} has {rows[f]} rows, but an id of the data is {ids[b, f]}; the shards are "
            "not those of the manifest, prepare the data again"
        )


def group_form(config: EmbeddingConfig, length: int = int(GROUP)) -> Form | None:
    """How groups of `length` weights are stored, to the nearest; None where weights are floats."""
    return Form(CODE_BITS[config.memory], False, length) if config.memory in CODE_BITS else None


def no_groups(weights: int, form: Form) -> np.ndarray:
    """An array of codes for so many weights, all 0: only what was trained before is loaded to it."""
    return np.zeros((-(-weights // form.width), row_bytes(form)), np.uint8)


@dataclass
class ArrayEmbedding:
    """`memory` (M,) read through `slot_map`; a row is token = base[f] + id.

    table_weights: weights of the full table this stands for, and `table_note` says which table that is.
    rows: ids of each feature; None where any 32-bit id has a place.
    place: ids (B, F) -> the rows (B, F * chunks) that stand for them; None where they are these rows.
    chunks: rows that make a vector, one behind the other.
    seed, steps: what halves are rounded by; steps, the updates so far, is set by who resumes a training.
    """

    method: str
    memory: Any  # (M,) float, or float16; or (R, S) uint8 of kernels/parts/groups.py, for inference
    base: Any  # (F,) uint64
    slot_map: SlotMap
    optimizer: OptimizerConfig
    backend: Backend
    table_weights: int
    table_note: str
    rows: np.ndarray | None = None  # (F,)
    place: Callable[[Any], Any] | None = None
    chunks: int = 1
    seed: int = 0
    steps: int = field(init=False, default=0)
    accumulator: Any = field(init=False)  # (M,) sum of squared gradients, for Adagrad; else (0,)
    gradient: Any = field(init=False)  # (M,) scratch, all 0 between steps, for Adagrad and halves; else (0,)

    def __post_init__(self):
        summed = self.adagrad or (self.halves and self.optimizer.optimizer != "none")
        self.accumulator = self.backend.xp.zeros(self.weights * self.adagrad, self.dtype)
        self.gradient = self.backend.xp.zeros(self.weights * summed, self.dtype)

    @property
    def weights(self) -> int:
        if not quantised(self.memory):
            return int(self.memory.size)
        # The last group of an array may not be full; the map of an empty table has one weight.
        return min(int(self.slot_map.memory), len(self.memory) * int(group_length(self.slot_map)))

    @property
    def dtype(self):
        """What a weight is read as."""
        return "float32" if self.halves or quantised(self.memory) else self.memory.dtype

    @property
    def halves(self) -> bool:
        return self.memory.dtype == "float16"

    @property
    def adagrad(self) -> bool:
        return self.optimizer.optimizer == "adagrad" and not quantised(self.memory)

    @property
    def features(self) -> int:
        return len(self.base) // self.chunks

    @property
    def width(self) -> int:
        return self.chunks * int(self.slot_map.width)

    def check(self, ids: np.ndarray) -> None:
        """Raise ConfigError if an id (B, F), still on the host, has no row: kernels would read elsewhere."""
        check_rows(ids, self.rows)

    def lookup(self, ids, out) -> None:
        """Write the vectors of `ids` (B, F) to `out` (B, F, D)."""
        self.backend.kernels.gather(self.memory, *self._placed(ids), self._apart(out))

    def interact(self, ids, first, out) -> None:
        """Write the interaction of `first` (B, D) and the vectors of `ids` (B, F) to `out`."""
        if self.chunks > 1:
            return interact_apart(self, ids, first, out)
        self.backend.kernels.gather_interaction(self.memory, *self._placed(ids), first, out)

    def backward(self, d_out, vectors, ids, rate: float, d_vectors) -> None:
        """One optimizer step from the gradient d_out by the interaction of `vectors` (B, 1 + F, D).

        d_vectors (B, 1 + F, D): its [:, 0] is the gradient by vector 0 afterwards, the rest is room for the
        others. On a GPU, SGD adds these to the weights at once; halves and Adagrad need their sums first.
        """
        kernels = self.backend.kernels
        if self.backend.name == "cuda" and not (self.adagrad or self.halves or self.chunks > 1):
            rows = self._placed(ids)
            kernels.interaction_scatter(d_out, vectors, *rows, -rate, d_vectors[:, 0], self.memory)
            self.steps += 1
        else:
            backward_apart(self, d_out, vectors, ids, rate, d_vectors)

    def update(self, ids, d_vectors, rate: float) -> None:
        """One optimizer step on the weights that `ids` (B, F) touch; d_vectors (B, F, D)."""
        kernels, rows, d_vectors = self.backend.kernels, self._placed(ids), self._apart(d_vectors)
        state = (self.gradient, self.accumulator, self.memory)
        if self.halves:
            kernels.scatter_add(d_vectors, *rows, 1, self.gradient)
            key = rounding_key(self.seed, self.steps)
            kernels.half_step(*rows, rate, self.optimizer.eps, key, *state)
        elif self.adagrad:
            kernels.scatter_add(d_vectors, *rows, 1, self.gradient)
            kernels.adagrad_step(*rows, rate, self.optimizer.eps, *state)
        else:
            kernels.scatter_add(d_vectors, *rows, -rate, self.memory)
        self.steps += 1

    def _placed(self, ids) -> tuple:
        return ids if self.place is None else self.place(ids), self.base, self.slot_map

    def _apart(self, vectors):
        """Vectors (B, F, D) as the chunks they are made of, a view."""
        if self.chunks == 1:
            return vectors
        return vectors.reshape(len(vectors), len(self.base), int(self.slot_map.width))

    def state(self) -> dict[str, Any]:
        state = {"embedding.memory": self.memory}
        return state | ({"embedding.accumulator": self.accumulator} if self.adagrad else {})

    def bytes(self) -> dict[str, int]:
        return {
            "embedding weights": self.memory.nbytes,
            "embedding optimizer state": self.accumulator.nbytes,
            "embedding gradient scratch": self.gradient.nbytes,
        }

    def counts(self) -> dict[str, int]:
        return {}

    def describe(self) -> dict:
        """Numbers for the summary; `compression` is against the table that `compressed_from` names."""
        return description(self, self.weights, int(self.memory.nbytes))


def description(embedding, stored: int, size: int) -> dict:
    """`describe` of an embedding that stores so many weights in so many bytes."""
    table = embedding.table_weights
    return {
        "method": embedding.method,
        "embedding_parameters": stored,
        "embedding_bytes": size,
        "compression": table / stored if stored else None,
        "compressed_from": f"{table:,} weights: {embedding.table_note}, width {embedding.width}",
    }


def interact_apart(embedding, ids, first, out) -> None:
    """`interact` where no kernel does both at once."""
    vectors = embedding.backend.empty((len(ids), 1 + embedding.features, embedding.width), first.dtype)
    vectors[:, 0] = first
    embedding.lookup(ids, vectors[:, 1:])
    embedding.backend.kernels.interaction(vectors, out)


def backward_apart(embedding, d_out, vectors, ids, rate: float, d_vectors) -> None:
    """`backward`, likewise."""
    embedding.backend.kernels.interaction_backward(d_out, vectors, d_vectors)
    embedding.update(ids, d_vectors[:, 1:], rate)
