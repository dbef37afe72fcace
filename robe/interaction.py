"""The layer between embeddings and top MLP: vector 0, and the products of all pairs of vectors.

Where one kernel does a look-up, or an update, and the interaction at once, it is taken here. Another
interaction is another such layer.
"""

from collections.abc import Mapping
from math import gcd
from typing import Any, ClassVar

from robe.backend import Backend
from robe.bags import modes, rows_of
from robe.config import ModelConfig
from robe.embeddings import ArrayEmbedding, Embedding
from robe.exchange import Exchange
from robe.kernels.interaction import out_width
from robe.kernels.interaction_scatter import fits
from robe.stale import Stale

# Of an H100 or H200: bytes of the second-level cache, and of what it reads at a time.
CACHE, SECTOR = 50e6, 32


def gathering_again_pays(
    rows: int, features: int, width: int, block: int, weights: int, itemsize: int, adds: bool
) -> bool:
    """Whether a step moves fewer bytes if its backward pass gathers the vectors again than if they are kept.

    rows, features, width, block: B, F, D and Z, which is D for a table; weights: M, of `itemsize` bytes each;
    adds: whether gradients could be added to them at once.

    Vectors that are kept are written once and read twice. Their gradients are written and read too, unless
    they are added to the weights at once. Gathering again reads the weights once more, and adds gradients to
    float32 sums beside the weights, so that both share the cache; where they could be added to the weights at
    once, a pass over both arrays adds and clears the sums. A block begins at any slot, so it takes
    (its bytes - those of a weight) / SECTOR + 1 sectors, read once for weights, read and written for sums.
    What the cache has room for moves nothing. Either way each pass hashes a piece once. A row of the batch
    that is too large for a thread block would be written after all.
    """
    numbers = rows * features * width
    begun = rows * features * (1 + (width - gcd(width, block)) / block)  # blocks of all vectors, on average
    array, sums = itemsize * weights, 4 * weights

    def met(size: int, held: int) -> float:
        """Bytes of sectors that a batch meets in arrays of `held` bytes and the cache has not, once."""
        return (numbers * size + begun * (SECTOR - size)) * (1 - min(1.0, CACHE / max(1, held)))

    kept = (3 if adds else 5) * max(0.0, 4 * numbers - CACHE) + 2 * met(4, sums)
    again = met(itemsize, array + sums) + 2 * met(4, array + sums) + (4 * sums if adds else 0)
    return again < kept and fits(features, width, block)


