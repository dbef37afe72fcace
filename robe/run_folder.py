"""A run's folder: made by training or by converting, read by all that uses the model afterwards.

    RUN/config.json       the settings, the folder of the data, and whether a baseline is trained too
    RUN/data/             the manifest of that folder (and its dictionary), which later predictions need
    RUN/checkpoints/      the newest checkpoints (checkpoint.py)
    RUN/averaged/         the folder of a run, too: of the mean of the weights, with --average
    RUN/metrics.jsonl, summary.json, curves.png      what a reader wants to know (train.py, report.py)

This is where models and data meet: it stands above both `robe` and `data_pipeline`, as the commands do.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from data_pipeline.appearing import appearing, check_free
from data_pipeline.bags import Bags, IdsOfRows, columns_of
from data_pipeline.batches import Rows, raw_batches
from data_pipeline.dialects import DICTIONARY, Dictionary
from data_pipeline.folders import CHECKED, open_folder
from data_pipeline.frames import RowReader, number_writer
from data_pipeline.manifest import MANIFEST, Manifest, Stretch
from data_pipeline.npy import NpyFile
from data_pipeline.schema import DataError, Schema
from data_pipeline.stores import Stored, require_disk
from data_pipeline.whole_files import copy_whole, new_file, read_text, sync, write_json
from robe import checkpoint, estimator, export_weights, metrics, report
from robe import convert as conversion
from robe import export as exporting
from robe import import_weights as importing
from robe.backend import among, select
from robe.checkpoint import Position
from robe.config import ConfigError, DataSpec, TrainConfig, from_json, resolve, to_json
from robe.model import DLRM
from robe.progress import Listener, Update, Watched, unheard, unwatched
from robe.ranks import ALONE, Alone
from robe.timeline import Phase, no_phase
from robe.train import (
    AVERAGED,
    EVALUATION_BATCH,
    TrainingError,
    as_lines,
    averaged_config,
    predict,
    probabilities,
    train,
    write_probabilities,
)

PROBABILITY = np.dtype("<f4")  # of a teacher, as it lies on disk


class Settings(NamedTuple):
    """What `config.json` says of a run.

    config: resolved settings of the model and its training.
    data: the folder of the data.
    baseline: whether the same model is trained without categorical features too.
    teacher: the run that teaches it, if one does. start: the one whose weights it began with.
    """

    config: TrainConfig
    data: Path
    baseline: bool
    teacher: Path | None = None
    start: Path | None = None

    def write(self, run: Path) -> None:
        settings = {"config": to_json(self.config), "data": str(self.data), "baseline": self.baseline}
        runs = {"teacher": self.teacher, "start": self.start}
        settings |= {name: str(path) for name, path in runs.items() if path is not None}
        write_json(run / "config.json", settings)


class _Stored(msgspec.Struct):
    """`config.json` as it lies there."""

    config: dict[str, Any]
    data: str
    baseline: bool
    teacher: str | None = None
    start: str | None = None


def create(
    run: Path,
    config: TrainConfig,
    manifest: Manifest,
    baseline: bool,
    teacher: Path | None = None,
    start: Path | None = None,
    first: Callable[[Path], None] | None = None,
) -> None:
    """Make the folder of a run, with all that using it later needs of the data.

    first: writes the checkpoint that it begins with, if there is one, to the folder that it is given.
    Raises ConfigError if it holds a run already, DataError if it cannot be made.
    """
    if (run / "config.json").exists():
        raise ConfigError(f"{run}: exists; choose another --out, or go on with it by --resume {run}")
    with appearing(run, lambda: 0.0) as folder:
        (folder / "data").mkdir()
        manifest.save(folder / "data")
        if manifest.dictionary_sha256 is not None:
            copy_whole(manifest.folder / DICTIONARY, folder / "data" / DICTIONARY)
        teacher, start = teacher and teacher.resolve(), start and start.resolve()
        Settings(config, manifest.folder.resolve(), baseline, teacher, start).write(folder)
        if first is not None:
            first(folder)


def read(run: Path) -> Settings:
    """The settings of a run; raises ConfigError if the folder is none."""
    path = run / "config.json"
    try:
        # Not by msgspec, which refuses the folders whose names are not UTF-8.
        settings = msgspec.convert(json.loads(read_text(path)), _Stored)
        config = resolve(from_json(settings.config))
        if (config.teacher is None) != (settings.teacher is None):
            raise ValueError("it names no teacher, or one that taught nothing")
        teacher, start = (path if path is None else Path(path) for path in (settings.teacher, settings.start))
        return Settings(config, Path(settings.data), settings.baseline, teacher, start)
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError, ConfigError) as error:
        raise ConfigError(f"{path}: not the settings of a run ({error}); give the folder of a run") from None


def learned_data(run: Path) -> Manifest:
    """What the data of a run are: columns, transforms and the meaning of ids (no shards).

    Raises ConfigError for a model of arrays, which `robe.DLRM.save` wrote.
    """
    if not (run / "data").exists():
        raise ConfigError(
            f"{run}: holds no columns of a table, its model learned from arrays; predict from such"
        )
    return Manifest.load(run / "data")


def continued(start: Path, manifest: Manifest) -> Manifest:
    """The data of a training that goes on from a run: those of its rows train that the run did not learn.

    `split` then has `learned` too, the rows that came before. Without a dictionary the numbers of ids are
    those of the run, which sizes follow. Raises ConfigError if values do not mean what they meant there (a
    dictionary may have grown), or if nothing is new.
    """
    before = learned_data(start)
    if None not in (shas := {before.dictionary_sha256, manifest.dictionary_sha256}) and len(shas) == 2:
        olds, news = (Dictionary.values_of(one) for one in (before, manifest))
        if all(np.array_equal(old, new[: old.size]) for old, new in zip(olds, news, strict=True)):
            before = replace(before, dictionary_sha256=manifest.dictionary_sha256)
    if before.fingerprint() != manifest.fingerprint():
        raise ConfigError(
            f"{manifest.folder}: its columns or ids do not mean what they meant in {start}; make it with "
            f"`robe prepare LOG --append FOLDER`, of the folder that {start} learned from"
        )
    days = [day.sha256 for day in manifest.days]
    learned = [
        (days.index(sha256), first, stop)
        for split in ("train", "learned")
        for day, first, stop in before.split.get(split, ())
        if (sha256 := before.days[day].sha256) in days
    ]
    new = [part for stretch in manifest.split["train"] for part in _without(stretch, learned)]
    if not new:
        raise ConfigError(
            f"{manifest.folder}: {start} has learned all rows of it that train; add a day with `robe prepare "
            "LOG --append`"
        )
    split = manifest.split | {"train": tuple(new)} | ({"learned": tuple(learned)} if learned else {})
    manifest = replace(manifest, split=split)
    if manifest.ids.dialect == "dictionary":
        return manifest
    return replace(manifest, ids=before.ids, features=before.features)


def _without(stretch: Stretch, others: Sequence[Stretch]) -> list[Stretch]:
    """What is left of a stretch without what others have of its day."""
    day, parts = stretch[0], [stretch]
    for other, first, stop in others:
        if other == day:
            halves = [half for _, a, b in parts for half in ((day, a, min(b, first)), (day, max(a, stop), b))]
            parts = [half for half in halves if half[1] < half[2]]
    return parts


def opened(run: Path, folder: Path) -> Manifest:
    """The data in a folder, with the rows that train and the numbers of ids as a run has them that went on
    from another; `same_rows` with `learned_data` tells whether they are the run's."""
    manifest = open_folder(folder)
    if read(run).start is None:
        return manifest
    known = learned_data(run)
    return replace(manifest, split=known.split, ids=known.ids, features=known.features)


