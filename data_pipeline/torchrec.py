"""Folders written by TorchRec's Criteo tools: the same shards as ours, but no manifest.

For the benchmark of MLPerf from version 2 on, where each column is a bag of a size of its own, they write the
ids to day_N_sparse_multi_hot.npz instead: for each column, "0", "1", ..., an array (rows, size).

What a manifest would say is found by reading the folder once, in memory that does not grow with it. The
shards do not tell how their values were made from a log. So a model can be trained and evaluated on such
folders, but it cannot predict for raw logs.
"""

import hashlib
import struct
import zipfile
from collections.abc import Generator
from pathlib import Path

import numpy as np

from data_pipeline.bags import CHECKED_ROWS, Bags, BagShards, ends
from data_pipeline.dialects import Distinct
from data_pipeline.manifest import KINDS, Day, Ids, Manifest, possible, shard_name, shard_types
from data_pipeline.npy import NpyFile
from data_pipeline.schema import Bag, DataError, Schema
from data_pipeline.splits import split

TRANSFORM = "torchrec"
BLOCK_ROWS = 1 << 18
# What a value must be, in words.
WORDS = {
    "labels": "0 or 1",
    "dense": "finite (TorchRec's logarithm of a count of -3 is not)",
    "sparse": "of 32 bits",
}


def is_folder(folder: Path | str) -> bool:
    """Whether the folder has a first day as TorchRec's tools write it; ours have, too."""
    return any((Path(folder) / name(0)).is_file() for name in (sparse_name, multi_hot_name))


def sparse_name(day: int) -> str:
    return shard_name(day, "sparse")


def multi_hot_name(day: int) -> str:
    return f"day_{day}_sparse_multi_hot.npz"


class MultiHot(BagShards):
    """The bags of a day in the arrays of an .npz file, a column each, which are not packed."""

    def open(self, manifest: Manifest, day: int) -> None:
        self.arrays = _members(manifest.folder / multi_hot_name(day))
        self.sparse = self.arrays[0]
        rows = manifest.days[day].rows
        if {len(array) for array in self.arrays} != {rows} or len(self.arrays) != self.features:
            raise DataError(
                f"{self.sparse.path}: does not hold {self.features} arrays of {rows:,} rows, as others say; "
                "write it again"
            )

    def read(self, start: int, stop: int) -> Bags:
        columns = [np.empty((stop - start, array.shape[1]), np.uint32) for array in self.arrays]
        for array, column in zip(self.arrays, columns, strict=True):
            array.read(start, column)
        sizes = np.tile([column.shape[1] for column in columns], stop - start)
        return Bags(np.concatenate(columns, axis=1).ravel(), ends(sizes), None)


