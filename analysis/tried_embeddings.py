"""Embeddings that analysis/tried.py holds against a ROBE array of the same bytes; no part of the product.

Each is made of the product's arrays and kernels. A function takes what the `create` of a method takes; the
configuration is one of `robe`, whose `weights` are those that the bytes allow, and which it shares out.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings import ArrayEmbedding, ComposedEmbedding, Weights, robe
from robe.embeddings.clusters import clustered, means
from robe.embeddings.composed import composed
from robe.embeddings.compositional import chunk_width
from robe.embeddings.robe import array_of_blocks, initial_bound
from robe.embeddings.tables import cut, table_base, tables, whole
from robe.kernels.parts.groups import GROUP
from robe.kernels.parts.hashing import slots_reference

T = TypeVar("T", bound=ArrayEmbedding)
SCALES = 0.1  # of the weights, in the second array
HEAD = 0.3  # of the bytes: index, keys and blocks of the ids whose places are learned
KEY = 4  # bytes that tell which id an entry of the index belongs to
DRAWS = 4  # of random numbers, beside those that weights are drawn from
PIECE = 2**18  # rows whose readers are counted at a time


def with_embedding(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, **changes))


def stored_bytes(embedding: ArrayEmbedding | ComposedEmbedding) -> int:
    """What is kept to serve: the weights of all parts, or what else the embedding says."""
    kept = sum(int(part.memory.nbytes) for part in embedding.parts.values())
    return getattr(embedding, "kept_bytes", kept)


def array_of(kind: type[T], config: TrainConfig, data: DataSpec, backend: Backend, dtype) -> T:
    """As `robe.create` makes it, of another class."""
    return array_of_blocks(
        robe.declare(config, data)[""],
        [config.embedding.init_bound or initial_bound(data.cardinalities)],
        *(config, data, backend, dtype, config.embedding.hash),
        kind=kind,
        **whole(config, data) | {"rows": None},
    )


def summed(
    config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32", readings: int = 2
) -> ComposedEmbedding:
    """Each vector is the sum of several rows of one array, which are hashed apart as if of other features."""
    xp, features, bound = backend.xp, len(data.cardinalities), initial_bound(data.cardinalities)
    several = dataclasses.replace(data, cardinalities=data.cardinalities * readings)
    begun = with_embedding(config, init_bound=bound / math.sqrt(readings))
    array = robe.create(begun, several, backend, dtype)
    array.row_of = lambda ids, _: xp.tile(ids, readings)

    def compose(rows, out, places):
        out[...] = rows[0].reshape(len(out), readings, features, -1).sum(axis=1)

    def gradients(rows, d_vectors, places):
        return (xp.tile(d_vectors, (1, readings, 1)),)

    return composed(config, data, backend, {"array": array}, compose, gradients)


def scaled(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> ComposedEmbedding:
    """MEM-REC's second array (arXiv 2305.07205): each row is read times 1 + a weight of its
    own, which is hashed too, and 0 at first."""
    given = config.embedding
    scales = max(1, round(SCALES * given.weights))
    narrow = dataclasses.replace(config, model=dataclasses.replace(config.model, width=1))
    narrow = with_embedding(narrow, weights=scales, block=1, hash_seed=given.hash_seed + 2**32)
    facts = whole(narrow, data) | {"rows": None}
    parts = {
        "array": robe.create(with_embedding(config, weights=given.weights - scales), data, backend, dtype),
        "scales": array_of_blocks(
            robe.declare(narrow, data)[""], [0.0], narrow, data, backend, dtype, "mix", **facts
        ),
    }

    def compose(rows, out, places):
        vectors, scale = rows
        out[...] = vectors * (1 + scale)

    def gradients(rows, d_vectors, places):
        vectors, scale = rows
        return d_vectors * (1 + scale), (d_vectors * vectors).sum(axis=2, keepdims=True)

    return composed(config, data, backend, parts, compose, gradients)


def folded(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> ArrayEmbedding:
    """RANDOMFOLD (of STABLE-RPS, ICLR 2024): all rows, in random order, are laid around the array
    again and again, each time from another slot on. So every slot has as many readers, to within one, and
    where the array is as large as the table it is the table.

    Blocks of `mix` that are as long as the array are just that. The order is drawn here; a product would
    compute it (a cipher does), and so store nothing for it, but rows must be numbered.
    """
    weights = config.embedding.weights
    array = array_of_blocks(
        Weights(np.array([weights]), 1, int(GROUP), weights),
        [config.embedding.init_bound or initial_bound(data.cardinalities)],
        *(with_embedding(config, block=weights), data, backend, dtype, "mix"),
        **whole(config, data),
    )
    rng = np.random.default_rng([config.embedding.hash_seed, DRAWS])
    order = backend.to_device(rng.permutation(sum(data.cardinalities)).astype(np.uint32))
    first = backend.to_device(table_base(data.cardinalities).astype(np.uint32))
    array.base, array.row_of = array.base * array.base.dtype.type(0), lambda ids, of: order[first[of] + ids]
    return array


@dataclass(kw_only=True)
class DividedEmbedding(ArrayEmbedding):
    """An array under SGD that steps each slot by its gradient divided by its readers (STABLE-RPS).

    readers: (M,) elements of the full table that a slot stands for, in units of some number of them.
    """

    readers: Any = None
    summable: ClassVar[Literal[False]] = False  # all steps go through `update`

    def __post_init__(self):
        super().__post_init__()
        self.adds = False

    def update(self, ids, d_vectors, rate: float) -> None:
        total = self.backend.xp.zeros_like(self.memory)
        self.backend.kernels.scatter_add(d_vectors, *self.slots(ids), 1, total)
        self.memory -= self.memory.dtype.type(rate) * (total / self.readers)
        self.steps += 1


def readers_of(array: ArrayEmbedding, cardinalities: tuple[int, ...]) -> np.ndarray:
    """(M,) how many elements of the full table each slot stands for, and 1 at least."""
    found, base = np.zeros(array.weights, np.int64), array.backend.to_host(array.base)
    for f, count in enumerate(cardinalities):
        for start in range(0, count, PIECE):
            ids = np.arange(start, min(start + PIECE, count), dtype=np.uint64)
            slots, _ = slots_reference(array.slot_map, base[f] + ids)
            found += np.bincount(slots.ravel(), minlength=array.weights)
    return np.maximum(found, 1)


def divided(
    config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32", per: float = 1
) -> DividedEmbedding:
    """per: readers by which the rate, which is that of the MLPs too, is not divided."""
    array = array_of(DividedEmbedding, config, data, backend, dtype)
    readers = readers_of(array, data.cardinalities) / per
    array.readers = backend.to_device(readers.astype(array.memory.dtype))
    return array


@dataclass(kw_only=True)
class PlacedEmbedding(ArrayEmbedding):
    """An array of whose first ids the places are learned (the idea of CCE, arXiv 2210.05974).

    In the first half of a pass these ids have rows of their own, `own`, which only training holds. Halfway
    the chunks of these rows are clustered: the centroids are the `k` blocks of each chunk that stand in
    front of the ring, an index tells the block of each id and chunk, and training goes on with these.
    """

    own: ArrayEmbedding
    k: int
    hot: Any  # (F,) uint32: how many ids of each feature
    first: Any  # (F,) uint32: the number of the first of them
    index: Any = field(init=False)  # (H, chunks) uint8
    learning: bool = field(init=False, default=True)
    summable: ClassVar[Literal[False]] = False

    def __post_init__(self):
        self.index = self.backend.xp.zeros((self.own.weights // self.width, self.chunks), "uint8")
        self.row_of = self._chunks
        super().__post_init__()
        self.adds = False

    @property
    def kept_bytes(self) -> int:
        """Of the weights, the index and its keys."""
        return int(self.memory.nbytes) + int(self.index.nbytes) + KEY * len(self.index)

    def begin(self, number: int) -> None:
        super().begin(number)
        self.own.begin(number)
        self.learning = True

    def _learned(self, ids) -> tuple[Any, Any]:
        """Whether the place of each id (B, F) is learned, and the ids of which that is so, else 0."""
        learned = ids < self.hot
        return learned, self.backend.xp.where(learned, ids, 0).astype("uint32")

    def _chunks(self, ids, features):
        xp, (learned, its_ids) = self.backend.xp, self._learned(ids)
        chunk = xp.arange(self.chunks, dtype="uint32")
        placed = chunk * xp.uint32(self.k) + self.index[self.first + its_ids]
        behind = xp.uint32(self.chunks * self.k) + ids[..., None] * xp.uint32(self.chunks) + chunk
        return xp.where(learned[..., None], placed, behind).astype("uint32").reshape(len(ids), -1)

    def lookup(self, ids, out) -> None:
        super().lookup(ids, out)
        if self.learning:
            learned, its_ids = self._learned(ids)
            rows = self.backend.empty(out.shape, self.dtype)
            self.own.lookup(its_ids, rows)
            out[learned] = rows[learned]

    def update(self, ids, d_vectors, rate: float) -> None:
        if self.learning:
            learned, its_ids = self._learned(ids)
            d_own = d_vectors * learned[..., None]
            self.own.update(its_ids, d_own, rate)
            d_vectors = d_vectors - d_own
        super().update(ids, d_vectors, rate)

    def halfway(self) -> None:
        to_host, chunks, width = self.backend.to_host, self.chunks, int(self.slot_map.width)
        rng = np.random.default_rng([self.seed, DRAWS])
        kept = self.own.memory, *self.own.sums.values()
        rows, *sums = (to_host(array).reshape(-1, chunks, width) for array in kept)
        for j in range(chunks):
            now = clustered(rows[:, j], self.k, rng)
            place = slice(j * self.k * width, (j + 1) * self.k * width)
            for array, values in zip((self.memory, *self.sums.values()), (rows, *sums), strict=True):
                before = to_host(array[place]).reshape(self.k, width)
                array[place] = self.backend.to_device(means(values[:, j], now, before).reshape(-1))
            self.index[:, j] = self.backend.to_device(now.astype(np.uint8))
        self.learning = False


def sizes_of_head(size: int, width: int, chunks: int, rows: int) -> tuple[int, int]:
    """(k, ids): blocks of a chunk, and ids whose places are learned, within HEAD of so many bytes."""
    head = int(HEAD * size)
    k = min(256, 2 ** int(math.log2(max(1, head // 2 // (4 * width)))))
    return k, min(rows, (head - 4 * k * width) // (chunks + KEY))


def placed(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> PlacedEmbedding:
    settings, width, chunks = config.embedding, config.model.width, config.embedding.chunks
    size = 4 * settings.weights
    k, most = sizes_of_head(size, width, chunks, sum(data.cardinalities))
    hot = np.maximum(cut(np.array(data.cardinalities), most), 1)
    count = int(hot.sum())
    narrow = dataclasses.replace(config, model=dataclasses.replace(config.model, width=chunk_width(config)))
    ring = (size - count * (chunks + KEY)) // 4 - k * width
    weights = Weights(np.array([k * width, ring]), 1, int(GROUP), settings.block)
    bound = initial_bound(data.cardinalities)
    own = tables(Weights(hot, width), np.full(len(hot), bound), config, data, backend, dtype, stream=2)
    several = dataclasses.replace(data, cardinalities=tuple(np.repeat(data.cardinalities, chunks).tolist()))
    array = array_of_blocks(
        *(weights, [0.0, bound], narrow, several, backend, dtype, "hot", chunks * k, PlacedEmbedding),
        own=own,
        k=k,
        hot=backend.to_device(hot.astype(np.uint32)),
        first=backend.to_device(table_base(hot).astype(np.uint32)),
        chunks=chunks,
        **whole(config, data),
    )
    array.base = backend.to_device(np.arange(len(hot), dtype=np.uint64).repeat(chunks) << np.uint64(32))
    return array


@dataclass(kw_only=True)
class StretchedEmbedding(ArrayEmbedding):
    """An array that is read in codes of 4 bits whose scales are learned (ALPT, arXiv 2212.05735, after LSQ,
    1902.08153). A group of weights w has the levels -8 s to 7 s, in steps of

        s = e^t max|w| / 7

    Look-ups read the nearest level. Gradients go straight through to the weights between the outer levels,
    and t, 0 at first, has those of the levels: of n s by t, less w between the outer ones.
    """

    shown: Any = field(init=False)  # (M,) what look-ups read
    stretch: Any = field(init=False)  # (R, 1) t
    squares: Any = field(init=False)  # (R, 1) sums of squared gradients of t
    summable: ClassVar[Literal[False]] = False
    looks_up_by: ClassVar[None] = None

    def __post_init__(self):
        self.stretch = self.backend.xp.zeros((self.groups, 1), self.memory.dtype)
        self.squares = self.backend.xp.zeros_like(self.stretch)
        super().__post_init__()
        self.adds = False

    @property
    def groups(self) -> int:
        return -(-self.weights // int(GROUP))

    @property
    def kept_bytes(self) -> int:
        """Of the codes, and a half for each scale."""
        return self.groups * (int(GROUP) // 2 + 2)

    def begin(self, number: int) -> None:
        super().begin(number)
        self.stretch[...] = self.squares[...] = 0
        self._show()

    def _grouped(self, values):
        """(M,) as groups (R, G), the last filled up with 0."""
        filled = self.backend.xp.zeros((self.groups, int(GROUP)), values.dtype)
        filled.reshape(-1)[: self.weights] = values
        return filled

    def _levels(self) -> tuple[Any, Any, Any]:
        """Scales (R, 1); the levels n (R, G); and w / s (R, G)."""
        xp, weights = self.backend.xp, self._grouped(self.memory)
        scale = xp.exp(self.stretch) * xp.maximum(abs(weights).max(axis=1, keepdims=True), 1e-30) / 7
        exact = weights / scale
        return scale, xp.clip(xp.rint(exact), -8, 7), exact

    def _show(self) -> None:
        scale, levels, _ = self._levels()
        self.shown = (scale * levels).reshape(-1)[: self.weights].astype(self.memory.dtype)

    def lookup(self, ids, out) -> None:
        self.backend.kernels.gather(self.shown, *self.slots(ids), out)

    def update(self, ids, d_vectors, rate: float) -> None:
        scale, levels, exact = self._levels()
        within = (exact >= -8) & (exact <= 7)
        total = self.backend.xp.zeros_like(self.memory)
        self.backend.kernels.scatter_add(d_vectors, *self.slots(ids), 1, total)
        total = self._grouped(total)
        by_t = (total * scale * (levels - exact * within)).sum(axis=1, keepdims=True)
        step = self.backend.kernels.adagrad
        total = (total * within).reshape(-1)[: self.weights]
        step(total, rate, self.optimizer.eps, self.accumulator, self.memory)
        step(by_t[:, 0], rate, self.optimizer.eps, self.squares[:, 0], self.stretch[:, 0])
        self._show()
        self.steps += 1


def stretched(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> StretchedEmbedding:
    """Of as many weights as an array in 4 bits, whose groups have a bias besides."""
    return array_of(StretchedEmbedding, with_embedding(config, memory="fp32"), data, backend, dtype)
