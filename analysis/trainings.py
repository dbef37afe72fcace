"""Trainings that are kept: what studies of many short trainings share.

A training lies in CACHE/KEY, a hash of its configuration (seed and all) and of the rows: what is there is not
trained again, and a training that was killed goes on at its last checkpoint. Trainings of an older program
cannot be told from new ones: delete the folder after a change.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from analysis.claim import Options, Rows, where
from data_pipeline import batches, synthetic
from data_pipeline.dialects import Order
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.schema import Dense
from data_pipeline.synthetic import SyntheticConfig
from data_pipeline.whole_files import write_json
from robe.backend import select
from robe.config import METHODS, PRESETS, DataSpec, EmbeddingConfig, TrainConfig, to_json
from robe.files import alone
from robe.model import DLRM, build
from robe.train import read_log, train

# Of Adagrad. 0.03 is best for every point of the full study of analysis/tradeoff.py, so the rate need not
# grow as sqrt(compression) does.
RATES = (0.01, 0.03, 0.1)
WIDTH = PRESETS["small"].width
TUNING_SEED = 0  # the seeds after it are those reported


def seeded(embedding: EmbeddingConfig, seed: int) -> EmbeddingConfig:
    """The same with the hash of a seed, where the method has a hash."""
    hashed = "hash_seed" in METHODS[embedding.method].options
    return dataclasses.replace(embedding, hash_seed=seed) if hashed else embedding


@dataclass(frozen=True)
class Study:
    """How much to train, and on what.

    rows, scale, zipf, decay: of the synthetic data, of which a tenth, the last day, is not trained on.
    data: a prepared folder, instead of synthetic data.
    seeds: trainings of each point whose scores are reported. passes: over the training rows.
    batch: rows per step. rates: learning rates that tuning chooses from.
    """

    rows: int = 1_000_000
    scale: float = 0.05
    zipf: float = 1.05
    decay: float = 0.1
    data: Path | None = None
    seeds: int = 4
    passes: int = 3
    batch: int = 512
    rates: tuple[float, ...] = RATES

    def given(self, **options) -> Self:
        """This study with what was asked for; options that are None leave it as it is."""
        return dataclasses.replace(self, **{name: x for name, x in options.items() if x is not None})


@dataclass(frozen=True)
class StudyOptions(Options):
    """What a study on the command line can be asked for; what is not given is as the study says."""

    data: Path | None = None
    """A folder made by `prepare`, instead of synthetic rows."""

    seeds: int | None = None
    """Trainings of each kind, besides those that tune."""

    passes: int | None = None
    """Over the training rows."""

    batch: int | None = None
    """Rows per step."""


class Trainings:
    """The trainings on one prepared folder, each made once.

    rows: split -> its rows, where what the training loop calls validation is the test half, and vice versa.
    """

    def __init__(self, manifest: Manifest, batch: int, cache: Path, say: Callable[[str], None]):
        self.spec, self.batch, self.cache, self.say = DataSpec.of(manifest), batch, cache, say
        days = [day.sha256 for day in manifest.days]
        self.fingerprint = [manifest.fingerprint(), days, manifest.split]
        # The training loop logs the AUC of the split that it calls validation. Here the curves are to be
        # those of the test half, so the two halves change names.
        halves = {"train": "train", "validation": "test", "test": "validation"}
        self.rows = {name: batches.Rows(manifest, split) for name, split in halves.items()}
        self.steps_per_pass = self.rows["train"].steps(self.batch)
        self.backend = select()

    def trained(
        self,
        config: TrainConfig,
        name: str,
        found: Callable[[DLRM], dict] = lambda model: {},
        change: Callable[[DLRM], None] = lambda model: None,
        **also,
    ) -> tuple[dict, list[dict]]:
        """The summary of a training and its evaluations; trains where they are not kept yet.

        What they call validation is the test half, and what they call test is the validation half.
        name: for the line that is printed. found: what the summary is to tell of the model besides; change:
        what is done to the model before it is trained. Both depend on `also`.
        """
        what = {"config": to_json(config), "rows": self.fingerprint, **also}
        run = self.cache / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        done = run / "summary.json"
        with alone(run):
            if cached := done.exists():
                summary = json.loads(done.read_text())
            else:
                model = build(config, self.spec, self.backend)
                change(model)
                summary = train(model, config, self.spec, self.rows, run)
                summary |= found(model)
                write_json(done, summary | what)
            # A checkpoint of the full table is large, and no longer needed.
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        log = [e for e in read_log(run / "metrics.jsonl") if e["kind"] == "validation"]
        took = "cached" if cached else f"{summary['seconds']:.1f} s"
        self.say(f"{name}: AUC {log[-1]['auc']:.4f} ({took})")
        return summary, log


def synthetic_data(study: Study, cache: Path, order: Order = "first", dense: Dense = "log1p") -> Path:
    """The prepared synthetic rows of a study, made where there are none yet; order: of the ids."""
    folder = cache / f"data-{study.rows}-{study.scale}-{study.zipf}-{study.decay}-{order}-{dense}"
    raw, prepared = folder / "raw", folder / "prepared"
    if not prepared.exists():
        shutil.rmtree(raw, ignore_errors=True)
        law = {"scale": study.scale, "zipf": study.zipf, "decay": study.decay}
        synthetic.write(SyntheticConfig(raw, study.rows, days=10, **law))
        prepare(PrepareConfig((raw,), prepared, ids="dictionary", order=order, dense=dense))
    shutil.rmtree(raw, ignore_errors=True)
    return prepared


def curve(rows: Rows, point: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps (E,), passes (E,) and test AUC (seeds, E) of the evaluations of a point."""
    found = {}
    for row in where(rows, kind="test_auc", point=point):
        found.setdefault((row["step"], row["passes"]), []).append(row["value"])
    steps, passes = zip(*found, strict=True)
    return np.array(steps), np.array(passes), np.array(list(found.values())).T
