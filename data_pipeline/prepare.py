"""Raw logs -> a folder of shards and its manifest, in memory that does not grow with the log.

    parse    a day of the log -> its shards (parse_days.py)
    scale    with transforms that are measured only: dense columns -> the dense shards (scale_dense.py)
    number   with a dictionary only: a feature of all days -> its ids (number_features.py)
    join     with a dictionary only: the ids of all features on a day -> its sparse shard (the same)
    finish   manifest.json is written, and the folder appears

All files are made in `.OUT.partial` beside the folder to be. A file gets its name when it is whole, and each
day and feature that is done is noted as done. So if a preparation ends early, by whatever means, the same
command goes on from there, and the bytes are the same in the end. Several processes may share the work
(`--days`, mpiexec).
"""

import ctypes
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from data_pipeline.appearing import finish, read_note, resuming, work_folder
from data_pipeline.append import as_before, take_over
from data_pipeline.dialects import DICTIONARY, Distinct
from data_pipeline.input_files import input_files
from data_pipeline.job import Job, Meter, PrepareConfig, Progress, identity
from data_pipeline.logs import count_rows, has_rows
from data_pipeline.manifest import Day, Ids, Manifest, Scores, Stretch, measured_columns
from data_pipeline.names import shown
from data_pipeline.number_features import join_days, number_features
from data_pipeline.parse_days import END, REJECTED, Source, parse_days
from data_pipeline.partitions import files_of, size_of
from data_pipeline.ranks import Ranks
from data_pipeline.scale_dense import measure, measured, scale_days
from data_pipeline.schema import SPLIT_DAYS, DataError, Schema
from data_pipeline.shard_files import load_array, save_array
from data_pipeline.splits import BY_COLUMN, halves_of, split, split_words, training_days
from data_pipeline.stores import located
from data_pipeline.synthetic import FIGURES
from data_pipeline.whole_files import naming, new_file, read_text, write_json

NUMBERED_BY = "min_count", "order", "split"  # settings that the shards of a day do not depend on


def prepare(config: PrepareConfig, progress: Progress | None = None) -> Manifest | None:
    """Write the folder `config.out` and return its manifest; with `days`, parse these and return None.

    Raises DataError for settings, logs or folders that cannot be used. The days that are done by then are
    kept for the next attempt; if none is, nothing is left. Under mpiexec every rank calls this and does its
    share of the work.
    """
    known = None if config.append is None else Manifest.load(config.append)
    config = config if known is None else as_before(config, known)
    _check(config)
    by_column = config.schema.split is not None
    if by_column or config.split is None:
        config = replace(config, split=BY_COLUMN if by_column else "mlperf")
    _keep_freed_memory()
    ranks, meter = Ranks(), Meter(progress)
    config = replace(config, inputs=tuple(map(located, config.inputs)))
    files = input_files(config.inputs, config.input_order)
    if by_column:
        files = [_only_log(config.inputs, files)]
    files = _without_empty(files, config.schema, ranks.rank == 0)
    _synthetic(files, halves_of(config.split), known)  # raises where the last call would, hours later
    single = len(files) == 1 and known is None
    first, cut = len(known.days) if known else 0, single and not by_column
    count = len(set(SPLIT_DAYS.values())) if by_column else first + (config.blocks if cut else len(files))
    if count < 2:
        raise DataError(f"{files[0]}: a single file cannot be {count} days; give --blocks 2 or more")
    # Raises now if --split is wrong, not after hours of parsing.
    asked, _ = split([10**6] * count, config.split)
    learning = config.ids == "dictionary" or measured_columns(config.schema, config.dense)
    if not asked["train"] and (learning or config.keep_negatives < 1):
        raise DataError(
            f"--split {config.split}: no row trains, as dictionaries, zscore, quantile and --keep-negatives "
            "need; leave them out, or let rows train"
        )
    days = range(first, count) if config.days is None else _chosen(config.days, first, count)
    locked = None if config.days is None else [f"day_{day}" for day in days]
    thinned = training_days(count, config.split) if config.keep_negatives < 1 else ()
    job = Job(config, work_folder(config.out), ranks, meter, thinned)
    with ExitStack() as stack:
        with ranks.together():
            if ranks.rank == 0:
                settings = _settings(job, files, cut, known)
                stack.enter_context(resuming(config.out, settings, meter.share, locked, NUMBERED_BY))
                mine = files if single else [files[day - first] for day in ranks.share(days)]
                meter.plan(mine, cut, config.ids == "dictionary")
                if known is not None:
                    take_over(job, known)
                if cut:
                    _count_lines(job, files[0])
        sources = _sources(job, files, first, cut)
        with ranks.together():
            parse_days(job, sources, ranks.share(days))
        if config.days is not None:
            return None
        origins = [day.source for day in known.days] if known else []
        origins += [origin for source in sources for origin in source.origins]
        with ranks.together():  # all ranks read the notes before rank 0 may remove them
            records = [read_note(job.work / f"day_{day}.done") or {"rows": 0} for day in range(count)]
        day_rows = [record["rows"] for record in records]
        dropped = [record.get("dropped", 0) for record in records]
        parts, note = _split(job, day_rows, dropped, origins, single=single)
        if measured_columns(config.schema, config.dense):
            with ranks.together():
                if ranks.rank == 0:
                    measure(job, parts["train"])
            with ranks.together():
                scale_days(job, day_rows)
        if config.ids == "dictionary":
            with ranks.together():
                number_features(job, day_rows, parts["train"], known)
            with ranks.together():
                join_days(job, day_rows)
        with ranks.together():
            if ranks.rank == 0:
                manifest = _finish(job, files, origins, records, parts, note, known)
        meter.finish()
    return manifest if ranks.rank == 0 else Manifest.load(config.out)


