"""Folders of shards: opening one, made here or by TorchRec's tools, and checking what lies in it."""

import hashlib
import re
from pathlib import Path

import numpy as np

from data_pipeline import torchrec
from data_pipeline.bags import BagShards
from data_pipeline.dialects import Dictionary
from data_pipeline.manifest import MANIFEST, Ids, Manifest, possible, shard_columns, shard_name, shard_type
from data_pipeline.schema import CRITEO_TB_ROWS, DataError
from data_pipeline.stores import require_disk

CHECKED = 1 << 22  # so many values of a shard are in memory at a time
DAY_FILE = re.compile(r"day_(\d+)(\..*)?")


def open_folder(folder: Path | str) -> Manifest:
    """The manifest of a folder; for one of TorchRec's tools, which has none, what it would say.

    To find that, TorchRec's folder is read once. Raises DataError with the remedy if the folder, or its
    manifest, is missing or cannot be used.
    """
    require_disk(Path(folder), "prepared folders are read")
    if not (Path(folder) / MANIFEST).exists() and torchrec.is_folder(folder):
        return torchrec.adopt(folder)
    return Manifest.load(folder)


def verify(folder: Path | str) -> Manifest:
    """Read all shards of a folder again, and return its manifest.

    Raises DataError naming the first shard whose bytes are not those that were written, or that holds an
    impossible value.
    """
    manifest = open_folder(folder)
    for number, day in enumerate(manifest.days):
        bags = open_bags(manifest, number) if manifest.schema.bags else None
        # The arrays of multi-hot ids are no shards.
        multi_hot = isinstance(bags, torchrec.MultiHot)
        for kind in ("labels", "dense") if multi_hot else shard_columns(manifest.schema):
            path = manifest.folder / shard_name(number, kind)
            shard, digest, trouble = manifest.open_shard(number, kind), hashlib.sha256(), None
            step = CHECKED // max(1, shard.shape[1])
            for start in range(0, len(shard), step):
                rows = shard.part(start, start + step).astype(shard_type(kind), copy=False)
                digest.update(rows.data)
                # Which column the ids of bags belong to, and so how large they may be, is looked at below.
                good = possible(rows, kind) if bags else valid(rows, kind, manifest.ids)
                wrong = np.flatnonzero(~good.all(axis=1))
                if wrong.size and trouble is None:
                    trouble = f"row {start + wrong[0]} holds what no {kind} may be"
            if digest.hexdigest() != day.sha256.get(kind):
                trouble = "its bytes are not those that were written"
            if trouble is not None:
                raise DataError(f"{path}: {trouble}; prepare the data again")
        for _ in bags.checked(0, day.rows) if bags else ():
            pass
    if manifest.dictionary_sha256 is not None:
        Dictionary.load(manifest)
    return manifest


def open_bags(manifest: Manifest, day: int) -> BagShards:
    """The bags of a day; raises DataError where their files are missing or do not agree."""
    multi_hot = (manifest.folder / torchrec.multi_hot_name(day)).exists()
    return (torchrec.MultiHot if multi_hot else BagShards)(manifest, day)


def valid(rows: np.ndarray, kind: str, ids: Ids) -> np.ndarray:
    """Which values of a shard are possible; ids have to be below their feature's cardinality."""
    if kind != "sparse":
        return possible(rows, kind)
    if ids.dialect == "hash":
        return np.ones(rows.shape, bool)
    return rows.view(np.uint32) < np.array(ids.cardinalities)


def against_published(manifest: Manifest) -> str | None:
    """Compare the numbers of lines with those published of Criteo Terabyte, in one line of text.

    None if no day is named like one of its files and of such a size; smaller ones are samples, or of another
    log.
    """
    found = []
    for day in manifest.days:
        match, lines = DAY_FILE.fullmatch(Path(day.source).name), day.rows + day.rejected + day.dropped
        if match and int(match[1]) < len(CRITEO_TB_ROWS) and lines > 10**8:
            found.append((day.source, lines, CRITEO_TB_ROWS[int(match[1])]))
    for source, lines, published in found:
        if lines != published:
            return (
                f"{source}: {lines:,} lines, but Criteo Terabyte has {published:,} there; is the file whole?"
            )
    return f"lines of {len(found)} days: as published of Criteo Terabyte" if found else None
