"""A run's folder: made by training or by converting, read by all that uses the model afterwards.

    RUN/config.json       the settings, the folder of the data, and whether a baseline is trained too
    RUN/data/             the manifest of that folder (and its dictionary), which later predictions need
    RUN/checkpoints/      the newest checkpoints (checkpoint.py)
    RUN/metrics.jsonl, summary.json, curves.png      what a reader wants to know (train.py, report.py)

This is where models and data meet: it stands above both `robe` and `data_pipeline`, as the commands do.
"""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_pipeline.appearing import appearing
from data_pipeline.batches import Rows, raw_batches
from data_pipeline.dialects import DICTIONARY
from data_pipeline.manifest import Manifest
from robe import checkpoint, metrics, report
from robe import convert as conversion
from robe.backend import select
from robe.config import ConfigError, DataSpec, TrainConfig, from_json, resolve
from robe.model import DLRM, build
from robe.progress import Update, Watched, unwatched
from robe.timeline import Phase, no_phase
from robe.train import EVALUATION_BATCH, predict, train, write_probabilities


class Settings(NamedTuple):
    """What `config.json` says of a run.

    config: resolved settings of the model and its training.
    data: the folder of the data.
    baseline: whether the same model is trained without categorical features too.
    """

    config: TrainConfig
    data: Path
    baseline: bool

    def write(self, run: Path) -> None:
        settings = {"config": asdict(self.config), "data": str(self.data), "baseline": self.baseline}
        (run / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def create(run: Path, config: TrainConfig, manifest: Manifest, baseline: bool) -> None:
    """Make the folder of a run, with all that using it later needs of the data.

    Raises ConfigError if it holds a run already, DataError if it cannot be made.
    """
    if (run / "config.json").exists():
        raise ConfigError(f"{run}: exists; choose another --out, or go on with it by --resume {run}")
    with appearing(run, lambda: 0.0) as folder:
        (folder / "data").mkdir()
        manifest.save(folder / "data")
        if manifest.dictionary_sha256 is not None:
            shutil.copy(manifest.folder / DICTIONARY, folder / "data" / DICTIONARY)
        Settings(config, manifest.folder.resolve(), baseline).write(folder)


def read(run: Path) -> Settings:
    """The settings of a run; raises ConfigError if the folder is none."""
    path = run / "config.json"
    try:
        settings = json.loads(path.read_text())
        config = resolve(from_json(settings["config"]))
        return Settings(config, Path(settings["data"]), bool(settings["baseline"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: not the settings of a run ({error}); give the folder of a run") from None


def learned_data(run: Path) -> Manifest:
    """What the data of a run are: columns, transforms and the meaning of ids (no shards)."""
    return Manifest.load(run / "data")


def load_model(run: Path, backend: str) -> tuple[DLRM, DataSpec]:
    """The model of the newest checkpoint of a run, and what its data must look like.

    backend: a name of robe.backend. Raises CheckpointError if there is no sound checkpoint.
    """
    newest = checkpoint.latest(run)
    config, spec, _ = checkpoint.read_state(newest)
    model = build(config, spec, select(backend, config.precision))
    checkpoint.load_weights(newest, model)
    return model, spec


def fit(
    model: DLRM,
    config: TrainConfig,
    manifest: Manifest,
    rows: dict[str, Rows],
    run: Path,
    update: Update = unwatched,
    phase: Phase = no_phase,
) -> dict:
    """Train a model, or go on where `run` stands; returns the summary with what is known of the data.

    rows: the splits `train`, `validation` and `test`; update, phase: as in robe.train.train.
    """
    summary = train(model, config, DataSpec.of(manifest), rows, run, update, phase)
    bayes = manifest.synthetic and manifest.synthetic["bayes"]
    return summary | {"data": manifest.describe(), "bayes": bayes}


def evaluate(
    run: Path, data: Path | None, split: str, backend: str, update: Update = unwatched
) -> tuple[Manifest, dict, dict]:
    """(the data, speed, metrics) of a run on a split of a folder, or of the folder it was trained on.

    Raises ConfigError if the data do not mean what they meant in training, or are no longer the same rows.
    """
    model, spec = load_model(run, backend)
    manifest = Manifest.load(data or read(run).data)
    spec.require(manifest.fingerprint(), str(manifest.folder))
    if data is None and not manifest.same_rows(learned_data(run)):
        raise ConfigError(
            f"{manifest.folder}: no longer the rows of {run}; if they are meant, name it with --data"
        )
    rows = Rows(manifest, split)
    watched = Watched(rows.batches, rows.count, update)
    label, logits = predict(model, watched)
    return manifest, watched.pace(), metrics.summary(label, logits)


def predict_file(run: Path, file: Path, out: Path, backend: str, update: Update = unwatched) -> int:
    """Write a click probability per row of a raw log, a table or a prepared folder; returns how many.

    `out` is text, one number a line, and appears whole. Raises DataError for a bad row.
    """
    model, spec = load_model(run, backend)
    if out.exists() and file.exists() and out.samefile(file):
        raise ConfigError(f"{out}: is the input; choose another --out")
    if file.is_dir():
        manifest = Manifest.load(file)
        spec.require(manifest.fingerprint(), str(file))
        rows = Rows(manifest, None)
        batches, total = rows.batches, rows.count
    else:
        batches, total = partial(raw_batches, file, learned_data(run)), None
    return write_probabilities(model, Watched(batches, total, update).batches(EVALUATION_BATCH), out)


def convert(
    run: Path, to: str, out: Path, compression: float | None, block: int | None, update: Update = unwatched
) -> dict:
    """Make the run `out` of a trained one, its embedding in other memory; returns and writes its summary.

    Arguments and errors are those of robe.convert.converted_config.
    """
    newest, settings = checkpoint.latest(run), read(run)
    config, spec, position = checkpoint.read_state(newest)
    new = conversion.converted_config(config, spec, to, compression, block)
    with appearing(out, lambda: 0.0) as folder:
        shutil.copytree(run / "data", folder / "data")
        described = {"converted_from": str(run.resolve()), "data": learned_data(run).describe()}
        summary = described | conversion.convert(newest, config, new, spec, position, folder, update)
        Settings(new, settings.data, False).write(folder)
        report.write_summary(folder, summary)
    return summary
