"""What the values of a prepared folder mean: dialects of dense values and of ids, named in its manifest.

`TRANSFORMS` turns the numbers of a log into dense values. An id is the 32 bits of the log (`hash`), these
modulo N (`modulo`), or their number in a dictionary (`dictionary`), which `learn` makes for one feature at a
time.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from data_pipeline.bags import Bags, IdsOfRows, columns_of
from data_pipeline.manifest import Manifest, Pairs, measured_columns
from data_pipeline.names import shown
from data_pipeline.npy import NpyFile
from data_pipeline.schema import DataError, Schema

DICTIONARY = "dictionary.npy"
Dialect = Literal["hash", "modulo", "dictionary"]
Order = Literal["first", "count"]

# log1p of small counts, which most are: it takes 15 ns to compute, and 1 ns to look up.
TABLE = np.log1p(np.arange(1 << 16)).astype(np.float32)
# `learn` reports the shares of rows that have one of the n most frequent values, for these n.
TOPS = (1, 10, 100, 1_000, 10_000, 100_000)
# `clipped` speaks of columns of which a larger share became 0.
CLIPPED = 0.01
# Up to this modulus, `learn` has a counter for each possible value.
COUNTED = 1 << 28
# A sorted array of up to so many values stays in the cache while it is searched.
CACHED = 1 << 17
# `distinct` sorts at least so many values at a time.
SORTED = 1 << 22


def _log1p(values: np.ndarray) -> np.ndarray:
    if values.dtype != np.int64:
        return np.log1p(np.maximum(values, 0)).astype(np.float32)
    result = TABLE.take(values, mode="clip")
    large = np.flatnonzero(values >= TABLE.size)
    # In float64, then rounded, as the table was: the result is the float32 nearest to the true value.
    result.flat[large] = np.log1p(values.flat[large].astype(np.float64))
    return result


def _as_they_are(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)  # negative ones stay so


# Name -> function from the dense values of a log (n, columns), int64 or float64, to float32; for a transform
# that is measured, to what `scaler` takes.
TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log1p": _log1p,  # log(max(x, 0) + 1)
    "none": _as_they_are,
    "zscore": _log1p,
    "quantile": _as_they_are,
}
CLIPPING = tuple(name for name, function in TRANSFORMS.items() if function is _log1p)


def dense_values(schema: Schema, default: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the transforms make of the numbers of a log.

    numbers: (n, dense columns) int64 or float64, missing ones filled in.
    default: the transform of the columns that have none of their own in the schema.

    Returns the dense values (n, dense columns) float32, and which of them lost what they said because a
    number below 0 became 0, bool of the same shape. `scaler` does the rest for transforms that are measured.
    """
    values, clipped = TRANSFORMS[default](numbers), numbers < 0
    if default not in CLIPPING:
        clipped[:] = False
    for column, name in enumerate(schema.dense):
        if (own := schema.transforms.get(name, default)) != default:
            values[:, column] = TRANSFORMS[own](numbers[:, column])
            clipped[:, column] = (numbers[:, column] < 0) & (own in CLIPPING)
    return values, clipped


def scaler(schema: Schema, default: str, measured: dict[str, Pairs]) -> Callable[[np.ndarray], np.ndarray]:
    """The function from what `dense_values` gives to the dense values of a prepared folder, in place.

    measured: of the folder's manifest.
    """
    columns = [
        (schema.dense.index(name), transform, np.array(measured[name]))
        for name, transform in measured_columns(schema, default).items()
    ]

    def scale(dense: np.ndarray) -> np.ndarray:
        for column, transform, pairs in columns:
            values = dense[:, column].astype(np.float64)
            if transform == "zscore":
                dense[:, column] = (values - pairs[0, 0]) / pairs[0, 1]
            else:
                dense[:, column] = np.interp(values, *pairs.T)
        return dense

    return scale