@dataclass(frozen=True)
class TrainedModel:
    """The model of a run, to be used from Python, and from any number of threads at once.

    run: its folder.
    config, data: resolved settings, and what the model knows of its data.
    model: the robe.model.DLRM inside, on the backend that was asked for.
    """

    run: Path
    config: TrainConfig
    data: DataSpec
    model: DLRM

    def predict(self, dense: ArrayLike, ids: Any) -> np.ndarray:
        """Click probabilities (N,) float64 of rows as a prepared folder holds them.

        dense: (N, n) numbers, transformed as those of the training data; ids: (N, F) integers, likewise, or
            bags (values, offsets, weights).
        Raises ArrayError (a ValueError) that names what does not fit.
        """
        return estimator.predict(self.model, self.data, dense, ids)

    def predict_table(self, table: Any) -> np.ndarray:
        """Click probabilities (N,) float64 of rows as a log has them: bit for bit those of `predict FILE`.

        table: of Polars, pandas or Arrow, or a dict of arrays (N,) by name, with the columns of the training
        data; others are passed over, the label too. Schema, transforms and dictionary are those of the run.
        Raises DataError that names a missing column, or the first row and column with a bad value.
        """
        return estimator.predicted(self.model, *self.read_table(table))

    def read_table(self, table: Any) -> tuple[np.ndarray, IdsOfRows]:
        """The rows of a table, as of `predict_table`, as `predict` takes them."""
        return self._reader.rows(table)

    @property
    def schema(self) -> Schema:
        """The columns of the data it learned."""
        return self._reader.schema

    def vectors(self, feature: str, values: Any) -> np.ndarray:
        """Embedding vectors (n, D) float32 of values (n,) of a categorical column, as a log has them.

        Values that training did not see have vectors too: that of id 0 with a dictionary, else one of their
        own. Where the data have bags, a value is one, and its vectors are pooled. Raises DataError for
        another column or a bad value.
        """
        ids, embedding, backend = self._reader.ids(feature, values), self.model.embedding, self.model.backend
        if embedding.features == 0:
            raise ConfigError(f"{self.run}: --method none has no embedding; load a run of another method")
        column = self._reader.schema.categorical.index(feature)
        if self.data.pooling:
            return self._pooled(ids, column)
        embedding.check(ids)
        out = np.empty((len(ids), embedding.width), np.float32)
        found = backend.empty((EVALUATION_BATCH, embedding.features, embedding.width), "float32")
        with self.model.lock:
            for start in range(0, len(ids), EVALUATION_BATCH):
                part = ids[start : start + EVALUATION_BATCH]
                embedding.lookup(backend.to_device(part), found[: len(part)])
                out[start : start + len(part)] = backend.to_host(found[: len(part), column])
        return out

    def _pooled(self, bags: Bags, column: int) -> np.ndarray:
        """The vectors (n, D) of the bags of one column of n rows."""
        features, backend = len(self.schema.categorical), self.model.backend
        rows = (len(bags.offsets) - 1) // features
        out = np.empty((rows, self.model.embedding.width), np.float32)
        with self.model.lock:
            for start in range(0, rows, EVALUATION_BATCH):
                stop = min(start + EVALUATION_BATCH, rows)
                part = self.model.checked(bags.part(start, stop, features), stop - start)
                vectors = self.model.interaction.look_up(tuple(map(backend.to_device, part)))
                out[start:stop] = backend.to_host(vectors[:, 1 + column])
        return out

    @cached_property
    def _reader(self) -> RowReader:
        return RowReader(learned_data(self.run))


