"""The step of an embedding that several ranks take together, and what travels between them for it.

Each rank has the gradients of the vectors that its own rows looked up. They travel in one of three ways:

    look-ups   all of them, with their ids: every rank gets those of the whole batch
    rows       each rank adds up its gradients by one and the same row of a feature, and the sums are joined
    array      each rank adds its gradients to an array as large as the memory, and the arrays are added up

`look-ups` serves embeddings that count each look-up, and no others. Of the other two a batch takes the one
that moves fewer bytes, which all ranks find alike: an array is sent twice, to be added up and as the sum, so
`array` is taken where twice its bytes are fewer than those of the rows of all ranks. It is open to weights in
floats which their optimizer steps one by one.

Whichever it is, then every rank takes the step of the whole batch, and to all copies of the weights happens
the same.
"""

from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.embeddings import ArrayEmbedding, Embedding
from robe.kernels.parts.hashing import LOW32, S32, slot_map
from robe.ranks import TRIPS
from robe.timeline import Phase, no_phase

# Look-ups that stand side by side in a row of ids, so that a kernel fetches the memory of all ahead.
ABREAST = 16


class Exchange:
    """The steps of an embedding by the gradients of all ranks; `ways` counts how these travelled, and
    `phase` times it."""

    def __init__(self, embedding: Embedding, backend: Backend):
        self.embedding, self.backend, self.ranks = embedding, backend, backend.ranks
        self.ways: Counter[str] = Counter()
        self.phase: Phase = no_phase
        self.features = backend.xp.arange(embedding.features)
        self.sums: Any = backend.empty(0, np.float32)  # (N * D,) of the rows of this rank, and room behind
        plain = isinstance(embedding, ArrayEmbedding) and embedding.row_of is None and embedding.chunks == 1
        self.abreast = ABREAST if plain else 1
        self.array: ArrayEmbedding | None = None
        if isinstance(embedding, ArrayEmbedding) and embedding.summable and not embedding.rule.grouped:
            self.array = embedding

    def step(self, ids, d_vectors, rate: float, features=None) -> None:
        """One step of the embedding by all ranks' gradients; arguments as of its `update`, of this rank."""
        if self.embedding.counts_look_ups:
            self._step_by_look_ups(ids, d_vectors, rate, features)
            return
        of = self.features if features is None else features[:, None]
        rows, numbers = self.backend.distinct((of.astype(np.uint64) << S32) + ids)
        width = self.embedding.width
        with self.phase("exchange, counts"):  # where a rank waits for those behind it
            count = sum(self.ranks.numbers(len(rows)))
        size = count * (rows.itemsize + width * d_vectors.itemsize)
        if self.array and TRIPS * self.array.weights * self.array.gradient.itemsize < size:
            self._step_by_array(self.array, ids, d_vectors, rate, features)
        else:
            self._step_by_rows(rows, numbers, d_vectors, rate)

    def _step_by_look_ups(self, ids, d_vectors, rate: float, features) -> None:
        with self._travelling("look-ups"):
            ids, d_vectors, *of = self.ranks.joined(ids, d_vectors, *() if features is None else (features,))
        self.embedding.update(ids, d_vectors, rate, *of)

    def _step_by_rows(self, rows, numbers, d_vectors, rate: float) -> None:
        """rows (N,) uint64: feature and id of each; numbers (B, F): which of them a look-up is."""
        width, abreast = self.embedding.width, self.abreast
        # The last row fills up, with sums of 0, which change nothing.
        rows = np.append(rows, rows[-1:].repeat(-len(rows) % abreast))
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
            rows, sums = self.ranks.joined(rows, sums.reshape(-1, width))
        rows = rows.reshape(-1, abreast)
        ids, features = (rows & LOW32).astype(np.uint32), (rows >> S32).astype(np.int64)
        features = features if abreast > 1 else features[:, 0]
        self.embedding.update(ids, sums.reshape(*ids.shape, width), rate, features)

    def _step_by_array(self, array: ArrayEmbedding, ids, d_vectors, rate, features) -> None:
        if not array.gradient.size:
            array.make_sums()
        array.add_up(ids, d_vectors, features)
        with self._travelling("array"):
            self.ranks.add(array.gradient)
        array.step(array.everywhere(), rate)

    def _travelling(self, way: str) -> AbstractContextManager:
        self.ways[way] += 1
        return self.phase(f"exchange, {way}")