def _members(path: Path) -> list[NpyFile]:
    """The arrays (rows, size) "0", "1", ... of an .npz file; raises DataError if it is not as MLPerf's."""
    again = "write it again, by numpy.savez"
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = archive.infolist()
            found = {}
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED:
                    raise DataError(f"{path}: is packed, which rows cannot be read from; {again}")
                file.seek(member.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                start = member.header_offset + 30 + name + extra
                found[member.filename] = NpyFile(path, missing="missing", remedy=again, start=start)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; TorchRec's tools write three files a day, from 0 on") from None
    except (OSError, zipfile.BadZipFile, struct.error) as error:
        raise DataError(f"{path}: damaged ({error}); {again}") from None
    arrays = [found[name] for i in range(len(found)) if (name := f"{i}.npy") in found]
    wrong = [
        a for a in arrays if len(a.shape) != 2 or a.shape[1] < 1 or a.fortran or a.dtype != KINDS["sparse"]
    ]
    if not arrays or len(arrays) != len(found) or wrong:
        raise DataError(f"{path}: does not hold arrays 0, 1, ... of int32 (rows, size); {again}")
    return arrays


def adopt(folder: Path | str) -> Manifest:
    """The manifest of a folder of day_N_{dense,sparse,labels}.npy, N from 0, which has none.

    Ids without gaps, as TorchRec's `sparse_to_contiguous` makes them, are taken for those of a dictionary, so
    that tables can be trained on them; all others for the raw 32 bits. The split is TorchRec's.

    Raises DataError naming the first file, and row, that training could not use.
    """
    folder = Path(folder)
    if (folder / multi_hot_name(0)).is_file():
        return _adopt_bags(folder)
    count = len(list(folder.glob("day_[0-9]*_sparse.npy")))
    width = {kind: _open(folder, 0, kind).shape[1] for kind in KINDS}
    distinct, largest = Distinct(width["sparse"]), np.zeros(width["sparse"], np.int64)
    days = []
    for day in range(count):
        rows = len(_open(folder, day, "labels"))
        hashes = {kind: hashlib.sha256() for kind in KINDS}
        for kind in KINDS:
            for block in _row_blocks(folder, day, kind, (rows, width[kind])):
                hashes[kind].update(block.data)
                if kind == "sparse":
                    distinct.add(block.view(np.uint32))
                    largest = np.maximum(largest, block.view(np.uint32).max(axis=0))
        sha256 = {kind: digest.hexdigest() for kind, digest in hashes.items()}
        days.append(Day(rows, sha256, str(folder / f"day_{day}")))
    return _manifest(folder, width["dense"], days, distinct, largest, {})


def _adopt_bags(folder: Path) -> Manifest:
    """The same for a folder of multi-hot ids."""
    count = len(list(folder.glob("day_[0-9]*_sparse_multi_hot.npz")))
    features, dense = len(_members(folder / multi_hot_name(0))), _open(folder, 0, "dense").shape[1]
    names = tuple(f"cat_{i}" for i in range(features))
    schema = Schema("TorchRec", "label", (), names, bags=dict.fromkeys(names, Bag()))
    distinct, largest, days = Distinct(features), np.zeros(features, np.int64), []
    for day in range(count):
        rows = len(_open(folder, day, "labels"))
        hashes = {kind: hashlib.sha256() for kind in KINDS}
        for kind, columns in (("labels", 1), ("dense", dense)):
            for block in _row_blocks(folder, day, kind, (rows, columns)):
                hashes[kind].update(block.data)
        told = Manifest(
            schema, TRANSFORM, Ids("hash", (), True), (Day(rows, {}, ""),) * count, {}, "", folder=folder
        )
        shards = MultiHot(told, day)
        for start in range(0, rows, CHECKED_ROWS):
            bags = shards.read(start, min(start + CHECKED_ROWS, rows))
            hashes["sparse"].update(bags.values.data)
            distinct.add(bags)
            largest = np.maximum(largest, [column.max() for column in bags.columns(features)])
        sha256 = {kind: digest.hexdigest() for kind, digest in hashes.items()}
        days.append(Day(rows, sha256, str(folder / f"day_{day}")))
    return _manifest(folder, dense, days, distinct, largest, schema.bags)


def _manifest(
    folder: Path, width: int, days: list[Day], distinct: Distinct, largest: np.ndarray, bags: dict[str, Bag]
) -> Manifest:
    """What a manifest would say, of days whose ids were counted; width: the number of dense columns."""
    try:
        parts, note = split([day.rows for day in days], "torchrec")
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    ids = Ids("hash", distinct.counts(), distinct.exact())
    if (largest < 2 * np.array(ids.cardinalities)).all():
        ids = Ids("dictionary", tuple((largest + 1).tolist()), exact=True)
    dense, categorical = (
        tuple(f"{name}_{i}" for i in range(count)) for name, count in (("int", width), ("cat", len(largest)))
    )
    return Manifest(
        schema=Schema("TorchRec", "label", dense, categorical, bags=bags),
        dense_transform=TRANSFORM,
        ids=ids,
        days=tuple(days),
        split=parts,
        split_note=note,
        folder=folder,
    )


def _open(folder: Path, day: int, kind: str) -> NpyFile:
    path = folder / shard_name(day, kind)
    array = NpyFile(
        path,
        missing="missing; TorchRec's tools write three files a day, from 0 on",
        remedy="write it again",
    )
    columns = array.shape[1:]
    if len(columns) != 1 or array.dtype not in shard_types(kind) or (kind == "labels" and columns != (1,)):
        raise DataError(f"{path}: holds {array.dtype} {array.shape}, not TorchRec's {kind}; write it again")
    return array


def _row_blocks(
    folder: Path, day: int, kind: str, shape: tuple[int, int]
) -> Generator[np.ndarray, None, None]:
    """The rows of a shard, BLOCK_ROWS at a time, in the type that our shards have."""
    path, array = folder / shard_name(day, kind), _open(folder, day, kind)
    if array.shape != shape:
        raise DataError(f"{path}: is {array.shape}, but others say {shape}; write it again")
    for start in range(0, len(array), BLOCK_ROWS):
        rows = array.part(start, start + BLOCK_ROWS)
        if not (good := possible(rows, kind)).all():
            row, column = np.argwhere(~good)[0]
            raise DataError(
                f"{path}, row {start + row + 1}, column {column + 1}: {rows[row, column]} is not "
                f"{WORDS[kind]}; prepare the raw logs with `robe prepare`"
            )
        yield rows.astype(KINDS[kind], copy=False)
