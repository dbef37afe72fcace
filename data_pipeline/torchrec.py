"""Folders written by TorchRec's Criteo tools: the same shards as ours, but no manifest.

What a manifest would say is found by reading the folder once, in memory that does not grow with it. How the
values were made of a log cannot be found: such a folder trains, and evaluates what was trained on another,
but a model of it takes no raw logs.
"""

import hashlib
from pathlib import Path

import numpy as np

from data_pipeline.dialects import Distinct
from data_pipeline.manifest import KINDS, Day, Ids, Manifest, shard_name
from data_pipeline.schema import DataError, Schema
from data_pipeline.splits import split

TRANSFORM = "torchrec"
BLOCK_ROWS = 1 << 18
# What a value must be, in words; `_good` tells which are.
WORDS = {
    "labels": "0 or 1",
    "dense": "finite (TorchRec's logarithm of a count of -3 is not)",
    "sparse": "of 32 bits",
}


def is_folder(folder: Path | str) -> bool:
    return (Path(folder) / shard_name(0, "sparse")).is_file()


def adopt(folder: Path | str) -> Manifest:
    """The manifest of a folder of day_N_{dense,sparse,labels}.npy, N from 0, which has none.

    Ids without gaps, as TorchRec's `sparse_to_contiguous` makes them, count as a dictionary's, so that tables
    can be trained on them; all others are raw 32 bits. The split is TorchRec's.

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
            for block in _blocks(folder, day, kind, (rows, width[kind])):
                hashes[kind].update(block)
                if kind == "sparse":
                    ids = block.view(np.uint32)
                    distinct.add(ids)
                    largest = np.maximum(largest, ids.max(axis=0))
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


def _open(folder: Path, day: int, kind: str) -> np.ndarray:
    path = folder / shard_name(day, kind)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; TorchRec's tools write three files a day, from 0 on") from None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error}); write it again") from None
    types = (KINDS[kind], np.dtype(np.int64)) if kind == "sparse" else (KINDS[kind],)
    if array.ndim != 2 or array.dtype not in types or (kind == "labels" and array.shape[1] != 1):
        raise DataError(f"{path}: holds {array.dtype} {array.shape}, not TorchRec's {kind}; write it again")
    return array


def _blocks(folder: Path, day: int, kind: str, shape: tuple[int, int]):
    """The rows of a shard, some at a time, as ours would hold them."""
    path, array = folder / shard_name(day, kind), _open(folder, day, kind)
    if array.shape != shape:
        raise DataError(f"{path}: is {array.shape}, but others say {shape}; write it again")
    for start in range(0, len(array), BLOCK_ROWS):
        block = np.ascontiguousarray(array[start : start + BLOCK_ROWS])
        if not (good := _good(kind, block)).all():
            row, column = np.argwhere(~good)[0]
            raise DataError(
                f"{path}, row {start + row + 1}, column {column + 1}: {block[row, column]} is not "
                f"{WORDS[kind]}; prepare the raw logs with `robe prepare`"
            )
        yield block.astype(KINDS[kind], copy=False)


def _good(kind: str, block: np.ndarray) -> np.ndarray:
    if kind == "labels":
        return (block == 0) | (block == 1)
    if kind == "dense":
        return np.isfinite(block)
    return (block >= -(2**31)) & (block < 2**32)