def _check(config: PrepareConfig) -> None:
    """Raise DataError for settings that do not go together."""
    modulus = config.max_ind_range
    if config.ids == "modulo" and modulus is None:
        raise DataError("--ids modulo: needs --max-ind-range, the number to take ids modulo")
    if config.ids == "hash" and modulus is not None:
        raise DataError("--max-ind-range: not with --ids hash; give --ids modulo or dictionary")
    if modulus is not None and not 1 <= modulus < 1 << 32:
        raise DataError(f"--max-ind-range {modulus}: must be from 1 to {2**32 - 1}")
    if config.min_count < 1:
        raise DataError(f"--min-count {config.min_count}: must be at least 1")
    if config.ids != "dictionary" and (config.min_count, config.order) != (1, "first"):
        raise DataError("--min-count and --order: are of dictionaries; give --ids dictionary")
    if not 0 < config.keep_negatives <= 1:
        raise DataError(f"--keep-negatives {config.keep_negatives}: must be above 0, and at most 1")
    if config.schema.split is not None:
        column = f"column {config.schema.split} of the schema's `split` says which rows test"
        if config.append is not None:
            raise DataError(f"{config.append}: {column}, so --append cannot; prepare all rows at once")
        if config.split is not None:
            raise DataError(f"--split {config.split}: {column}; leave out one of the two")
    if config.seed < 0 or (config.seed and config.keep_negatives == 1):
        raise DataError(
            f"--seed {config.seed}: must be at least 0, and is of --keep-negatives; give both or none"
        )


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of a chunk and use it for the next.

    Else it would return it to the system and ask for it anew, which took a tenth of all time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, size in ((-3, 1 << 25), (-1, 1 << 28)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, size)


def _settings(job: Job, files: list[Path], cut: bool, known: Manifest | None) -> dict[str, Any]:
    """The settings that must be the same in each attempt to make one folder."""
    config = job.config
    thinned = {"keep_negatives": config.keep_negatives, "seed": config.seed, "thinned": [*job.thinned]}
    if not job.thinned:  # as in folders that were begun before there was such a thing
        thinned = dict.fromkeys(thinned)
    split_by = [config.schema.split, *(config.schema.split_at or ())]
    same = ("ids", "max_ind_range", "min_count", "order", "dense", "split")
    return {
        "inputs": [str(file) for file in files],
        "columns": config.schema.fingerprint(),
        **{name: getattr(config, name) for name in same},
        "blocks": config.blocks if cut else None,
        **({"split_by": split_by} if config.schema.split is not None else {}),
        **thinned,
        **({"append": [day.sha256 for day in known.days]} if known else {}),
    }


def _chosen(text: str, least: int, count: int) -> list[int]:
    """The days, of those from `least` on below `count`, that a text like 0-3,7 means."""
    days: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not least <= first <= last < count:
            raise DataError(f"--days {text}: give days from {least} to {count - 1}, like 0-3,7")
        days.update(range(first, last + 1))
    return sorted(days)


def _only_log(inputs: tuple[Path, ...], files: list[Path]) -> Path:
    """The file that the rows of all splits are in, or the folder of Parquet; DataError if there are more."""
    if len(files) == 1:
        return files[0]
    if len(inputs) == 1 and files_of(inputs[0]) == [part for file in files for part in files_of(file)]:
        return inputs[0]
    raise DataError(
        f"{files[1]}: is a second file, but the schema's `split` needs one that holds all rows, or one "
        "folder of Parquet; put them together, or name days with --split"
    )


