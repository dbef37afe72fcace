"""Rows that processes exchange only when they have to: 88% fewer bytes of embeddings?

Claim (HET, Miao et al., 2022, arXiv 2112.07221): where workers keep rows in a cache, and read them although
they lack up to S steps of other workers, up to 88% fewer bytes of embeddings travel, and the model is as
good.

1. Bytes. With some S, a process receives at least 88% fewer bytes of embeddings than with S = 0, which
   exchanges the gradients of all rows at each step.
2. Quality. With the least S that saves so much on K processes, the AUC is within 0.001 of that with 0.
3. A bound is needed: exchanged at the end alone, rows lose more than 0.001. Were this not found, nothing
   would be told of 2 either.
4. Theory: no S saves more than `bound`, as the ranks tell one another which rows they read.

Conditions: `mpiexec -n K robe train --method full --staleness S`, whose rule is that of robe/stale.py, with S
of 1, 10 and 100, as in HET, and 30, on processes of this machine; preset `small`, but stepped by SGD, whose
moves add up, so that nothing but staleness is judged; one pass over SYNTHETIC rows whose ids follow Zipf
laws, or over those given by --data. HET has a server, to which workers send and from which they fetch; here
each process has the whole table, so bytes are compared with those of gradients that are sent to all. They are
those that a process receives for embeddings, a step on average, ids and the exchange at the end included. On
the fewest processes rows of 128 weights are trained besides, of one seed, for their bytes alone. The AUC is
the mean of those of both halves of the last day. Intervals are Student's, 95%, of differences between
trainings of equal seeds.

    python analysis/staleness.py [--quick] [--data PREPARED] [--seeds N] [--passes N] [--batch N]

It needs the extra `mpi` and an mpiexec. Trainings are kept in analysis/out/staleness.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis import claim
from analysis.claim import Check, Rows, Verdict, conclude, mean_interval, where
from analysis.trainings import WIDTH, Study, StudyOptions, rows_of
from data_pipeline import batches
from data_pipeline.folders import open_folder
from data_pipeline.manifest import SPLITS
from data_pipeline.ranks import Ranks
from data_pipeline.whole_files import write_json
from robe.backend import among, select
from robe.config import (
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    from_json,
    resolve,
    to_json,
)
from robe.model import build
from robe.packages import extra
from robe.ranks import TRIPS, Mpi
from robe.train import train, versions

CACHE = claim.OUT / "staleness"
SAVED, WITHIN = 0.88, 0.001
NEVER = 2**31 - 1  # steps of others that are not missed before the end
RATES = {"lr": 0.3, "embedding_lr": 10.0}
TASK, DONE = "task.json", "summary.json"
ONE_THREAD = dict.fromkeys(("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Bounds(Study):
    """What to train; the defaults are the full study. staleness, processes: S and K of the claim; others: D
    besides that of the preset."""

    rows: int = 200_000
    scale: float = 0.005
    zipf: float = 1.2
    decay: float = 0.5
    seeds: int = 8
    passes: int = 1
    batch: int = 256
    staleness: tuple[int, ...] = (0, 1, 10, 30, 100)
    processes: tuple[int, ...] = (2, 4)
    others: tuple[int, ...] = (128,)


QUICK = Bounds(rows=24_000, scale=0.0005, seeds=2, batch=64, staleness=(0, 100), processes=(2,), others=())


class Point(NamedTuple):
    processes: int
    width: int
    staleness: int
    seed: int


def bound(width: int) -> float:
    """The largest share of bytes that can be saved: where a rank tells that it reads a row, its number is 4
    bytes, and its gradient would have been (4 D + 8)."""
    return 1 - 4 / (4 * width + 8)


def points(study: Bounds) -> Iterator[Point]:
    """In the order in which they are trained."""
    fewest, most, seeds = study.processes[0], study.processes[-1], range(1, study.seeds + 1)
    for processes in study.processes:
        bounds = (*study.staleness, NEVER) if processes == most else study.staleness
        for seed, staleness in product(seeds, bounds):
            yield Point(processes, WIDTH, staleness, seed)
        if processes == fewest:
            for width, staleness in product(study.others, study.staleness):
                yield Point(processes, width, staleness, 1)


def settings(point: Point, study: Bounds, steps: int) -> TrainConfig:
    """Of a training of so many steps, with one evaluation, at its end."""
    return resolve(
        TrainConfig(
            model=ModelConfig(width=point.width),
            embedding=EmbeddingConfig("full"),
            optimizer=OptimizerConfig("sgd", **RATES),
            batch=study.batch,
            epochs=study.passes,
            seed=point.seed,
            staleness=point.staleness,
            eval_every=steps,
        )
    )


def train_here(folder: str, *runs: str) -> None:
    """In each process that mpiexec started: the trainings that wait in `runs`, on the rows of a folder."""
    manifest = open_folder(Path(folder))
    spec, rows = DataSpec.of(manifest), {split: batches.Rows(manifest, split) for split in SPLITS}
    ranks = Mpi(Ranks().comm)
    ranks.at_work = True  # so that an error of one ends all
    try:
        for run in map(Path, runs):
            config = resolve(from_json(json.loads((run / TASK).read_text())["config"]))
            summary = train(build(config, spec, among(select("cpu"), ranks)), config, spec, rows, run)
            if ranks.rank == 0:
                shutil.rmtree(run / "checkpoints")
                write_json(run / DONE, summary)
    except BaseException as error:
        ranks.end(error)
        raise


def mpiexec() -> str | None:
    """The command that starts processes: that of the MPI which pip installed here, or another."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def lacking() -> str | None:
    """What keeps processes from being started here, and the remedy; None if nothing does."""
    if importlib.util.find_spec("mpi4py") is not None and mpiexec() is not None:
        return None
    return f"several processes need mpi4py and an mpiexec: {extra('mpi')}, and pip install mpich"


