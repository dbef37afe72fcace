"""The step of an embedding that several ranks take together, and what travels between them for it.

Each rank has the gradients of the vectors that its own rows looked up. They travel in one of three ways:

    look-ups   all of them, with their ids: every rank gets those of the whole batch
    rows       each rank adds up its gradients by one and the same row of a feature, and the sums are joined
    array      each rank adds its gradients to an array as large as the memory. Of the sum over all ranks each
               gets a share, steps the weights of it, and gives these to the others

`look-ups` serves embeddings that count each look-up, and no others. Of the other two a batch takes the one
that moves fewer bytes, which all ranks find alike: of an array gradients are sent, and then weights, so it is
taken where these are fewer bytes than the rows of all ranks. It is open to weights in floats which their
optimizer steps one by one. What the optimizer keeps of a weight is then up to date on the rank alone that
steps it, until `settle` gives it to all, as before a checkpoint.

The other ways, every rank takes the step of the whole batch, and the same happens to all copies of the
weights.
"""

from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.embeddings import ArrayEmbedding, Embedding
from robe.kernels.parts.hashing import LOW32, S32, slot_map
from robe.timeline import Phase, no_phase


class Exchange:
    """The steps of an embedding by the gradients of all ranks; `ways` counts how these travelled, and
    `phase` times it."""

    def __init__(self, embedding: Embedding, backend: Backend):
        self.embedding, self.backend, self.ranks = embedding, backend, backend.ranks
        self.ways: Counter[str] = Counter()
        self.phase: Phase = no_phase
        self.features = backend.xp.arange(embedding.features)
        self.sums: Any = backend.empty(0, np.float32)  # (N * D,) of the rows of this rank, and room behind
        self.array: ArrayEmbedding | None = None
        if isinstance(embedding, ArrayEmbedding) and embedding.summable and not embedding.rule.grouped:
            self.array = embedding
            self.each = embedding.gradient.itemsize + embedding.stepped.itemsize  # bytes sent of a weight
        self.apart = False  # whether ranks hold what the optimizer keeps of their share of `array` alone

    def update(self, ids, d_vectors, rate: float, features=None) -> None:
        """One step of the embedding by all ranks' gradients; arguments as of its `update`, of this rank."""
        if not self.embedding.features:  # it counts the step
            self.embedding.update(ids, d_vectors, rate)
            return
        if self.embedding.counts_look_ups:
            self._step_by_look_ups(ids, d_vectors, rate, features)
            return
        of = self.features if features is None else features[:, None]
        rows, numbers = self.backend.distinct((of.astype(np.uint64) << S32) + ids)
        width = self.embedding.width
        with self.phase("exchange, counts"):  # where a rank waits for those behind it
            counts = self.ranks.numbers(len(rows))
        size = sum(counts) * (rows.itemsize + width * d_vectors.itemsize)
        if self.array and self.array.weights * self.each < size:
            self._step_by_array(self.array, ids, d_vectors, rate, features)
        else:
            self._step_by_rows(rows, numbers, counts, d_vectors, rate)

    def _step_by_look_ups(self, ids, d_vectors, rate: float, features) -> None:
        with self._travelling("look-ups"):
            ids, d_vectors, *of = self.ranks.joined(ids, d_vectors, *() if features is None else (features,))
        self.embedding.update(ids, d_vectors, rate, *of)

    def _step_by_rows(self, rows, numbers, counts, d_vectors, rate: float) -> None:
        """rows (N,) uint64: feature and id of each; numbers (B, F): which of them a look-up is; counts: how
        many rows each rank has."""
        self.settle()
        width = self.embedding.width
        size = rows.size * width
        if self.sums.size < size:
            self.sums = self.backend.empty(1 << (size - 1).bit_length(), d_vectors.dtype)
        sums = self.sums[:size]
        sums[...] = 0
        out = self.sums if self.backend.few_sizes else sums
        table = slot_map("table", width, 1, out.size or 1, signed=False)
        base = self.backend.xp.zeros(numbers.shape[1], np.uint64)
        self.backend.kernels.scatter_add(d_vectors, numbers, base, table, 1, out)
        with self._travelling("rows"):
            rows, sums = self.ranks.joined(rows, sums.reshape(-1, width), counts=counts)
        ids, features = (rows & LOW32).astype(np.uint32), (rows >> S32).astype(np.int64)
        self.embedding.update(ids[:, None], sums[:, None], rate, features)

    def _step_by_array(self, array: ArrayEmbedding, ids, d_vectors, rate, features) -> None:
        if not array.gradient.size:
            array.make_sums()
        array.add_up(ids, d_vectors, features)
        with self._travelling("array"):
            self.ranks.reduced(self._shares(array.gradient))
        array.step_part(self.ranks.part(array.weights), rate)
        array.gradient[...] = 0
        with self.phase("exchange, array"):
            self.ranks.spread(self._shares(array.stepped))
        self.apart = True

    def settle(self) -> None:
        """Have all ranks hold the same arrays, where each has stepped its share of them."""
        if self.array and self.apart:
            for kept in self.array.sums.values():
                self.ranks.spread(self._shares(kept))
        self.apart = False

    def _shares(self, array) -> list:
        return [array[part] for part in self.ranks.parts(len(array))]

    def _travelling(self, way: str) -> AbstractContextManager:
        self.ways[way] += 1
        return self.phase(f"exchange, {way}")