def load(run: Path | str, backend: str = "auto", graph: bool = True) -> TrainedModel:
    """The model of a run's newest checkpoint, for predictions and vectors; `robe.load`.

    backend: `auto` (a GPU if there is one, else cpu), `reference`, `cpu` or `cuda`.
    graph: on a GPU, start a whole inference as one CUDA graph; the results are the same.
    Raises CheckpointError if there is no sound checkpoint.
    """
    model, config, data, _ = checkpoint.load_model(Path(run), backend, graph)
    require_same(Path(run), config, data)
    return TrainedModel(Path(run), config, data, model)


def require_same(run: Path, config: TrainConfig, data: DataSpec) -> None:
    """Raise ConfigError unless what a checkpoint says is what the other files of its run say, if it has them.

    Whoever reads a checkpoint with other settings than it was trained with gets numbers, but not its own.
    """
    if (run / "config.json").exists() and read(run).config != config:
        raise ConfigError(
            f"{run / 'config.json'}: tells of other settings than the newest checkpoint; one of them was "
            "altered: put back the file as it was, or train again"
        )
    if (run / "data").exists() and DataSpec.of(learned_data(run)) != data:
        raise ConfigError(
            f"{run / 'data' / MANIFEST}: tells of other data than the newest checkpoint; one of them was "
            "altered: put back the file as it was, or train again"
        )


def fit(
    model: DLRM,
    config: TrainConfig,
    manifest: Manifest,
    rows: dict[str, Rows],
    run: Path,
    update: Update = unwatched,
    phase: Phase = no_phase,
    max_steps: int | None = None,
    listener: Listener = unheard,
) -> dict:
    """Train a model, or go on where `run` stands; returns the summary with what is known of the data.

    rows: the splits `train`, `validation` and `test`; others: as in robe.train.train.
    Raises DataError, not TrainingError, where a number of the training rows is not finite.
    """
    try:
        spec, weighted = DataSpec.of(manifest), manifest.schema.weight is not None
        summary = train(model, config, spec, rows, run, update, phase, max_steps, weighted, listener)
    except TrainingError:
        rows["train"].require_possible("dense")
        raise
    if AVERAGED in summary:
        _complete(run, config)
    bayes = manifest.synthetic and manifest.synthetic["bayes"]
    warnings = one_class(rows) + summary["warnings"]
    return summary | {"data": manifest.describe(), "bayes": bayes, "warnings": warnings}