def train_together(processes: int, folder: Path, runs: list[Path]) -> None:
    """`train_here` in so many processes; raises ConfigError where none can be started."""
    if (trouble := lacking()) is not None:
        raise ConfigError(trouble)
    code = "import sys; from analysis.staleness import train_here; train_here(*sys.argv[1:])"
    words = [mpiexec(), "-n", processes, sys.executable, "-c", code, folder.resolve()]
    words += [run.resolve() for run in runs]
    done = subprocess.run([*map(str, words)], cwd=claim.FOLDER.parent, env=os.environ | ONE_THREAD)
    if done.returncode:
        raise ConfigError(f"mpiexec: a training ended with code {done.returncode}, as it says above")


def measure(
    quick: bool = False,
    data: Path | None = None,
    seeds: int | None = None,
    passes: int | None = None,
    batch: int | None = None,
    study: Bounds | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> Rows:
    """A row for each training. data, seeds, passes and batch replace the study's."""
    study = (study or (QUICK if quick else Bounds())).given(
        data=data, seeds=seeds, passes=passes, batch=batch
    )
    manifest = rows_of(study, cache, say)
    say(f"data: {manifest.describe()}")
    steps = batches.Rows(manifest, "train").steps(study.batch) * study.passes
    fingerprint = [manifest.fingerprint(), [day.sha256 for day in manifest.days], manifest.split]
    runs = {}
    for point in points(study):
        task = {"config": to_json(settings(point, study, steps)), "rows": fingerprint}
        task["processes"] = point.processes
        run = cache / hashlib.sha256(json.dumps(task).encode()).hexdigest()[:16]
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / TASK, task)
        runs[point] = run
    for processes in study.processes:
        waiting = [run for point, run in runs.items() if point.processes == processes]
        if waiting := [run for run in waiting if not (run / DONE).exists()]:
            train_together(processes, manifest.folder, waiting)
    rows = []
    for point, run in runs.items():
        summary = json.loads((run / DONE).read_text())
        dense = TRIPS * 4 * summary["dense_parameters"] * (1 - 1 / point.processes)
        found = {"bytes": summary["processes"]["bytes"] - dense, "seconds": summary["seconds"]}
        found["auc"] = float(np.mean([summary[half]["auc"] for half in ("test", "validation")]))
        rows.append(point._asdict() | found | {"synthetic": bool(manifest.synthetic)})
        say(f"{point}: {found['bytes']:,.0f} B a step, AUC {found['auc']:.4f} ({found['seconds']:.1f} s)")
    return rows


def of(rows: Rows, name: str, **which: Any) -> np.ndarray:
    """(seeds,) what was found of a point."""
    return np.array([row[name] for row in where(rows, **which)])


def saved(rows: Rows, staleness: int, **which: Any) -> float:
    """The share of the bytes with S = 0 that is saved, on average."""
    some, all_of_it = (of(rows, "bytes", staleness=bound, **which) for bound in (staleness, 0))
    return float(np.mean(1 - some / all_of_it))


def lost(rows: Rows, staleness: int, **which: Any) -> tuple[float, float]:
    """AUC less that with S = 0, and half of its interval."""
    some, exact = (of(rows, "auc", staleness=bound, **which) for bound in (staleness, 0))
    return mean_interval(some - exact)


def kinds(rows: Rows, *names: str) -> list[dict[str, Any]]:
    """The values that rows have of these, each once."""
    found = dict.fromkeys(tuple(row[name] for name in names) for row in rows)
    return [dict(zip(names, values, strict=True)) for values in found]