def fmix32(x: np.ndarray) -> np.ndarray:
    """The last step of MurmurHash3: uint32 to uint32, one to one, and the result looks random."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


class Distinct:
    """Counts the distinct ids of each feature in bounded memory.

    It is a k-minimum-values sketch (Bar-Yossef et al., 2002): of the hashes of a feature's ids, the k
    smallest are kept. If there are fewer than k, their number is the count. Else the k-th lies at a fraction
    of about k / distinct of the range, and (k - 1) / fraction estimates the count with a standard error of
    1 / sqrt(k - 2), 1.6% here. The hash is one to one, so distinct ids never share one. Neither the order of
    the ids nor how they are split into calls matters.
    """

    RECENT = 1 << 14

    def __init__(self, features: int, k: int = 4096):
        self.k = k
        self.smallest = [np.empty(0, np.uint32)] * features
        # Hashes that are not yet merged into the smallest.
        self.waiting: list[list[np.ndarray]] = [[] for _ in range(features)]
        # Most hashes have been seen just before: entry i is the last one whose low bits are i. At first it is
        # a number with other low bits, so no hash.
        self.recent = np.tile(np.arange(self.RECENT, dtype=np.uint32) ^ np.uint32(1), (features, 1))

    def add(self, ids: IdsOfRows) -> None:
        """Count ids (n, F) uint32, or those of bags."""
        columns = columns_of(ids, len(self.recent))
        for feature, (recent, column) in enumerate(zip(self.recent, columns, strict=True)):
            hashes, kept = fmix32(np.ascontiguousarray(column)), self.smallest[feature]
            if kept.size == self.k:  # soon true for all large features, and then few hashes are left
                hashes = hashes[np.flatnonzero(hashes < kept[-1])]  # twice as fast as by a mask
            entry = (hashes & np.uint32(self.RECENT - 1)).astype(np.intp)
            new = np.flatnonzero(recent.take(entry, mode="clip") != hashes)
            if new.size:
                recent[entry[new]] = hashes[new]
                self.waiting[feature].append(hashes[new])
                if sum(map(len, self.waiting[feature])) >= self.k:  # sorted each time, they would cost most
                    self._settle(feature)

    def _settle(self, feature: int) -> None:
        hashes = _unique(np.concatenate([self.smallest[feature], *self.waiting[feature]]))
        self.smallest[feature], self.waiting[feature] = hashes[: self.k], []

    def _settled(self) -> list[np.ndarray]:
        for feature in range(len(self.smallest)):
            self._settle(feature)
        return self.smallest

    def to_array(self) -> np.ndarray:
        """The smallest hashes of each feature, for `merge`: (F, k) uint64, filled up with 2^32."""
        known = np.full((len(self.smallest), self.k), 1 << 32, np.uint64)
        for row, kept in zip(known, self._settled(), strict=True):
            row[: kept.size] = kept
        return known

    def merge(self, known: np.ndarray) -> None:
        """Add the ids that another `Distinct` has counted; `known` is its `to_array`."""
        for feature, row in enumerate(known):
            self.waiting[feature].append(row[row < 1 << 32].astype(np.uint32))
            self._settle(feature)

    def counts(self) -> tuple[int, ...]:
        """The number of distinct ids of each feature."""
        return tuple(
            kept.size if kept.size < self.k else round((self.k - 1) * 2**32 / (int(kept[-1]) + 1))
            for kept in self._settled()
        )

    def exact(self) -> bool:
        """Whether no count is an estimate."""
        return all(kept.size < self.k for kept in self._settled())


class Learned(NamedTuple):
    """The dictionary of one feature.

    values: (n,) uint32, of ids 1 ... n.
    report: what `Manifest.features` says of it.
    """

    values: np.ndarray
    report: dict[str, Any]


def learn(
    pieces: Callable[[], Iterator[np.ndarray]],
    rows: int,
    modulus: int | None = None,
    min_count: int = 1,
    order: Order = "first",
) -> Learned:
    """Number the values of a feature that training sees at least `min_count` times, from 1 on.

    pieces: called once or twice, it yields the column of `rows` values, in pieces (n,) uint32.
    modulus: take values modulo this first.
    order: `first` numbers them in order of first appearance, `count` by falling count, and ties by value.

    With a modulus up to COUNTED there is a counter for each possible value: up to 16 bytes * modulus,
    whatever the log. Else there is one for each value that occurs, about 24 bytes each, and the column is
    read twice.
    """
    keys = None
    if modulus is None or modulus > COUNTED:
        keys = distinct(modulo(piece, modulus) for piece in pieces())
        size = keys.size
    else:
        size = modulus
    counts: np.ndarray = np.zeros(size, np.uint32 if rows < 1 << 32 else np.uint64)
    appeared: list[np.ndarray] = []
    for piece in pieces():
        index = modulo(piece, modulus)
        index = (index if keys is None else _search(keys, index)).astype(np.intp, copy=False)
        if order == "first":
            new = index[counts[index] == 0]
            values, first = np.unique(new, return_index=True)
            appeared.append(values[np.argsort(first)].astype(np.uint32))
        np.add.at(counts, index, counts.dtype.type(1))

    if order == "first":
        chosen = np.concatenate([np.empty(0, np.uint32), *appeared])
        del appeared
        chosen = chosen[counts[chosen] >= min_count]
    else:
        chosen = np.flatnonzero(counts >= min_count).astype(np.uint32)
        # Unsigned counts can be negated to sort them by falling count, as no chosen one is 0.
        chosen = chosen[np.argsort(-counts[chosen], kind="stable")]
    kept = int(counts[chosen].sum(dtype=np.int64))
    counts = counts[counts > 0]
    counts.sort()
    top = {str(n): round(int(counts[-n:].sum(dtype=np.int64)) / rows, 6) for n in TOPS if n <= counts.size}
    report = {"distinct": counts.size, "kept": chosen.size, "rare_rows": rows - kept, "coverage": top}
    return Learned(chosen if keys is None else keys[chosen], report)


def distinct(pieces: Iterator[np.ndarray]) -> np.ndarray:
    """The distinct values of a column, sorted, (n,) uint32; memory is up to six times theirs.

    pieces: the column, in pieces of uint32.
    """
    keys, size = np.empty(0, np.uint32), 0
    waiting: list[np.ndarray] = []
    for piece in pieces:
        waiting.append(_unique(piece))
        size += waiting[-1].size
        # They are merged when there are as many new ones as old ones, so each is moved a few times only.
        if size >= max(keys.size, SORTED):
            keys, waiting, size = _unique(np.concatenate([keys, *waiting])), [], 0
    return _unique(np.concatenate([keys, *waiting]))


def _search(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """np.searchsorted(keys, values), but ten times as fast if the keys do not fit in the cache."""
    if keys.size < CACHED:
        return np.searchsorted(keys, values)
    # Values are searched in rising order, so each search begins near where the last one ended. The low bits
    # keep the index of each value.
    rising = (values.astype(np.uint64) << 32) | np.arange(values.size, dtype=np.uint64)
    rising.sort()
    found = np.empty(values.size, np.intp)
    found[rising & 0xFFFFFFFF] = np.searchsorted(keys, (rising >> 32).astype(np.uint32))
    return found


def _unique(values: np.ndarray) -> np.ndarray:
    """np.unique by sorting. NumPy 2.3 uses a hash table, which is 15 times as slow if most values differ."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if values.size else values