def _complete(run: Path, config: TrainConfig) -> None:
    """Give RUN/averaged, which holds a checkpoint, all else that the folder of a run has."""
    folder, settings = run / AVERAGED, read(run)
    (folder / "data").mkdir(exist_ok=True)
    for path in (run / "data").iterdir():
        copy_whole(path, folder / "data" / path.name)
    settings._replace(config=averaged_config(config), baseline=False).write(folder)


def taught(
    teacher: Path, manifest: Manifest, backend: str, update: Update = unwatched, digest: str | None = None
) -> tuple[str, Rows]:
    """A digest of the teacher, a run, and the rows that train with its probabilities.

    Beside the shards of a day lies `day_N_teacher_NAME.npy`, (rows, 1) float32, named after the teacher and
    the rows; it is made where it is missing. digest: which teacher it has to be; default: the one there is.
    Raises ConfigError if the teacher is another or learned other data, DataError for a file that holds no
    probabilities.
    """
    if digest is None:
        checkpoint.newest_state(teacher)[1].require(
            manifest.fingerprint(), f"--teacher {teacher}: {manifest.folder}"
        )
        digest = checkpoint.digest(teacher)
    files = {}
    for day in dict.fromkeys(day for day, _, _ in manifest.split["train"]):
        what = [digest, manifest.fingerprint(), manifest.days[day].rows, manifest.days[day].sha256]
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        files[day] = manifest.folder / f"day_{day}_teacher_{name}.npy"
    if missing := [day for day, path in files.items() if not path.exists()]:
        model = load(teacher, backend).model
        if checkpoint.digest(teacher) != digest:
            raise ConfigError(
                f"--teacher {teacher}: is another model than it was; wait until its training is done, or "
                "train anew with it"
            )
        total, done = sum(manifest.days[day].rows for day in missing), 0
        for day in missing:
            for rows in teach(model, manifest, day, files[day]):
                done += rows
                update(done, total)
    probabilities = {day: probabilities_of(path, manifest.days[day].rows) for day, path in files.items()}
    return digest, Rows(manifest, "train", taught=probabilities)


def teach(model: DLRM, manifest: Manifest, day: int, path: Path) -> Iterator[int]:
    """Write the probabilities of a day's rows to a file that appears whole; yields how many are added."""
    count = manifest.days[day].rows
    split: dict[str, tuple[Stretch, ...]] = {"day": ((day, 0, count),)}
    rows = Rows(replace(manifest, split=split), "day")
    header = {"descr": PROBABILITY.str, "fortran_order": False, "shape": (count, 1)}
    with new_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in probabilities(model, rows.batches(EVALUATION_BATCH)):
            if manifest.keep_negatives < 1:  # what they are among the rows that were kept
                part /= part + (1 - part) * manifest.keep_negatives
            file.write(part.astype(PROBABILITY).data)
            yield len(part)
    sync(path.parent)


def probabilities_of(path: Path, rows: int) -> NpyFile:
    """The file that `teach` wrote for so many rows; raises DataError if it holds anything else."""
    remedy = "delete it, and the training makes it again"
    found = NpyFile(path, missing=f"missing; {remedy}", remedy=remedy)
    if (found.shape, found.dtype) != ((rows, 1), PROBABILITY):
        raise DataError(f"{path}: holds {found.dtype} {found.shape}, not {PROBABILITY} {(rows, 1)}; {remedy}")
    for start in range(0, rows, CHECKED):
        part = found.part(start, start + CHECKED)
        if not (good := (part >= 0) & (part <= 1)).all():
            row = np.argmin(good)
            raise DataError(f"{path}, row {start + row} (from 0): {part[row, 0]} is no probability; {remedy}")
    return found


def before_training(rows: Mapping[str, Rows]) -> list[str]:
    """Look at what would show hours later: all labels and weights of rows, and whatever evaluations read;
    returns `one_class`.

    Raises DataError that names the first value that cannot be. The numbers of the training rows take long to
    read and show in the loss, so `fit` looks at them when they do.
    """
    for part in rows.values():
        part.require_any()
    for split in ("validation", "test"):
        rows[split].require_possible("dense", "sparse")
    for part in rows.values():
        part.require_weight()
    return one_class(rows)