def _without_empty(files: list[Path], schema: Schema, tells: bool) -> list[Path]:
    """Those of several logs that have rows; the others are named on stderr, if this process `tells`.

    Where that would leave no two, all stay, as a single log is cut into days; parsing refuses the empty one.
    """
    empty = [path for path in files if not has_rows(path, schema)] if len(files) > 1 else []
    if not empty or len(files) - len(empty) < 2:
        return files
    for path in empty if tells else ():
        print(shown(f"{path}: empty, so it is left out and is no day"), file=sys.stderr)
    return [path for path in files if path not in empty]


def _count_lines(job: Job, path: Path) -> None:
    """Note how many rows a single file has, so that it can be cut into days."""
    note = job.work / "lines.json"
    if (read_note(note) or {}).get("source") != (found := identity(path)):
        write_json(note, {"source": found, "rows": count_rows(path, job.config.schema, job.meter.advance)})
    job.meter.add(found["bytes"])


def _sources(job: Job, files: list[Path], first: int, cut: bool) -> list[Source]:
    """Each file is a day, from `first` on, but one that is cut into days of equal length, to within a row.

    Where the schema has a `split`, the days are of one file with all rows.
    """
    if job.config.schema.split is not None:
        (path,), words = files, split_words(job.config.schema)
        origins = tuple(shown(f"{path}, {word}") for word in words)
        return [Source(path, identity(path), 0, (END,) * len(words), origins)]
    if not cut:
        return [
            Source(path, identity(path), day, (END,), (shown(path),)) for day, path in enumerate(files, first)
        ]
    (path,), blocks = files, job.config.blocks
    counted = read_note(job.work / "lines.json")
    assert counted is not None, "_count_lines comes first"
    lines = counted["rows"]
    sizes = [lines // blocks + (block < lines % blocks) for block in range(blocks)]
    origins = tuple(shown(f"{path}, block {block} of {blocks}") for block in range(1, blocks + 1))
    return [Source(path, counted["source"], 0, (*np.cumsum(sizes[:-1]).tolist(), END), origins)]


def _split(
    job: Job, rows: list[int], dropped: list[int], origins: Sequence[str], *, single: bool
) -> tuple[dict[str, tuple[Stretch, ...]], str]:
    """`split` for days of so many rows and those dropped; raises DataError, naming the file, if a day has too
    few.

    The days of a single file are then forgotten, as more rows or fewer --blocks cut all of them anew.
    """
    last, how, column = len(rows) - 1, job.config.split, job.config.schema.split
    for day, (count, origin) in enumerate(zip(rows, origins, strict=True)):
        if count < (2 if day == last and halves_of(how) else 1):
            for other in range(len(rows)) if single else ():
                (job.work / f"day_{other}.done").unlink(missing_ok=True)
            if column is not None:
                raise DataError(f"{origin}: no usable row; give some, or correct `split` in the schema")
            mend = "give more rows" + (", or cut the file into fewer --blocks" if single else "")
            raise DataError(f"{origin}: {count} usable rows, but each day needs 1 and the last 2; {mend}")
    whole, note = split([kept + others for kept, others in zip(rows, dropped, strict=True)], how)
    note = note if column is None else f"rows train, validate and test as column {column} says"
    parts = {  # a day of which rows were dropped trains from its first to its last
        name: tuple((day, start, min(stop, rows[day])) for day, start, stop in stretches)
        for name, stretches in whole.items()
    }
    held_out = (
        f"{name}: {_told(parts[name], rows, origins)}" for name in ("test", "validation") if parts[name]
    )
    return parts, f"{note}; {', '.join(held_out)}"


def _told(stretches: tuple[Stretch, ...], rows: list[int], origins: Sequence[str]) -> str:
    """The rows of some stretches in words, counted from 1 in each day."""
    words = []
    for day, start, stop in stretches:
        whole = stop - start == rows[day]
        words.append(origins[day] if whole else f"rows {start + 1:,} to {stop:,} of {origins[day]}")
    return " and ".join(words if len(words) < 4 else [words[0], f"{len(words) - 2} more days", words[-1]])


def _finish(
    job: Job,
    files: list[Path],
    origins: list[str],
    records: list[dict[str, Any]],
    parts: dict[str, tuple[Stretch, ...]],
    note: str,
    known: Manifest | None,
) -> Manifest:
    """Write what describes the shards, let the folder appear, and return its manifest."""
    config, work = job.config, job.work
    if config.bad_rows == "skip":
        with new_file(work / "data" / REJECTED) as file:
            for day, record in enumerate(records):
                path = work / f"day_{day}_{REJECTED}"  # of days taken over, their folder has it
                if record["rejected"] and record["source"]:
                    with naming(path):
                        lines = path.read_bytes()
                    file.write(lines)
    if config.ids == "dictionary":
        for day, record in enumerate(records):
            record["sha256"] |= read_note(work / f"joined_{day}.done")
    for day, record in enumerate(records):
        record["sha256"] |= read_note(work / f"scaled_{day}.done") or {}
    found = _save_dictionary(job) if config.ids == "dictionary" else _count_distinct(job, len(records))
    manifest = Manifest(
        schema=config.schema,
        dense_transform=config.dense,
        ids=Ids(
            dialect=config.ids,
            cardinalities=found.cardinalities,
            exact=found.exact,
            modulus=config.max_ind_range,
            min_count=config.min_count,
            order=config.order,
        ),
        days=tuple(
            Day(record["rows"], record["sha256"], origin, record["rejected"], record.get("dropped", 0))
            for record, origin in zip(records, origins, strict=True)
        ),
        split=parts,
        split_note=note,
        synthetic=_synthetic(files, None if records[-1]["rejected"] else halves_of(config.split), known),
        dictionary_sha256=found.dictionary_sha256,
        features=found.features,
        clipped=_clipped(config.schema, records),
        measured=measured(job),
        keep_negatives=config.keep_negatives,
    )
    manifest.save(work / "data")
    # Read back before the folder appears, as nothing may fail after that.
    manifest = Manifest.load(work / "data")
    finish(work, config.out)
    return replace(manifest, folder=config.out)


def _clipped(schema: Schema, records: list[dict[str, Any]]) -> dict[str, float]:
    """`Manifest.clipped`, of what is noted of each day."""
    counts = np.sum([record.get("clipped", [0] * len(schema.dense)) for record in records], axis=0)
    rows = sum(record["rows"] for record in records)
    return {name: count / rows for name, count in zip(schema.dense, counts.tolist(), strict=True) if count}


class _Found(NamedTuple):
    """What the manifest says of the ids, as `Ids` and `Manifest` describe it."""

    features: tuple[dict[str, Any], ...]
    cardinalities: tuple[int, ...]
    exact: bool
    dictionary_sha256: str | None = None


def _save_dictionary(job: Job) -> _Found:
    """Write the dictionaries of all features as one array."""
    values = np.concatenate([load_array(job.work / f"feature_{feature}.npy") for feature in job.features()])
    save_array(job.work / "data" / DICTIONARY, values)
    features = tuple(read_note(job.work / f"feature_{feature}.done") or {} for feature in job.features())
    cardinalities = tuple(feature["kept"] + 1 for feature in features)
    return _Found(features, cardinalities, True, hashlib.sha256(values.data).hexdigest())


def _count_distinct(job: Job, days: int) -> _Found:
    """Count the distinct ids of each feature over all days."""
    distinct = Distinct(len(job.features()))
    for day in range(days):
        distinct.merge(load_array(job.work / f"day_{day}_distinct.npy"))
    # Where all bags of a column are empty, it counts as one of one id, as a model has to have a row for it.
    counts = tuple(max(1, count) for count in distinct.counts())
    features = tuple({"distinct": count} for count in counts)
    if job.config.max_ind_range is not None:
        return _Found(features, (job.config.max_ind_range,) * len(features), True)
    return _Found(features, counts, distinct.exact())


def _synthetic(
    files: list[Path], halves: tuple[str, str] | None, known: Manifest | None
) -> dict[str, Any] | None:
    """What the generator says of its files: its settings, and the best scores that any model can reach.

    halves: the splits that the halves of the last file are, of which the best scores are known; None if they
        are not splits, or if rows of that file were left out.
    known: of the days before these files.

    None for files that the generator did not write. Raises DataError if only some are its own, as such data
    could be called neither synthetic nor real.
    """
    path = files[-1].parent / FIGURES
    if known and bool(known.synthetic) != path.is_file():
        raise DataError(f"{files[-1]}: keep synthetic files apart from others, as those of {known.folder}")
    if not path.is_file():
        return None
    try:
        generator = json.loads(read_text(path))
        figures = generator.pop("files")
        own = [file for file in files if file.name in figures]
        same = [file for file in own if size_of(file) in (None, figures[file.name]["bytes"])]
        if not own:
            return None
        if same != files:
            other = next(file for file in files if file not in same)
            raise DataError(f"{other}: is not what {path} describes; keep synthetic files apart from others")
        bayes = None
        if (len(files) > 1 or known) and halves is not None:
            last = figures[files[-1].name]
            known = dict(zip(halves, (last["first_half"], last["second_half"]), strict=True))
            # With one class alone there is nothing to rank.
            one_class = any(half["auc"] is None for half in known.values())
            bayes = None if one_class else msgspec.convert(known, Scores)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not what the generator writes ({error!r}); generate it again") from None
    return {"generator": generator, "bayes": bayes}