class Numbers:
    """Looks up the ids of a feature's values in its dictionary; those that are not in it have id 0."""

    def __init__(self, values: np.ndarray, modulus: int | None):
        self.modulus = modulus
        self.table: np.ndarray | None = None
        if modulus is None or modulus > COUNTED:
            self.ids = np.argsort(values).astype(np.uint32)
            self.values = values[self.ids]
            self.ids += 1
        else:
            self.table = np.zeros(modulus, np.uint32)  # takes memory only where it is written
            self.table[values] = np.arange(1, values.size + 1)

    def find(self, column: np.ndarray) -> np.ndarray:
        """The ids (n,) uint32 of values (n,) uint32."""
        column = modulo(column, self.modulus)
        if self.table is not None:
            return self.table[column]
        if self.values.size == 0:
            return np.zeros(column.shape, np.uint32)
        index = _search(self.values, column)
        index[index == self.values.size] = 0
        return np.where(self.values[index] == column, self.ids[index], np.uint32(0))


class Dictionary:
    """The dictionaries of all features.

    Memory is 8 bytes for each value in them; with a modulus up to COUNTED, 4 for each possible value.
    """

    def __init__(self, values: list[np.ndarray], modulus: int | None):
        self.features = [Numbers(part, modulus) for part in values]

    def encode(self, ids: IdsOfRows) -> IdsOfRows:
        """Raw ids (n, F) uint32, or bags of such, -> contiguous ids of the same form."""
        if isinstance(ids, Bags):
            return ids.mapped([feature.find for feature in self.features])
        encoded = np.empty(ids.shape, np.uint32)
        for feature, column, out in zip(self.features, ids.T, encoded.T, strict=True):
            out[:] = feature.find(column)
        return encoded

    @classmethod
    def load(cls, manifest: Manifest) -> Self:
        """The dictionary of a prepared folder; raises DataError if there is none or it was changed."""
        return cls(cls.values_of(manifest), manifest.ids.modulus)

    @staticmethod
    def values_of(manifest: Manifest) -> list[np.ndarray]:
        """For each feature its values (n,) uint32, of ids 1 ... n; errors as of `load`."""
        path = manifest.folder / DICTIONARY
        if manifest.ids.dialect != "dictionary":
            raise DataError(f"{manifest.folder}: has no dictionary; prepare it with --ids dictionary")
        again = "prepare the data again"
        array = NpyFile(path, missing=f"not found; {again}", remedy=again)
        sizes = np.array(manifest.ids.cardinalities) - 1
        if array.shape != (sizes.sum(),) or array.dtype != np.uint32:
            raise DataError(f"{path}: does not hold the {sizes.sum():,} values of the manifest; {again}")
        values = array.part(0, len(array))
        if hashlib.sha256(values.data).hexdigest() != manifest.dictionary_sha256:
            raise DataError(f"{path}: is not the one the manifest describes; {again}")
        return np.split(values, np.cumsum(sizes)[:-1])