def one_class(rows: Mapping[str, Rows]) -> list[str]:
    """A line for each split whose labels are all the same; DataError for one that is neither 0 nor 1."""
    consequence = {"train": "there is nothing to learn"}
    return [
        f"{split} rows: every label of the {part.count:,} is {part.base_rate:g}, so "
        f"{consequence.get(split, 'AUC is undefined')}; check the label column, or choose another --split "
        "when preparing"
        for split, part in rows.items()
        if part.base_rate in (0, 1)
    ]


def evaluate(
    run: Path,
    data: Path | None,
    split: str,
    backend: str,
    graph: bool = True,
    group_by: str | None = None,
    *,
    update: Update = unwatched,
    ranks: Alone = ALONE,
) -> tuple[Manifest, dict, dict]:
    """(the data, speed, metrics) of a run on a split of a folder, or of the folder it was trained on.

    split: a name, or `all` for all rows of the folder.
    group_by: a categorical column; metrics then have the AUC by its ids, too.
    ranks: the processes that compute this together; the metrics are those of one.
    Raises ConfigError for another column, or one of bags, and if the data do not mean what they meant in
    training, or are no longer the same rows.
    """
    trained = load(run, backend, graph)
    manifest = open_folder(data) if data else opened(run, read(run).data)
    trained.data.require(manifest.fingerprint(), str(manifest.folder))
    if data is None and not manifest.same_rows(learned_data(run)):
        raise ConfigError(
            f"{manifest.folder}: no longer the rows of {run}; if they are meant, name it with "
            f"`robe evaluate {run} --data {manifest.folder}`"
        )
    rows = Rows(manifest, None if split == "all" else split, checking=update)
    columns, groups = manifest.schema.categorical, []
    if group_by is not None and group_by not in columns:
        raise ConfigError(f"--group-by {group_by}: no categorical column of these data: {', '.join(columns)}")
    if group_by in manifest.schema.bags:
        raise ConfigError(f"--group-by {group_by}: its rows have any number of values; name a column of one")
    rows.require_any()
    rows.require_possible("labels", "dense")
    rows.require_weight()

    def noted(*arguments, **options) -> Generator:
        with closing(rows.batches(*arguments, **options)) as batches:
            for batch in batches:
                if group_by is not None:
                    groups.append(list(columns_of(batch.ids, len(columns)))[columns.index(group_by)].copy())
                yield batch

    watched = Watched(noted, rows.count, update)
    trained.model.backend = among(trained.model.backend, ranks)
    label, logits, *weight = predict(trained.model, watched)
    found: dict[str, Any] = metrics.summary(label, logits, *weight)
    found["reliability"] = metrics.reliability(label, logits, *weight)
    if group_by is not None:
        by_group = metrics.grouped_auc(label, logits, np.concatenate(groups), *weight)
        found["grouped"] = {"column": group_by, **by_group}
    return manifest, watched.pace(), found


def predict_files(
    run: Path,
    files: Sequence[Path],
    out: Path,
    backend: str,
    update: Update = unwatched,
    notice: Callable[[str], None] = lambda line: None,
    graph: bool = True,
    *,
    schema: Schema | None = None,
    skip: bool = False,
    ranks: Alone = ALONE,
) -> int:
    """Write a click probability per row of raw logs or tables, or of one prepared folder; returns how many.

    `out` appears whole: a Parquet or Arrow file with the column `probability` if it is called so, else text,
    one number a line. notice: is told, in a line, that the model gives every row the same, and of bad rows.
    schema: as of `raw_batches`. skip: a bad row gets no probability (NaN, or a missing value); else it is a
    DataError. ranks: the processes that compute this together; rank 0 writes.
    """
    require_disk(out, "probabilities are written")
    trained = load(run, backend, graph)
    trained.model.backend = among(trained.model.backend, ranks)
    for file in files:
        if not isinstance(file, Stored) and out.exists() and file.exists() and out.samefile(file):
            raise ConfigError(f"{out}: is the input; choose another --out")
        if file.is_dir() and len(files) > 1:
            raise ConfigError(f"{file}: is a folder; name logs or tables, or one prepared folder alone")
    absent: list[int] = []

    def bad(row: int, what: str) -> None:
        if not absent:
            notice(f"{what}; such rows get no probability")
        absent.append(row)

    if files[0].is_dir():
        if schema is not None or skip:
            raise ConfigError(f"{files[0]}: is prepared; --schema and --bad-rows are for logs and tables")
        manifest = open_folder(files[0])
        trained.data.require(manifest.fingerprint(), str(files[0]))
        rows = Rows(manifest, None, checking=update)
        rows.require_possible("dense")
        batches, total = rows.batches, rows.count
    else:
        on_bad = bad if skip else None
        batches = partial(raw_batches, files, learned_data(run), schema=schema, on_bad=on_bad)
        total = None
    watched = Watched(batches, total, update).batches(EVALUATION_BATCH)
    write = number_writer(out, "probability") or as_lines
    count = write_probabilities(trained.model, watched, out, notice, absent, write)
    if absent:
        notice(f"{len(absent):,} of {count:,} rows were bad, and got no probability")
    return count


