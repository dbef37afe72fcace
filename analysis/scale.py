"""CriteoTB's size with planted truth: full table, hashing trick and ROBE on rows that nobody has to store.

Claim, of tables of the published size, 187,767,399 rows of 128 weights (96 GB):

1. quality: ROBE 1,000 times smaller (96 MB) comes to the AUC of the full table (arXiv 2108.02191).
2. rows: 10,000 times smaller (9.6 MB) needs 4.5 times the steps for the same (arXiv 2207.10731).
3. time: its steps are 4.3 times as fast (the same).

They are judged where the tables have that size, and only told where they are smaller: at a 1,000th of it an
array 1,000 times smaller has 3,000 weights, while a row still names 26 ids, of which the frequent ones are
as many. At any size these must hold:

4. truth: no model knows more than the law that drew the labels.
5. ids: the first way learns of the ids, that is more than the counts alone can tell, and a good part of what
   can be known.
6. size: ROBE 10,000 times smaller is not better than 1,000 times smaller.
7. equal bytes: ROBE is not worse than the hashing trick in the same bytes.

Conditions: SYNTHETIC rows of analysis/planted.py, drawn where the model computes; ids by Zipf's law over the
published cardinalities (MLPerf v1), with exponents fitted to real rows (`--fit LOG`, analysis/fitted_law.py).
All ways see the same rows, once, at the same constant rate. From 1/100 of the size on the model is that of
MLPerf v1, with its SGD; below, for CPUs, it is small, with rows of 16 weights, and Adagrad. Other seeds are
other weights, another hash and other rows; AUCs are those of held-out rows. A way that does not fit into
memory is left out, and a line says so.

    python analysis/scale.py [--quick] [--scale X] [--rows N] [--minutes N] [--fit LOG] [--seeds N]

On a card, all of it (not yet run on one):

    python analysis/scale.py --scale 1 --minutes 60 --backend cuda

Trainings lie in analysis/out/scale. One that is killed, or whose minutes are over, goes on at its checkpoint.
"""

import dataclasses
import gc
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis import claim
from analysis.claim import Check, Options, Rows, Verdict, conclude, mean_interval, where
from analysis.fitted_law import Fitted, fit_log
from analysis.planted import DENSE, HELD_OUT, Drawn, Eaten, Enough, LawConfig, law_of
from analysis.tradeoff import steps_to
from analysis.trainings import seeded
from data_pipeline.schema import CRITEO_TB_CARDINALITIES, CRITEO_TB_TRAINING_ROWS
from robe.backend import Backend, select
from robe.config import ConfigError, DataSpec, EmbeddingConfig, ModelConfig, TrainConfig, resolve, to_json
from robe.embeddings import create
from robe.files import alone
from robe.model import DLRM
from robe.plan import plan
from robe.progress import progress_bar
from robe.train import read_log, train, versions

CACHE = claim.OUT / "scale"
TABLE, THOUSAND, TEN_THOUSAND, HASHING = "full table", "ROBE 1,000x", "ROBE 10,000x", "hashing 1,000x"
WAYS = {
    TABLE: EmbeddingConfig("full"),
    THOUSAND: EmbeddingConfig(compression=1000),
    TEN_THOUSAND: EmbeddingConfig(compression=10_000),
    HASHING: EmbeddingConfig("hashing", compression=1000),
}
EQUAL = 0.001  # of AUC
SLACK = 0.005  # that a model may have more than the law on rows drawn at random
LARGEST_KEPT = 20e9  # bytes of a checkpoint
LEARNED = 0.25  # of what can be known above 1/2
REACHED = 0.2  # of the rows: what the table knows then is to be reached by the others
MORE_ROWS, FASTER = 4.5, 4.3  # as published
TURNS, BURST = 15, 6  # of steps that are timed

# What `--fit` says of the 10,000 rows of day 0 of Criteo Terabyte that are public here and there.
EXPONENTS = (
    *(1.189, 1.206, 1.049, 1.413, 1.25, 2.787, 1.093, 1.429, 3.0, 1.203, 1.307, 1.125, 0.976),
    *(1.599, 1.293, 2.749, 1.202, 1.858, 1.826, 1.186, 1.24, 1.194, 1.333, 1.106, 2.784, 2.44),
)
DECAY, BASE_RATE = 0.0, 0.0265