class Interaction:
    """Vector 0, of the bottom MLP, and those of an embedding -> (B, D + pairs), in `backend.padded` columns.

    rows: of the largest batch. Buffers are made once; a smaller batch uses their front. The kernels see
    D + pairs columns; those behind are always zeros, and their gradients are not looked at. In bf16 the
    output and its gradient are rounded, to be multiplied; vectors are not.
    trained: rows of a batch of training, if these are fewer. They decide, once for all batches, whether a
    step keeps the vectors or gathers them again.
    pooling: of the features, whose ids are then bags: each id is looked up as a row of its own, and the rows
    of a bag are pooled to a vector. They are kept, with their gradients, in buffers that grow with the batch.
    own: the dense weights of `shapes`, the gradients by them, and what is multiplied (MLP), by name each.
    staleness: how many steps of other ranks a row may lack that is read (stale.py).
    """

    # The operation that a look-up is -> the one that looks up and interacts.
    fuses: ClassVar[dict[str, str]] = {"gather": "gather_interaction", "cached_gather": "cached_interaction"}

    @staticmethod
    def width(features: int, width: int) -> int:
        """Numbers that the layer writes per row, for F categorical features and width D."""
        return out_width(1 + features, width)

    @classmethod
    def shapes(cls, features: int, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each dense weight of the layer's own: there is none."""
        return {}

    @classmethod
    def activations(cls, features: int, model: ModelConfig, again: bool = False) -> int:
        """Numbers per row in the buffers of the layer: vectors, their gradients, and what it writes.

        again: whether the vectors are gathered again; then the buffers hold vector 0 alone.
        """
        width = model.width
        return 2 * (1 + (0 if again else features)) * width + cls.width(features, width)

    def __init__(
        self,
        embedding: Embedding,
        rows: int,
        backend: Backend,
        dtype="float32",
        trained: int | None = None,
        pooling: tuple[str, ...] | None = None,
        *,
        own: tuple[Mapping, Mapping, Mapping] = ({}, {}, {}),
        staleness: int = 0,
    ):
        self.embedding, self.kernels, self.short = embedding, backend.kernels, backend.short
        self.backend, self.pooling = backend, pooling
        self.exchange: Exchange | Stale | None = None
        self.stale: Stale | None = None  # the exchange, if it is one
        if backend.ranks.size > 1:
            if staleness and isinstance(embedding, ArrayEmbedding):
                self.stale = Stale(embedding, backend, staleness)
            self.exchange = self.stale or Exchange(embedding, backend)
        fused = None if pooling else self.fuses.get(embedding.looks_up_by)
        self.fused = getattr(self.kernels, fused) if fused else None
        self.scatters = backend.fuses_scatter and not pooling
        if pooling:
            self.modes = backend.to_device(modes(pooling))
            self.looked_up = backend.empty((2, 0, embedding.width), dtype)  # rows, and their gradients
            self.owners: Any = None  # (N,) the feature of each id
        self.again = self._gathers_again(trained or rows)
        shape = rows, 1 + (0 if self.again else embedding.features), embedding.width
        self.vectors, self.d_vectors = (backend.empty(shape, dtype) for _ in range(2))
        columns = self.width(embedding.features, embedding.width)
        self.columns = slice(columns)
        kept = self.short.dtype if self.short else dtype
        self.out = backend.empty((rows, backend.padded(columns)), kept)
        self.out[:, columns:] = 0

    @classmethod
    def gathers_again(cls, looks_up_by: str | None, *sizes: Any) -> bool:
        """Whether steps on a GPU gather the vectors again; sizes: of `gathering_again_pays`."""
        return cls.fuses.get(looks_up_by) == "gather_interaction" and gathering_again_pays(*sizes)

    def _gathers_again(self, rows: int) -> ArrayEmbedding | None:
        """The embedding, ready for it, if steps of so many rows gather its vectors again."""
        embedding = self.embedding
        if not (self.scatters and isinstance(embedding, ArrayEmbedding) and embedding.summable):
            return None
        where, memory = embedding.slot_map, embedding.memory
        sizes = embedding.width, int(where.block), memory.size, memory.itemsize
        if not self.gathers_again(embedding.looks_up_by, rows, embedding.features, *sizes, embedding.adds):
            return None
        embedding.make_sums()
        return embedding

    def first(self, rows: int) -> Any:
        """(B, D): where vector 0 has to be written before `forward`."""
        return self.vectors[:rows, 0]

    def ready(self, ids) -> None:
        """Have what a step is to look up, ids (B, F) or bags, as fresh as `staleness` says."""
        if self.stale and self.pooling:
            values, offsets, _ = ids
            self.stale.ready(values[:, None], self._owners(values, offsets))
        elif self.stale:
            self.stale.ready(ids)

    def look_up(self, ids) -> Any:
        """Vectors (B, 1 + F, D), behind the first, of ids (B, F) or bags."""
        vectors = self.vectors[: rows_of(ids, self.embedding.features)]
        if not self.pooling:
            self.embedding.lookup(ids, vectors[:, 1:])
            return vectors
        values, offsets, weights = ids
        count, self.owners = len(values), self._owners(values, offsets)
        if self.looked_up.shape[1] < count:
            self.looked_up = self.backend.empty((2, count, self.embedding.width), self.looked_up.dtype)
        rows = self.looked_up[0, :count]
        self.embedding.lookup(values[:, None], rows[:, None], self.owners)
        self.kernels.pool(rows, offsets, self._weights(weights), self.modes, vectors[:, 1:])
        return vectors

    def _owners(self, values, offsets) -> Any:
        """(N,) the feature of each id of bags."""
        xp = self.backend.xp
        return (xp.searchsorted(offsets, xp.arange(len(values)), side="right") - 1) % self.embedding.features

    def update(self, ids, d_vectors, rate: float) -> None:
        """One step of the embedding, from the gradient (B, 1 + F, D) of what `look_up` gave last; by those of
        all ranks."""
        step = (self.exchange or self.embedding).update
        if not self.pooling:
            step(ids, d_vectors[:, 1:], rate)
            return
        values, offsets, weights = ids
        rows, d_rows = self.looked_up[:, : len(values)]
        bags = offsets, self._weights(weights), self.modes
        self.kernels.pool_backward(d_vectors[:, 1:], rows, *bags, d_rows)
        step(values[:, None], d_rows[:, None], rate, self.owners)

    def _weights(self, weights) -> Any:
        return self.backend.xp.empty(0, "float32") if weights is None else weights

    def predict(self, first, ids) -> Any:
        """first (B, D), ids (B, F) or bags -> (B, D + pairs), for inference; valid until the next call."""
        rows = rows_of(ids, self.embedding.features)
        if self.fused is None:
            self.first(rows)[...] = first
            return self.forward(ids)
        out = self.out[:rows]
        self.fused(*self.embedding.operands(ids), first, out[:, self.columns])
        return self._settled(out)

    def forward(self, ids) -> Any:
        """ids (B, F) or bags -> (B, D + pairs), from `first`; keeps what the gradient needs."""
        if self.again:
            return self.predict(self.first(len(ids)), ids)
        vectors = self.look_up(ids)
        out = self.out[: len(vectors)]
        self.kernels.interaction(vectors, out[:, self.columns])
        return self._settled(out)

    def backward(self, d_out, ids, rate: float) -> Any:
        """d_out (B, D + pairs) -> the gradient (B, D) of vector 0; the embedding takes its optimizer step.

        Where the step is an addition, it can be made without ever writing the gradients of the vectors. Where
        these are gathered again, the gradients are summed first, whatever the step.
        """
        embedding, rows, d_out = self.embedding, len(d_out), d_out[:, self.columns]
        vectors, d_vectors = self.vectors[:rows], self.d_vectors[:rows]
        d_first = d_vectors[:, 0]
        if again := self.again:
            slots, first = again.slots(ids), vectors[:, 0]
            self.kernels.gather_interaction_backward(
                d_out, again.memory, *slots, first, d_first, again.gradient
            )
            again.step(slots, rate)
        elif self.scatters and embedding.adds:
            slots = embedding.slots(ids)
            self.kernels.interaction_scatter(d_out, vectors, *slots, -rate, d_first, embedding.memory)
            embedding.steps += 1
        else:
            self.kernels.interaction_backward(d_out, vectors, d_vectors)
            self.update(ids, d_vectors, rate)
        return d_first

    def _settled(self, out) -> Any:
        """What a kernel wrote, rounded where products want that."""
        if self.short:
            self.short.settle(out)
        return out
