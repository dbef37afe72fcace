"""With a dictionary: the raw columns of all features -> their ids, and these -> the sparse shards.

Features are numbered independently of each other, and so are days joined; the ranks share both. What was read
is removed once what was written is whole.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from data_pipeline import shard_files
from data_pipeline.appearing import partial_name
from data_pipeline.dialects import Numbers, learn
from data_pipeline.job import Job
from data_pipeline.manifest import Stretch
from data_pipeline.shard_files import new_shard, read_column, save_array
from data_pipeline.whole_files import new_file


def number_features(job: Job, day_rows: list[int], train: tuple[Stretch, ...]) -> None:
    """Learn the dictionary of each feature from the rows that train, and write its columns as ids.

    day_rows: the number of rows of each day.
    """
    config, features = job.config, job.features()
    train_rows = sum(stop - start for _, start, stop in train)
    for feature in job.ranks.share(features):
        done = job.work / f"feature_{feature}.done"
        if not done.exists():
            learned = learn(
                partial(_training_values, job, feature, train),
                train_rows,
                modulus=config.max_ind_range,
                min_count=config.min_count,
                order=config.order,
            )
            save_array(job.work / f"feature_{feature}.npy", learned.values)
            numbers = Numbers(learned.values, config.max_ind_range)
            for day, rows in enumerate(day_rows):
                path = job.column(day, "ids", feature)
                with new_file(path, partial_name(path)) as file:
                    for piece in read_column(job.column(day, "raw", feature), 0, rows):
                        file.write(numbers.find(piece).data)
            job.note(done.name, learned.report)
        for day in range(len(day_rows)):
            job.column(day, "raw", feature).unlink(missing_ok=True)
        job.meter.add(job.meter.size // (2 * len(features)))


def _training_values(job: Job, feature: int, train: tuple[Stretch, ...]) -> Iterator[np.ndarray]:
    for day, start, stop in train:
        yield from read_column(job.column(day, "raw", feature), start, stop)


def join_days(job: Job, day_rows: list[int]) -> None:
    """Write the sparse shard of each day from its columns of ids."""
    features = job.features()
    step = shard_files.PIECE // len(features)
    for day in job.ranks.share(range(len(day_rows))):
        done = job.work / f"joined_{day}.done"
        if not done.exists():
            sha256: dict[str, str] = {}
            with new_shard(job.shard(day, "sparse"), "sparse", sha256) as append:
                for start in range(0, day_rows[day], step):
                    stop = min(start + step, day_rows[day])
                    columns = [next(read_column(job.column(day, "ids", f), start, stop)) for f in features]
                    append(np.stack(columns, axis=1))
            job.note(done.name, sha256)
        for feature in features:
            job.column(day, "ids", feature).unlink(missing_ok=True)
        job.meter.add(job.meter.size // (2 * len(day_rows)))
