"""Trainings that are kept: what studies of many short trainings share.

A training lies in CACHE/KEY, a hash of its configuration (seed and all) and of the rows: what is there is not
trained again, and a training that was killed goes on at its last checkpoint. Trainings of an older program
cannot be told from new ones: delete the folder after a change.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar, Self

import numpy as np

from analysis.claim import Options, Rows, where
from data_pipeline import batches, synthetic
from data_pipeline.dialects import Order
from data_pipeline.folders import open_folder
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.schema import Dense
from data_pipeline.synthetic import SyntheticConfig
from data_pipeline.whole_files import write_json
from robe.backend import select
from robe.config import METHODS, PRESETS, ConfigError, DataSpec, EmbeddingConfig, TrainConfig, to_json
from robe.files import alone
from robe.model import DLRM, build
from robe.train import AVERAGED, read_log, train

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
    jobs: trainings at a time, each on one core; None: as many as there are cores.
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
    jobs: int | None = None

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
    resumes: whether a training that was killed goes on; one of a model that its configuration does not tell
    begins anew.
    """

    resumes: ClassVar[bool] = True

    def __init__(self, manifest: Manifest, batch: int, cache: Path, say: Callable[[str], None]):
        self.spec, self.manifest = DataSpec.of(manifest), manifest
        self.batch, self.cache, self.say = batch, cache, say
        days = [day.sha256 for day in manifest.days]
        self.fingerprint = [manifest.fingerprint(), days, manifest.split]
        # The training loop logs the AUC of the split that it calls validation. Here the curves are to be
        # those of the test half, so the two halves change names.
        halves = {"train": "train", "validation": "test", "test": "validation"}
        self.rows = {name: batches.Rows(manifest, split) for name, split in halves.items()}
        self.steps_per_pass = self.rows["train"].steps(self.batch)
        self.backend = select()

    @classmethod
    def of(cls, study: Study, cache: Path, say: Callable[[str], None], **how: Any) -> Self:
        """Those of a study, on its rows, which are named; how: as of `rows_of`."""
        if study.seeds < 2:
            raise ConfigError(f"{study.seeds} seeds: an interval needs 2 seeds")
        manifest = rows_of(study, cache, say, **how)
        say(f"data: {manifest.describe()}")
        return cls(manifest, study.batch, cache, say)

    def made(self, config: TrainConfig, **also: Any) -> DLRM:
        """The model to train; also: as of `trained`."""
        return build(config, self.spec, self.backend)

    def trained(
        self, config: TrainConfig, name: str, found: Callable[[DLRM], dict] = lambda model: {}, **also
    ) -> tuple[dict, list[dict]]:
        """The summary of a training and its evaluations; trains where they are not kept yet.

        What they call validation is the test half, and what they call test is the validation half.
        name: for the line that is printed. found: what the summary is to tell of the model besides.
        also: what that, and the model, depend on besides the configuration.
        """
        what = {"config": to_json(config), "rows": self.fingerprint, **also}
        run = self.cache / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        done = run / "summary.json"
        with alone(run):
            if cached := done.exists():
                summary = json.loads(done.read_text())
            else:
                if not self.resumes:
                    shutil.rmtree(run / "checkpoints", ignore_errors=True)
                model = self.made(config, **also)
                summary = train(model, config, self.spec, self.rows, run)
                summary |= found(model)
                write_json(done, summary | what)
            # Checkpoints of the full table are large, and no longer needed.
            for folder in ("checkpoints", AVERAGED):
                shutil.rmtree(run / folder, ignore_errors=True)
        log = [e for e in read_log(run / "metrics.jsonl") if e["kind"] == "validation"]
        took = "cached" if cached else f"{summary['seconds']:.1f} s"
        self.say(f"{name}: AUC {log[-1]['auc']:.4f} ({took})")
        return summary, log

    def run(self, *task) -> Any:
        """What is kept of one training."""
        raise NotImplementedError

    def runs(self, tasks: Iterable[tuple], jobs: int) -> list:
        """`run(*task)` of each, up to `jobs` at a time, each of these in a process of one thread.

        A second thread hardly speeds up models as small as these, so this takes little more than 1 / jobs of
        the time. (Where a product of matrices has other bits with other threads, so has the training.)
        """
        tasks = list(tasks)
        if jobs == 1 or len(tasks) < 2:
            return [self.run(*task) for task in tasks]
        run = partial(_run, type(self), self.manifest.folder, self.batch, self.cache)
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(jobs, len(tasks)), spawn, initializer=_end_with_the_parent)
        found = []
        try:
            with one_thread():
                results = pool.map(run, tasks)  # starts the processes
            for lines, result in results:
                for line in lines:
                    self.say(line)
                found.append(result)
        finally:
            pool.shutdown(cancel_futures=True)
        return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Processes that are started meanwhile compute with one thread."""
    before = os.environ.get("NUMBA_NUM_THREADS")
    os.environ["NUMBA_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["NUMBA_NUM_THREADS"]
        if before is not None:
            os.environ["NUMBA_NUM_THREADS"] = before


def _end_with_the_parent() -> None:
    """In a process of `runs`: a study that is killed leaves no process that trains on."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


@cache
def _opened(kind: type[Trainings], folder: Path, batch: int, kept: Path) -> tuple[Trainings, list[str]]:
    """In a process of `runs`: its trainings, and the lines that they say."""
    lines: list[str] = []
    return kind(open_folder(folder), batch, kept, lines.append), lines


def _run(kind: type[Trainings], folder: Path, batch: int, kept: Path, task: tuple) -> tuple[list[str], Any]:
    trainings, lines = _opened(kind, folder, batch, kept)
    lines.clear()
    return lines, trainings.run(*task)


def rows_of(
    study: Study,
    cache: Path,
    say: Callable[[str], None],
    dialects: Container[str] = METHODS["full"].ids,
    dense: Dense = "log1p",
) -> Manifest:
    """The data of a study, or the synthetic ones where it has none or their ids are of no such dialect."""
    if study.data is not None:
        manifest = open_folder(study.data)
        if manifest.ids.dialect in dialects:
            return manifest
        say(f"{study.data}: a table needs ids that count (prepare --ids dictionary); synthetic rows instead")
    return open_folder(synthetic_data(study, cache, dense=dense))


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