def convert(
    run: Path,
    to: conversion.Target,
    out: Path,
    compression: float | None,
    block: int | None,
    update: Update = unwatched,
    judged: Callable[[Path], dict] = lambda folder: {},
) -> dict:
    """Make the run `out` of a trained one, its embedding in other memory; returns and writes its summary.

    judged: what to add to the summary, which it finds out from the new run before this appears.
    Other arguments, and errors, are those of robe.convert.converted_config.
    """
    config, spec, _ = checkpoint.newest_state(run)
    settings, described = read(run), learned_data(run).describe()
    require_same(run, config, spec)
    new = conversion.converted_config(config, spec, to, compression, block)
    with appearing(out, lambda: 0.0) as folder:
        (folder / "data").mkdir()
        for path in (run / "data").iterdir():
            copy_whole(path, folder / "data" / path.name)
        summary = {"converted_from": str(run.resolve()), "data": described}
        summary |= conversion.convert(run, new, folder, update)
        settings._replace(config=new, baseline=False).write(folder)
        summary |= judged(folder)
        report.write_summary(folder, summary)
    return summary


def export(run: Path, to: Literal["onnx", "torch", "fbgemm"], out: Path) -> dict[str, Any]:
    """Write a run's model as a file for other programs; one of ONNX gets its name once ONNX Runtime computes
    from it what the model does in float32.

    Returns its bytes, and how many tensors it has; of ONNX nodes, and the largest difference of probability.
    Raises ConfigError for a model that cannot be exported, ExportError where the probabilities differ.
    """
    trained, names = load(run, "cpu"), {}
    config, data = trained.config, trained.data
    # Others multiply float32, whatever the precision of the training.
    model = DLRM(config, data, trained.model.embedding, select("cpu"))
    model.dense_parameters[...] = trained.model.dense_parameters
    if (run / "data").exists():
        schema = trained.schema
        names = {"dense": schema.dense, "categorical": schema.categorical}
    found: dict[str, Any]
    with new_file(out) as file:
        if to == "torch":
            found = {"tensors": export_weights.to_torch(model, config, data, file)}
        elif to == "fbgemm":
            facts = exporting.facts(config, data, names)
            found = {"tensors": export_weights.to_fbgemm(model, config, data, facts, file)}
        else:
            content, nodes = exporting.to_onnx(model, config, data, names)
            file.write(content)
            file.flush()
            found = {"nodes": nodes}
            found["largest_difference"] = exporting.difference(Path(file.name), model, data)
        found["bytes"] = file.tell()
    sync(out.parent)
    return found


def import_weights(file: Path, data: Path, out: Path, block: int | None, hash_seed: int | None) -> dict:
    """Make the run `out` of a published state dict, for the data of a prepared folder; returns its summary.

    Raises ConfigError for a file that is none, or does not fit the data (robe.import_weights).
    """
    manifest = open_folder(data)
    check_free(out)
    tensors = importing.read_tensors(file)
    config, model = importing.imported(tensors, DataSpec.of(manifest), block, hash_seed)
    described = model.embedding.describe() | {"dense_parameters": int(model.dense_parameters.size)}
    summary = {"imported_from": str(file.resolve()), "data": manifest.describe(), "steps": 0, **described}

    def first(folder: Path) -> None:
        checkpoint.save(folder, model, config, DataSpec.of(manifest), Position(), "import again")
        report.write_summary(folder, summary)

    create(out, config, manifest, baseline=False, first=first)
    return summary