def verdict(rows: Rows) -> Verdict:
    """Where an interval is too wide to tell quality, that must only not be refuted."""
    bounded = [row for row in rows if row["staleness"] != NEVER]
    shares = [(saved(rows, **kind), kind) for kind in kinds(bounded, "processes", "width", "staleness")]
    most, at = max(shares, key=lambda found: found[0])
    checks = [Check(f"bytes: up to {SAVED:.0%} fewer", most >= SAVED, f"{most:.1%} with {named(at)}")]
    for processes in dict.fromkeys(row["processes"] for row in rows):
        enough = [
            kind["staleness"] for share, kind in shares if share >= SAVED and kind["processes"] == processes
        ]
        if enough:
            mean, half = lost(rows, min(enough), processes=processes, width=WIDTH)
            what = f"quality: on {processes} processes with S = {min(enough)} the AUC is within {WITHIN:g}"
            checks.append(Check(what, mean + half >= -WITHIN, f"{mean:+.4f} ± {half:.4f}"))
    for kind in kinds(where(rows, staleness=NEVER), "processes", "width"):
        mean, half = lost(rows, NEVER, **kind)
        what = f"a bound is needed: exchanged at the end alone, rows lose more than {WITHIN:g}"
        checks.append(Check(what, mean + half < -WITHIN or half > WITHIN, f"{mean:+.4f} ± {half:.4f}"))
    spare = min(bound(kind["width"]) - share for share, kind in shares)
    checks.append(Check("theory: no more is saved than ids leave", spare >= 0, f"{spare:.1%} less at least"))
    return conclude(checks)


def named(kind: dict[str, Any]) -> str:
    return f"K = {kind['processes']}, D = {kind['width']}, S = {kind['staleness']}"


def summarise(rows: Rows) -> dict:
    """The figures of the study, few enough to keep: table and figure are made of them."""

    def describe(kind: dict[str, Any]) -> dict:
        found = where(rows, **kind)
        kept = kind | {"seeds": len(found), "bytes": float(np.mean(of(rows, "bytes", **kind)))}
        kept |= {"auc": float(np.mean(of(rows, "auc", **kind))), "saved": saved(rows, **kind)}
        return kept | ({"lost": lost(rows, **kind)} if len(found) > 1 else {})

    return {
        "synthetic": rows[0]["synthetic"],
        "points": [describe(kind) for kind in kinds(rows, "processes", "width", "staleness")],
        "checks": verdict(rows).checks,
        "versions": versions(),
    }


def table(summary: dict) -> str:
    """A line for each number of processes, width and bound."""
    source = "SYNTHETIC rows" if summary["synthetic"] else "Real rows"
    heads = "processes", "D", "S", "seeds", "bytes a step", "saved", "AUC", "less that of S = 0"
    lines = [f"{source}; no S can save more than {' and '.join(limits(summary))}.", ""]
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for point in summary["points"]:
        exact, bound = point["staleness"] == 0, "none" if point["staleness"] == NEVER else point["staleness"]
        less = "" if exact or "lost" not in point else "{:+.4f} ± {:.4f}".format(*point["lost"])
        share = "" if exact else f"{point['saved']:.1%}"
        cells = point["processes"], point["width"], bound, point["seeds"], f"{point['bytes']:,.0f}", share
        lines.append(f"| {' | '.join(map(str, (*cells, format(point['auc'], '.4f'), less)))} |")
    return "\n".join(lines)


def limits(summary: dict) -> list[str]:
    widths = dict.fromkeys(point["width"] for point in summary["points"])
    return [f"{bound(width):.1%} with D = {width}" for width in widths]


def plot(rows: Rows):
    return draw(summarise(rows))


def draw(summary: dict):
    """Bytes saved against the bound S; and against them the AUC."""
    source = "SYNTHETIC data" if summary["synthetic"] else "real data"
    figure, (shares, quality) = claim.figure(1, 2, f"Rows exchanged when they have to be, {source}")
    bounded = [point for point in summary["points"] if point["staleness"] != NEVER]
    for kind in kinds(bounded, "processes", "width"):
        found, label = where(bounded, **kind), f"K = {kind['processes']}, D = {kind['width']}"
        percent = [100 * point["saved"] for point in found]
        (line,) = shares.plot([point["staleness"] for point in found], percent, marker="o", label=label)
        judged = [point for point in where(summary["points"], **kind) if "lost" in point]
        if judged:
            middle, half = np.array([point["lost"] for point in judged]).T
            at = [100 * point["saved"] for point in judged]
            quality.errorbar(
                *(at, middle), yerr=half, fmt="o-", capsize=3, label=label, color=line.get_color()
            )
    shares.axhline(100 * SAVED, color="black", linewidth=1, linestyle=":", label="HET's claim")
    quality.axvline(100 * SAVED, color="black", linewidth=1, linestyle=":")
    shares.set_xscale("symlog", linthresh=1)
    claim.ticks(shares, [point["staleness"] for point in bounded])
    shares.set(xlabel="S", ylabel="% of bytes saved", xlim=(-0.2, None))
    quality.set(xlabel="% of bytes saved", ylabel="AUC less that of S = 0")
    for axes in (shares, quality):
        axes.legend(fontsize="small")
    return figure


def main() -> None:
    """Hold the claim against trainings, and write what its table is made of."""
    claim.told(StudyOptions, summarise, table)


if __name__ == "__main__":
    main()
