"""A prepared folder as the first days of another: its settings, and its shards as days that are done."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.bags import BagShards, IdsOfRows
from data_pipeline.dialects import Distinct
from data_pipeline.job import Job, PrepareConfig
from data_pipeline.manifest import Manifest, shard_columns, shard_name
from data_pipeline.scale_dense import DONE
from data_pipeline.schema import DataError, Schema
from data_pipeline.shard_files import PIECE, save_array
from data_pipeline.whole_files import copy_whole


def as_before(config: PrepareConfig, known: Manifest) -> PrepareConfig:
    """The settings with all that decides what values mean as in a folder.

    Raises DataError where something else was asked for.
    """
    if known.keep_negatives < 1 or config.keep_negatives < 1:
        # The day that tested is whole, and the rows that train would have two rates.
        raise DataError(
            f"{known.folder}: --append does not go with --keep-negatives, as days that tested are whole; "
            "prepare all days at once"
        )
    ids = known.ids
    taken: dict[str, Any] = {"schema": known.schema, "dense": known.dense_transform, "ids": ids.dialect}
    taken |= {"max_ind_range": ids.modulus, "min_count": ids.min_count, "order": ids.order}
    defaults = {field.name: field.default for field in dataclasses.fields(PrepareConfig)}
    for name, value in taken.items():
        if (given := getattr(config, name)) not in (value, defaults[name]):
            told = "" if isinstance(given, Schema) else f" {given}"
            raise DataError(
                f"--{name.replace('_', '-')}{told}: not as in {known.folder}, whose days --append goes on "
                "from; leave it out"
            )
    return dataclasses.replace(config, **taken)


def take_over(job: Job, known: Manifest) -> None:
    """Have the days of a folder in the one that is made, as days with which all is done."""
    schema, before = known.schema, sum(day.rows for day in known.days)
    for number, day in enumerate(known.days):
        if (job.work / f"day_{number}.done").exists():
            continue
        for kind in shard_columns(schema):
            known.open_shard(number, kind)  # raises DataError if it is not what the manifest says
            _share(known.folder / shard_name(number, kind), job.shard(number, kind))
        if known.ids.dialect != "dictionary":
            distinct = Distinct(len(schema.categorical))
            for ids in _ids(known, number):
                distinct.add(ids)
            save_array(job.work / f"day_{number}_distinct.npy", distinct.to_array())
        for step in ("joined", "scaled"):
            job.note(f"{step}_{number}.done", {})
        record = {"rows": day.rows, "sha256": day.sha256, "source": None, "rejected": day.rejected}
        if number == 0:  # of all these days together
            record["clipped"] = [round(known.clipped.get(name, 0) * before) for name in schema.dense]
        job.note(f"day_{number}.done", record)
    if known.measured:
        job.note(DONE, known.measured)


def _share(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it to where it can have none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        copy_whole(source, target)


def _ids(known: Manifest, day: int) -> Iterator[IdsOfRows]:
    """The ids of a day, some rows at a time."""
    features, rows = len(known.schema.categorical), known.days[day].rows
    shard = BagShards(known, day) if known.schema.bags else known.open_shard(day, "sparse")
    step = max(1, PIECE // features)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if isinstance(shard, BagShards):
            yield shard.read(start, stop)
        else:
            yield shard.part(start, stop).astype(np.int64).astype(np.uint32)