def encoder(manifest: Manifest) -> Callable[[IdsOfRows], IdsOfRows]:
    """The function from the raw ids of a log, (n, F) uint32 or bags, to those of a prepared folder.

    Raises DataError if a dictionary is needed that is missing or was changed.
    """
    if manifest.ids.dialect == "dictionary":
        return Dictionary.load(manifest).encode
    return lambda ids: modulo(ids, manifest.ids.modulus)


def modulo(ids: Any, modulus: int | None) -> Any:
    """Ids (any shape) uint32, or those of bags, modulo `modulus`; as they are if it is None."""
    if modulus is None:
        return ids
    if isinstance(ids, Bags):
        return ids._replace(values=ids.values % np.uint32(modulus))
    return ids % np.uint32(modulus)


def report(manifest: Manifest) -> list[str]:
    """A few lines of text on the values of the columns."""
    return [shown(line) for line in (*_features(manifest), *clipped(manifest))]


def clipped(manifest: Manifest) -> list[str]:
    """A line for each dense column of which more than a hundredth was below 0, and became 0."""
    schema, lines = manifest.schema, []
    for name, share in manifest.clipped.items():
        if share > CLIPPED:
            remedy = f'{name} = "none" under [transform] in the schema' if schema.rules() else "--dense none"
            lines.append(
                f"warning: {name}: {share:.1%} of its values are below 0 and became 0; {remedy} keeps them"
            )
    return lines


def _features(manifest: Manifest) -> list[str]:
    if manifest.ids.dialect != "dictionary":
        counts = ", ".join(f"{feature['distinct']:,}" for feature in manifest.features)
        estimated = (
            "" if all(feature["distinct"] < 4096 for feature in manifest.features) else " (some estimated)"
        )
        return [f"distinct values per feature{estimated}: {counts}"]
    lines, rows = [], manifest.rows("train")
    for name, feature in zip(manifest.schema.categorical, manifest.features, strict=True):
        top = ", ".join(f"top {int(n):,} {share:.1%}" for n, share in feature["coverage"].items())
        kept = f"{feature['kept']:,} of {feature['distinct']:,} values kept"
        count, what = (feature["ids"], "ids") if manifest.schema.bags else (rows, "rows")
        rare = f"{feature['rare_rows'] / max(1, count):.2%} of {what} rare"
        lines.append(f"{name}: {kept}, {rare}; {what} covered: {top}")
    return lines
