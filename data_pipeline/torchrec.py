"""Folders written by TorchRec's Criteo tools: the same shards as ours, but no manifest.

What a manifest would say is found by reading the folder once, in memory that does not grow with it. The
shards do not tell how their values were made from a log. So a model can be trained and evaluated on such
folders, but it cannot predict for raw logs.
"""

import hashlib
from collections.abc import Generator
from pathlib import Path

import numpy as np

from data_pipeline.dialects import Distinct
from data_pipeline.manifest import KINDS, Day, Ids, Manifest, possible, shard_name, shard_types
from data_pipeline.npy import NpyFile
from data_pipeline.schema import DataError, Schema
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
    return (Path(folder) / shard_name(0, "sparse")).is_file()


def adopt(folder: Path | str) -> Manifest:
    """The manifest of a folder of day_N_{dense,sparse,labels}.npy, N from 0, which has none.

    Ids without gaps, as TorchRec's `sparse_to_contiguous` makes them, are taken for those of a dictionary, so
    that tables can be trained on them; all others for the raw 32 bits. The split is TorchRec's.

    Raises DataError naming the first file, and row, that training could not use.
    """
    folder = Path(folder)
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
    try:
        parts, note = split([day.rows for day in days], "torchrec")
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    ids = Ids("hash", distinct.counts(), distinct.exact())
    if (largest < 2 * np.array(ids.cardinalities)).all():
        ids = Ids("dictionary", tuple((largest + 1).tolist()), exact=True)
    dense, categorical = (
        tuple(f"{name}_{i}" for i in range(width[kind]))
        for name, kind in (("int", "dense"), ("cat", "sparse"))
    )
    return Manifest(
        schema=Schema("TorchRec", "label", dense, categorical),
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
