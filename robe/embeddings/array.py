"""Embeddings that are one array of weights and a map from (feature, id, element) to a slot of it.

The ROBE array and the full table differ only in the map and in the initial weights.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, OptimizerConfig
from robe.kernels.half import rounding_key
from robe.kernels.hashing import SlotMap


def check_rows(ids: np.ndarray, rows: np.ndarray | None) -> None:
    """Raise ConfigError if an id (B, F) is not below rows (F,); None where any has a place."""
    if rows is not None and (ids >= rows).any():
        b, f = np.argwhere(ids >= rows)[0]
        raise ConfigError(
            f"feature {f} has {rows[f]} rows, but an id of the data is {ids[b, f]}; the shards are "
            "not those of the manifest, prepare the data again"
        )


@dataclass
class ArrayEmbedding:
    """`memory` (M,) read through `slot_map`; a row is token = base[f] + id.

    table_weights: weights of the full table this stands for, and `table_note` says which table that is.
    rows: rows of each feature's table; None where any 32-bit id has a place.
    seed, steps: what halves are rounded by; steps, the updates so far, is set by who resumes a training.
    """

    method: str
    memory: Any  # (M,) float, or float16
    base: Any  # (F,) uint64
    slot_map: SlotMap
    optimizer: OptimizerConfig
    backend: Backend
    table_weights: int
    table_note: str
    rows: np.ndarray | None = None  # (F,)
    seed: int = 0
    steps: int = field(init=False, default=0)
    accumulator: Any = field(init=False)  # (M,) sum of squared gradients, for Adagrad; else (0,)
    gradient: Any = field(init=False)  # (M,) scratch, all 0 between steps, for Adagrad and halves; else (0,)

    def __post_init__(self):
        dtype, size = "float32" if self.halves else self.memory.dtype, self.memory.size
        self.accumulator = self.backend.xp.zeros(size * self.adagrad, dtype)
        self.gradient = self.backend.xp.zeros(size * (self.adagrad or self.halves), dtype)

    @property
    def halves(self) -> bool:
        return self.memory.dtype == "float16"

    @property
    def adagrad(self) -> bool:
        return self.optimizer.optimizer == "adagrad"

    @property
    def features(self) -> int:
        return len(self.base)

    @property
    def width(self) -> int:
        return int(self.slot_map.width)

    def check(self, ids: np.ndarray) -> None:
        """Raise ConfigError if an id (B, F), still on the host, has no row: kernels would read elsewhere."""
        check_rows(ids, self.rows)

    def lookup(self, ids, out) -> None:
        """Write the vectors of `ids` (B, F) to `out` (B, F, D)."""
        self.backend.kernels.gather(self.memory, ids, self.base, self.slot_map, out)

    def interact(self, ids, first, out) -> None:
        """Write the interaction of `first` (B, D) and the vectors of `ids` (B, F) to `out`."""
        self.backend.kernels.gather_interaction(self.memory, ids, self.base, self.slot_map, first, out)

    def backward(self, d_out, vectors, ids, rate: float, d_vectors) -> None:
        """One optimizer step from the gradient d_out by the interaction of `vectors` (B, 1 + F, D).

        d_vectors (B, 1 + F, D): its [:, 0] is the gradient by vector 0 afterwards, the rest is room for the
        others. On a GPU, SGD adds these to the weights at once; halves and Adagrad need their sums first.
        """
        kernels = self.backend.kernels
        if self.backend.name == "cuda" and not (self.adagrad or self.halves):
            rows = (ids, self.base, self.slot_map)
            kernels.interaction_scatter(d_out, vectors, *rows, -rate, d_vectors[:, 0], self.memory)
            self.steps += 1
        else:
            kernels.interaction_backward(d_out, vectors, d_vectors)
            self.update(ids, d_vectors[:, 1:], rate)

    def update(self, ids, d_vectors, rate: float) -> None:
        """One optimizer step on the weights that `ids` (B, F) touch; d_vectors (B, F, D)."""
        kernels, rows = self.backend.kernels, (ids, self.base, self.slot_map)
        state = (self.gradient, self.accumulator, self.memory)
        if self.halves:
            kernels.scatter_add(d_vectors, *rows, 1, self.gradient)
            key = rounding_key(self.seed, self.steps)
            kernels.half_step(*rows, rate, self.optimizer.eps, key, *state)
        elif self.adagrad:
            kernels.adagrad_scatter(d_vectors, *rows, rate, self.optimizer.eps, *state)
        else:
            kernels.scatter_add(d_vectors, *rows, -rate, self.memory)
        self.steps += 1

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
        stored = int(self.memory.size)
        return {
            "method": self.method,
            "embedding_parameters": stored,
            "embedding_bytes": int(self.memory.nbytes),
            "compression": self.table_weights / stored if stored else None,
            "compressed_from": f"{self.table_weights:,} weights: {self.table_note}, width {self.width}",
        }
