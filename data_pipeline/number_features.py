"""With a dictionary: the raw columns of all features -> their ids, and these -> the sparse shards.

Features are numbered independently of each other, and so are days joined; the ranks share both. What was read
is removed once what was written is whole.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from data_pipeline import shard_files
from data_pipeline.appearing import partial_name
from data_pipeline.bags import laid_in
from data_pipeline.dialects import Dictionary, Numbers, learn
from data_pipeline.job import Job
from data_pipeline.manifest import Manifest, Stretch
from data_pipeline.npy import NpyFile
from data_pipeline.shard_files import new_shard, read_column, save_array
from data_pipeline.whole_files import new_file


def number_features(
    job: Job, day_rows: list[int], train: tuple[Stretch, ...], known: Manifest | None
) -> None:
    """Learn the dictionary of each feature from the rows that train, and write its columns as ids.

    day_rows: the number of rows of each day. known: of days before these, whose dictionary goes on with the
    values of all rows of the days behind them: a day that tests now will train later, and is not read again.
    """
    config, features, before = job.config, job.features(), [np.empty(0, np.uint32)] * len(job.features())
    days = range(len(known.days) if known else 0, len(day_rows))
    if known:
        train, before = tuple((day, 0, day_rows[day]) for day in days), Dictionary.values_of(known)
    ids = {day: _ids_before(job, day, day_rows[day]) for day in days}
    training = [
        (day, _ids_before(job, day, first), _ids_before(job, day, stop)) for day, first, stop in train
    ]
    for feature in job.ranks.share(features):
        done = job.work / f"feature_{feature}.done"
        if not done.exists():
            mine = [(day, first[feature], stop[feature]) for day, first, stop in training]
            learned = learn(
                partial(_training_values, job, feature, mine),
                sum(stop - start for _, start, stop in mine),
                modulus=config.max_ind_range,
                min_count=config.min_count,
                order=config.order,
            )
            new = learned.values[~np.isin(learned.values, before[feature])]
            values = np.concatenate([before[feature], new])
            save_array(job.work / f"feature_{feature}.npy", values)
            numbers = Numbers(values, config.max_ind_range)
            for day, counts in ids.items():
                path = job.column(day, "ids", feature)
                with new_file(path, partial_name(path)) as file:
                    for piece in read_column(job.column(day, "raw", feature), 0, counts[feature]):
                        file.write(numbers.find(piece).data)
            seen = {"ids": sum(stop - start for _, start, stop in mine)} if config.schema.bags else {}
            report = learned.report | seen
            if known:  # shares of rows stay those of the days before
                counts = {name: known.features[feature][name] + new.size for name in ("distinct", "kept")}
                report = known.features[feature] | counts
            job.note(done.name, report)
        for day in days:
            job.column(day, "raw", feature).unlink(missing_ok=True)
        job.meter.add(job.meter.size // (2 * len(features)))


def _training_values(job: Job, feature: int, train: list[Stretch]) -> Iterator[np.ndarray]:
    for day, start, stop in train:
        yield from read_column(job.column(day, "raw", feature), start, stop)


def _lengths(job: Job, day: int) -> NpyFile:
    """How many ids each bag of a day has."""
    remedy = f"remove {job.work} to begin again"
    return NpyFile(job.shard(day, "lengths"), missing=f"missing; {remedy}", remedy=remedy)


def _ids_before(job: Job, day: int, row: int) -> list[int]:
    """How many ids of each feature stand before a row: as many as rows, but for bags."""
    features = len(job.features())
    if not job.config.schema.bags:
        return [row] * features
    lengths, step = _lengths(job, day), shard_files.PIECE // features
    counts = np.zeros(features, np.int64)
    for start in range(0, row, step):
        counts += lengths.part(start, min(start + step, row)).sum(axis=0, dtype=np.int64)
    return counts.tolist()


def join_days(job: Job, day_rows: list[int]) -> None:
    """Write the sparse shard of each day from its columns of ids."""
    features = job.features()
    for day in job.ranks.share(range(len(day_rows))):
        done = job.work / f"joined_{day}.done"
        if not done.exists():
            sha256: dict[str, str] = {}
            with new_shard(job.shard(day, "sparse"), "sparse", sha256) as append:
                for rows in (_bags if job.config.schema.bags else _rows)(job, day, day_rows[day]):
                    append(rows)
            job.note(done.name, sha256)
        for feature in features:
            job.column(day, "ids", feature).unlink(missing_ok=True)
        job.meter.add(job.meter.size // (2 * len(day_rows)))


def _rows(job: Job, day: int, rows: int) -> Iterator[np.ndarray]:
    """The rows of a sparse shard (n, F), in parts."""
    features = job.features()
    step = shard_files.PIECE // len(features)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        columns = [next(read_column(job.column(day, "ids", f), start, stop)) for f in features]
        yield np.stack(columns, axis=1)


def _bags(job: Job, day: int, rows: int) -> Iterator[np.ndarray]:
    """The ids of bags, as in a sparse shard (n, 1), in parts."""
    features, lengths = job.features(), _lengths(job, day)
    # Of about PIECE ids, and lengths at most.
    step = max(1, shard_files.PIECE * rows // max(sum(_ids_before(job, day, rows)), rows * len(features)))
    before = np.zeros(len(features), np.int64)
    for start in range(0, rows, step):
        part = lengths.part(start, start + step)
        after = before + part.sum(axis=0, dtype=np.int64)
        columns = [
            np.concatenate([np.empty(0, np.uint32), *read_column(job.column(day, "ids", f), first, stop)])
            for f, first, stop in zip(features, before.tolist(), after.tolist(), strict=True)
        ]
        yield laid_in(part, columns)[:, None]
        before = after