@dataclass(frozen=True)
class Sizes:
    """How much to train; the defaults are the study of a CPU.

    scale: of the published cardinalities. rows: to train on; default: that share of the published rows.
    held_out: rows to judge on, at so many `evaluations` of a training. seeds: trainings of each way. batch:
    rows per step. minutes: for all of it. backend: as of `train`. ways: those of WAYS.
    """

    scale: float = 1e-3
    rows: int | None = None
    held_out: int = 100_000
    seeds: int = 3
    batch: int | None = None
    evaluations: int = 20
    minutes: float = math.inf
    backend: str = "auto"
    ways: tuple[str, ...] = tuple(WAYS)

    @property
    def large(self) -> bool:
        """Whether the model is that of MLPerf."""
        return self.scale >= 0.01

    @property
    def batch_rows(self) -> int:
        return self.batch or (2048 if self.large else 512)

    @property
    def steps(self) -> int:
        """Of a training, as many between any two evaluations."""
        rows = self.rows or int(CRITEO_TB_TRAINING_ROWS * self.scale)
        return self.evaluations * max(1, rows // (self.evaluations * self.batch_rows))


QUICK = Sizes(rows=50_000, held_out=10_000, seeds=1, batch=256, evaluations=5)


class Planted(DLRM):
    """A DLRM that is given rows of a law where it computes: their ids have rows, and nothing is copied."""

    def checked(self, ids, rows: int):
        """The ids, on the device, as they are."""
        return ids


def measure(
    quick: bool = False,
    scale: float | None = None,
    rows: int | None = None,
    held_out: int | None = None,
    seeds: int | None = None,
    batch: int | None = None,
    minutes: float | None = None,
    backend: str | None = None,
    fit: Path | None = None,
    study: Sizes | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> Rows:
    """Train what the cache lacks, as far as the minutes go.

    study: the quick or the full one, if not given; the others replace what it says. fit: a log in Criteo's
    format that the law is fitted to.

    A row is one number: `value` is what `kind` says.

    exponent, decay, base_rate, scale   of the law (exponent: of `feature`)
    best_auc, best_log_loss, counts_auc of the law on the held-out rows
    bytes                               of the weights of a way
    auc, log_loss                       of a way with a seed, after `rows` rows
    step_ms                             of a way
    left_out                            bytes that a way needs, and there are not
    backend, batch                      where it is trained, and rows per step
    """
    given = {"scale": scale, "rows": rows, "held_out": held_out, "seeds": seeds, "batch": batch}
    given |= {"minutes": minutes, "backend": backend}
    study = study or (QUICK if quick else Sizes())
    study = dataclasses.replace(study, **{name: x for name, x in given.items() if x is not None})
    config = LawConfig(EXPONENTS, DECAY, BASE_RATE, study.scale)
    if fit is not None:
        fitted = fit_log(fit, CRITEO_TB_CARDINALITIES)
        say(described(fit, fitted))
        config = dataclasses.replace(
            config, exponents=fitted.exponents, decay=fitted.decay, base_rate=fitted.base_rate
        )
    trainings = Trainings(study, config, cache, say)
    found = list(trainings.of_law())
    ends = time.monotonic() + 60 * study.minutes
    left = study.seeds * len(study.ways)
    for seed in range(study.seeds):  # seed by seed, so that a study cut short has all ways
        for way in study.ways:
            share = (ends - time.monotonic()) / left
            found += trainings.run(way, seed, time.monotonic() + share)
            left -= 1
        if seed == 0:
            found += trainings.times(ways(found))
        trainings.models.clear()
    if not ways(found):
        what = "give it more minutes, fewer rows, a smaller scale or more memory"
        raise ConfigError(f"no training came to its first evaluation; {what}")
    return found


def described(log: Path, fitted: Fitted) -> str:
    """A line that says what was fitted."""
    low, high = fitted.decay_interval
    exponents = ", ".join(f"{x:g}" for x in fitted.exponents)
    return (
        f"{log}: {fitted.rows:,} rows, base rate {fitted.base_rate:.4f}, decay {fitted.decay:g} "
        f"({low:g} to {high:g}), exponents {exponents}"
    )


class Trainings:
    """The trainings of a study, each made once and kept in a folder named by what it depends on."""

    def __init__(self, study: Sizes, law: LawConfig, cache: Path, say: Callable[[str], None]):
        self.study, self.law_config, self.cache, self.say = study, law, cache, say
        # Rows are made where the model computes: there is nothing to feed.
        self.backend = dataclasses.replace(
            select(study.backend), feed=lambda batches, rows, phase=None: batches
        )
        self.law, self.models = law_of(law).on(self.backend), {}
        note = f"a planted law at {study.scale:g} of CriteoTB's size"
        self.spec = DataSpec(DENSE, law.cardinalities, "modulo", "planted", note)
        self.held_out = Drawn(self.law, self.backend, study.held_out, HELD_OUT, judged=True)
        say(
            f"{note}: {sum(law.cardinalities):,} ids, {study.steps * study.batch_rows:,} rows; "
            f"{self.backend.description}"
        )

    def of_law(self) -> Iterator[dict]:
        """The rows that tell what is the same in all trainings."""
        yield {"kind": "backend", "value": self.backend.description}
        yield {"kind": "batch", "value": self.study.batch_rows}
        for kind in ("scale", "decay", "base_rate"):
            yield {"kind": kind, "value": getattr(self.law_config, kind)}
        for feature, exponent in enumerate(self.law_config.exponents):
            yield {"kind": "exponent", "feature": feature, "value": exponent}
        yield from ({"kind": kind, "value": value} for kind, value in self.held_out.truth().items())

    def config(self, way: str, seed: int) -> TrainConfig:
        study = self.study
        config = TrainConfig(
            ModelConfig("mlperf" if study.large else "small"),
            seeded(WAYS[way], seed),
            batch=study.batch_rows,
            epochs=1,
            seed=seed,
            eval_every=study.steps // study.evaluations,
            backend=self.backend.name,
        )
        if sum(plan(resolve(config), self.spec, 0)["checkpoint"].values()) > LARGEST_KEPT:
            config = dataclasses.replace(config, checkpoint_every=study.steps + 1)
        return resolve(config)

    def run(self, way: str, seed: int, until: float) -> Rows:
        """What is known of a training once it has ended, or its time is over."""
        config, steps = self.config(way, seed), self.study.steps
        what = {"config": to_json(config), "law": dataclasses.asdict(self.law_config), "steps": steps}
        what |= {"held_out": self.study.held_out}
        run = self.cache / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        log, about = run / "metrics.jsonl", {"way": way, "seed": seed}
        memory = plan(config, self.spec, 0)["memory"]
        with alone(run):
            if not ended(log, steps):
                needed, free = sum(memory.values()), free_bytes(self.backend)
                if needed > free:
                    self.say(
                        f"{way}: left out, as its {needed / 1e9:.1f} GB do not fit into {free / 1e9:.1f}"
                    )
                    return [{"kind": "left_out", **about, "value": needed}]
                self.train(config, way, run, until)
            if ended(log, steps):
                shutil.rmtree(run / "checkpoints", ignore_errors=True)
        rows = [{"kind": "bytes", **about, "value": memory["embedding weights"]}]
        for entry in evaluations(log):
            at = {**about, "rows": entry["step"] * config.batch}
            rows += [{"kind": kind, **at, "value": entry[kind]} for kind in ("auc", "log_loss")]
        return rows

    def model(self, config: TrainConfig) -> DLRM:
        """A new model."""
        return Planted(config, self.spec, create(config, self.spec, self.backend), self.backend)

    def train(self, config: TrainConfig, way: str, run: Path, until: float) -> None:
        """Train as far as the rows and the time go, and keep the model to time it."""
        name, count = f"{way}, seed {config.seed}", self.study.steps * config.batch
        if config.checkpoint_every:
            self.say(f"{name}: is too large for checkpoints, and begins anew if it is cut off")
        eaten = Eaten(self.law, self.backend, count, config.seed * count, until)
        rows = {"train": eaten, "validation": self.held_out, "test": self.held_out}
        self.models[way] = model = self.model(config)
        with progress_bar(name, "rows") as update:
            try:
                train(model, config, self.spec, rows, run, update)
            except Enough as end:
                self.say(f"{name}: {end}")

    def times(self, ways: list[str]) -> Rows:
        """Milliseconds of a step of these ways, which take turns on rows that are there already.

        Their models, which are trained on by it, are kept no longer.
        """
        batch = self.study.batch_rows
        batches = [
            next(Drawn(self.law, self.backend, batch, first=i * batch).batches(batch)) for i in range(4)
        ]
        models = {way: self.models.get(way) or self.model(self.config(way, 0)) for way in ways}
        self.models.clear()
        rows = []
        for turn in range(1 + TURNS):  # the first may compile
            for way, model in models.items():
                self.backend.synchronize()
                started = time.perf_counter()
                for i in range(BURST):
                    model.step(*batches[i % len(batches)], self.config(way, 0).optimizer.lr)
                self.backend.synchronize()
                if turn:
                    ms = 1e3 * (time.perf_counter() - started) / BURST
                    rows.append({"kind": "step_ms", "way": way, "value": ms})
        return rows


def evaluations(log: Path) -> list[dict]:
    """Those of a training, which may not have begun."""
    found = read_log(log) if log.exists() else ()
    return [entry for entry in found if entry["kind"] == "validation"]


def ended(log: Path, steps: int) -> bool:
    """Whether the last evaluation of a training was made."""
    return any(entry["step"] == steps for entry in evaluations(log))


def free_bytes(backend: Backend) -> float:
    """What a model may take, of the device's memory or of the host's."""
    gc.collect()  # the graphs of a model before this one hold it in a circle
    if hasattr(backend.xp, "get_default_memory_pool"):  # CuPy's
        backend.xp.get_default_memory_pool().free_all_blocks()
        return backend.xp.cuda.runtime.memGetInfo()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def fact(rows: Rows, kind: str) -> float:
    """What is the same in all trainings."""
    return where(rows, kind=kind)[0]["value"]


def ways(rows: Rows) -> list[str]:
    """Those that were evaluated, in the order of WAYS."""
    found = {row["way"] for row in where(rows, kind="auc")}
    return [way for way in WAYS if way in found]


def common(rows: Rows) -> int:
    """The rows after which all trainings were evaluated."""
    last: dict[tuple, int] = {}
    for row in where(rows, kind="auc"):
        last[row["way"], row["seed"]] = row["rows"]
    return min(last.values())


def curve(rows: Rows, way: str, kind: str = "auc") -> tuple[np.ndarray, np.ndarray]:
    """Rows seen (E,), up to those that all have, and the figures after them (seeds, E)."""
    end, found = common(rows), {}
    for row in where(rows, kind=kind, way=way):
        if row["rows"] <= end:
            found.setdefault(row["rows"], []).append(row["value"])
    return np.array(list(found)), np.array(list(found.values())).T


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Mean, and half its interval over the seeds; 0 of one seed, which tells none."""
    return mean_interval(samples) if len(samples) > 1 else (float(samples[0]), 0.0)


def shown(mean: float, half: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + (f" ± {half:.4f}" if half else "")


def difference(rows: Rows, a: str, b: str) -> tuple[float, float]:
    """AUC of one way less that of another, after all the rows."""
    return interval(curve(rows, a)[1][:, -1] - curve(rows, b)[1][:, -1])


def target(rows: Rows) -> float:
    """What the table, or the first way without it, knows after a part of the rows."""
    at, auc = curve(rows, ways(rows)[0])
    return float(auc[:, at >= REACHED * at[-1]][:, 0].mean())


def rows_to_target(rows: Rows, way: str) -> list[float]:
    """With each seed; inf if it does not get there."""
    at, auc = curve(rows, way)
    return [steps_to(at, one, target(rows)) for one in auc]


def step_ms(rows: Rows, way: str) -> list[float]:
    """The median, and the quartiles."""
    found = [row["value"] for row in where(rows, kind="step_ms", way=way)]
    return np.percentile(found, [50, 25, 75]).tolist()


def of_any_size(rows: Rows) -> Iterator[Check]:
    present, best = ways(rows), fact(rows, "best_auc")
    most = max(float(curve(rows, way)[1].max()) for way in present)
    yield Check("truth: nobody knows more than the law", most <= best + SLACK, f"{most:.4f} of {best:.4f}")
    _, auc = curve(rows, present[0])
    known, counts = float(auc[:, -1].mean()), fact(rows, "counts_auc")
    what = f"ids: the {present[0]} knows {LEARNED:.0%} of what can be known, and more than the counts tell"
    enough = max(counts + EQUAL, 0.5 + LEARNED * (best - 0.5))
    yield Check(what, known >= enough, f"{known:.4f}; {enough:.4f} is asked, counts alone {counts:.4f}")
    if {THOUSAND, TEN_THOUSAND} <= {*present}:
        mean, half = difference(rows, TEN_THOUSAND, THOUSAND)
        what = f"size: {TEN_THOUSAND} is not better than {THOUSAND}"
        yield Check(what, mean - half <= EQUAL, shown(mean, half, "+"))
    if {THOUSAND, HASHING} <= {*present}:
        mean, half = difference(rows, THOUSAND, HASHING)
        what = f"equal bytes: {THOUSAND} is not worse than {HASHING}"
        yield Check(what, mean + half >= -EQUAL, shown(mean, half, "+"))


def of_papers(rows: Rows) -> Iterator[Check]:
    """The papers' claims, as far as there is a table to compare with."""
    if not {TABLE, THOUSAND, TEN_THOUSAND} <= {*ways(rows)}:
        return
    mean, half = difference(rows, THOUSAND, TABLE)
    what = f"quality (2108.02191): {THOUSAND} comes to the AUC of the {TABLE}, within {EQUAL:g}"
    yield Check(what, mean >= -EQUAL, shown(mean, half, "+"))
    more = np.mean(rows_to_target(rows, TEN_THOUSAND)) / np.mean(rows_to_target(rows, TABLE))
    what = f"rows (2207.10731): {TEN_THOUSAND} reaches AUC {target(rows):.4f} in {MORE_ROWS:g} times the rows"
    yield Check(what, bool(more <= MORE_ROWS), f"{more:.2f} times" if math.isfinite(more) else "never")
    faster = step_ms(rows, TABLE)[0] / step_ms(rows, TEN_THOUSAND)[0]
    what = f"time (2207.10731): steps of {TEN_THOUSAND} are {FASTER:g} times as fast"
    yield Check(what, faster >= FASTER, f"{faster:.2f} times")


def verdict(rows: Rows) -> Verdict:
    whole = fact(rows, "scale") == 1
    return conclude([*of_any_size(rows), *(of_papers(rows) if whole else ())])


def summarise(rows: Rows) -> dict:
    """The figures of the study, few enough to keep: the table and the figure are made of them."""

    def described_way(way: str) -> dict:
        at, auc = curve(rows, way)
        return {
            "way": way,
            "bytes": where(rows, kind="bytes", way=way)[0]["value"],
            "rows": at.tolist(),
            "auc": [interval(each) for each in auc.T],
            "log_loss": interval(curve(rows, way, "log_loss")[1][:, -1]),
            "less_table": difference(rows, way, TABLE) if TABLE in ways(rows) else None,
            "rows_to_target": [n for n in rows_to_target(rows, way) if math.isfinite(n)],
            "step_ms": step_ms(rows, way),
            "batch": fact(rows, "batch"),
        }

    laws = ("scale", "decay", "base_rate", "best_auc", "best_log_loss", "counts_auc", "click_rate")
    return {
        "law": {kind: fact(rows, kind) for kind in laws}
        | {"exponents": [row["value"] for row in where(rows, kind="exponent")]},
        "seeds": len({row["seed"] for row in where(rows, kind="auc")}),
        "rows": common(rows),
        "target": target(rows),
        "ways": [described_way(way) for way in ways(rows)],
        "left_out": {row["way"]: row["value"] for row in where(rows, kind="left_out")},
        "checks": verdict(rows).checks,
        "papers": list(of_papers(rows)),
        "backend": where(rows, kind="backend")[0]["value"],
        "versions": versions(),
    }


def table(summary: dict) -> str:
    """The figures of a summary as a table in Markdown, and what it says of the papers' claims."""
    law = summary["law"]
    lines = [
        f"{law['scale']:g} of the published size, {summary['rows']:,} rows, seeds: {summary['seeds']}; the "
        f"best possible AUC is {law['best_auc']:.4f}, of the counts alone {law['counts_auc']:.4f}. "
        f"{summary['backend']}.",
        "",
        f"| embeddings | bytes of weights | AUC | less the table's | log loss | rows to AUC "
        f"{summary['target']:.4f} | step |",
        "| --- " * 7 + "|",
    ]
    for way in summary["ways"]:
        less = way["less_table"]
        cells = [
            way["way"],
            f"{way['bytes']:,}",
            shown(*way["auc"][-1]),
            shown(*less, "+") if less and way["way"] != TABLE else "",
            shown(*way["log_loss"]),
            _reached(way["rows_to_target"], summary["seeds"]),
            "{:.2f} ms ({:.2f}-{:.2f})".format(*way["step_ms"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for way, needed in summary["left_out"].items():
        lines.append(f"\n{way} is left out: its {needed / 1e9:.1f} GB do not fit into memory.")
    judged = law["scale"] == 1
    lines += ["", "| the papers' claims | " + ("holds" if judged else "at this size") + " | found |"]
    lines.append("| --- " * 3 + "|")
    lines += [
        f"| {what} | {'yes' if holds else 'no'} | {found} |" for what, holds, found in summary["papers"]
    ]
    return "\n".join(lines)


def _reached(rows: list[float], seeds: int) -> str:
    if len(rows) == seeds:
        return f"{np.mean(rows):,.0f}"
    return f"with {len(rows)} of {seeds} seeds" if rows else "never"


def plot(rows: Rows):
    return draw(summarise(rows))


def draw(summary: dict):
    """AUC over rows and over the time of the steps."""
    law, seeds = summary["law"], summary["seeds"]
    title = f"DLRM, SYNTHETIC rows at {law['scale']:g} of CriteoTB's size; bands: 95% of {seeds} seeds"
    figure, (over_rows, over_time) = claim.figure(1, 2, title)
    for number, way in enumerate(summary["ways"]):
        middle, half = np.array(way["auc"]).T
        at = np.array(way["rows"])
        minutes = at / way["batch"] * way["step_ms"][0] / 6e4
        label = f"{way['way']}, {way['bytes'] / 1e6:,.4g} MB"
        for axes, x in ((over_rows, at), (over_time, minutes)):
            axes.plot(x, middle, color=f"C{number}", label=label)
            axes.fill_between(x, middle - half, middle + half, color=f"C{number}", alpha=0.2)
    for axes, what in ((over_rows, "rows seen"), (over_time, "minutes of steps alone")):
        axes.axhline(law["best_auc"], color="black", linestyle="--", linewidth=1, label="best possible")
        axes.set(xlabel=what, ylabel="AUC of held-out rows")
    over_rows.legend(fontsize="small", loc="lower right")
    return figure


@dataclass(frozen=True)
class ScaleOptions(Options):
    """What the study can be asked for on its command line; what is not given is as for a CPU."""

    scale: float | None = None
    """Of the published numbers of ids, and of rows: 1 is CriteoTB's size."""

    rows: int | None = None
    """To train on, with each way and seed."""

    held_out: int | None = None
    """Rows to judge on."""

    seeds: int | None = None
    """Trainings of each way."""

    batch: int | None = None
    """Rows per step."""

    minutes: float | None = None
    """For all trainings; what is not done then goes on the next time."""

    backend: str | None = None
    """auto, cpu or cuda."""

    fit: Path | None = None
    """A log in Criteo's format, to whose ids and clicks the law is fitted."""


def main() -> None:
    claim.told(ScaleOptions, summarise, table)


if __name__ == "__main__":
    main()
