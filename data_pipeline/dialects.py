"""The two ways to number the values of a categorical column, with the same verbs.

`HashIds` keeps the 32 bits of the log, which is all that a hashed embedding needs: no pass over the data, no
vocabulary. `Dictionary` numbers the values 1, 2, ... as training meets them, for tables that need ids without
gaps. Either is fed the log in order by `encode(ids, learn)`.
"""

import hashlib
from pathlib import Path
from typing import Self

import numpy as np

from data_pipeline.manifest import Ids, Manifest
from data_pipeline.schema import DataError

DICTIONARY = "dictionary.npy"


def fmix32(x: np.ndarray) -> np.ndarray:
    """The last step of MurmurHash3: uint32 to uint32, one to one, and the result looks random."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


class HashIds:
    """Raw ids as they are, and a count of the distinct ones in bounded memory.

    The count is a k-minimum-values sketch (Bar-Yossef et al., 2002): of the hashes of a feature's ids, keep
    the k smallest. If they are fewer, they are all there is. Else the k-th lies at a fraction of about
    k / distinct of the range, and (k - 1) / fraction estimates the count with a standard error of
    1 / sqrt(k - 2), 1.6% here. The hash is one to one, so distinct ids never share one.
    """

    def __init__(self, features: int, k: int = 4096):
        self.k = k
        self.smallest = [np.empty(0, np.uint32)] * features

    def encode(self, ids: np.ndarray, learn: bool) -> np.ndarray:
        """Count the ids (n, F) uint32 and return them unchanged; all count, training or not."""
        for feature, hashes in enumerate(fmix32(ids).T):
            kept = self.smallest[feature]
            if kept.size == self.k:  # soon so for all large features; little is then left to sort
                hashes = hashes[hashes < kept[-1]]
            self.smallest[feature] = np.unique(np.concatenate([kept, hashes]))[: self.k]
        return ids

    def describe(self) -> Ids:
        full = [kept.size == self.k for kept in self.smallest]
        counts = [
            round((self.k - 1) * 2**32 / (int(kept[-1]) + 1)) if over else kept.size
            for kept, over in zip(self.smallest, full, strict=True)
        ]
        return Ids("hash", tuple(counts), exact=not any(full))


class Dictionary:
    """Contiguous ids per feature: 0 for values that training did not see, then 1, 2, ... by first appearance.

    A missing value (raw 0) is a value like another. Memory is 8 bytes per distinct value, and about 40 more
    for those of one feature at a time, while they are merged.
    """

    def __init__(self, features: int):
        self.vocabularies = [Vocabulary() for _ in range(features)]

    def encode(self, ids: np.ndarray, learn: bool = False) -> np.ndarray:
        """Raw ids (n, F) uint32 -> contiguous ids (n, F) uint32; `learn` numbers the values not yet known."""
        encoded = np.empty_like(ids)
        for vocabulary, column, out in zip(self.vocabularies, ids.T, encoded.T, strict=True):
            out[:] = vocabulary.learn(column) if learn else vocabulary.find(column)
        return encoded

    def describe(self) -> Ids:
        return Ids("dictionary", tuple(v.size + 1 for v in self.vocabularies), exact=True)

    def save(self, folder: Path) -> str:
        """Write the values of ids 1, 2, ... of one feature after the other; returns the sha256."""
        values = np.concatenate([v.values() for v in self.vocabularies])
        np.save(folder / DICTIONARY, values)
        return hashlib.sha256(values).hexdigest()

    @classmethod
    def load(cls, manifest: Manifest) -> Self:
        """The dictionary of a prepared folder; raises DataError if there is none or it was changed."""
        path = manifest.folder / DICTIONARY
        if manifest.ids.dialect != "dictionary":
            raise DataError(f"{manifest.folder}: has no dictionary; prepare it with --ids dictionary")
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read ({error}); prepare the data again") from None
        if hashlib.sha256(values).hexdigest() != manifest.dictionary_sha256:
            raise DataError(f"{path}: is not the one the manifest describes; prepare the data again")
        sizes = np.array(manifest.ids.cardinalities) - 1
        dictionary = cls(sizes.size)
        parts = np.split(values, np.cumsum(sizes)[:-1])
        for vocabulary, part in zip(dictionary.vocabularies, parts, strict=True):
            vocabulary.add(part)
        return dictionary


class Vocabulary:
    """The values of one feature: the n-th to be added has id n.

    Held as a few sorted runs of (values, ids), each at least RATIO times as large as the next, as in a
    log-structured merge tree: a value is moved a few times, not once for every block that brings new ones.
    """

    RATIO = 8

    def __init__(self):
        self.size = 0
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, values: np.ndarray) -> None:
        """Append values (n,) uint32, distinct and not yet known."""
        ids = np.arange(self.size + 1, self.size + 1 + values.size, dtype=np.uint32)
        self.size += values.size
        while self.runs and self.runs[-1][0].size < self.RATIO * values.size:
            older_values, older_ids = self.runs.pop()
            values, ids = np.concatenate([older_values, values]), np.concatenate([older_ids, ids])
        order = np.argsort(values, kind="stable")
        self.runs.append((values[order], ids[order]))

    def find(self, column: np.ndarray) -> np.ndarray:
        """The ids of values (n,) uint32; 0 for those not known."""
        found = np.zeros(column.shape, np.uint32)
        for values, ids in self.runs:
            place = np.minimum(np.searchsorted(values, column), values.size - 1)
            np.copyto(found, ids[place], where=values[place] == column)
        return found

    def learn(self, column: np.ndarray) -> np.ndarray:
        """Add the values not yet known in order of appearance; the ids of all."""
        found = self.find(column)
        unknown = np.flatnonzero(found == 0)
        if unknown.size:
            values, first = np.unique(column[unknown], return_index=True)
            self.add(values[np.argsort(first)])
            found[unknown] = self.find(column[unknown])
        return found

    def values(self) -> np.ndarray:
        """The values (size,) uint32 in the order of their ids."""
        values = np.empty(self.size, np.uint32)
        for run, ids in self.runs:
            values[ids - 1] = run
        return values
