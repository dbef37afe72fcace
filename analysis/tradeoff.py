"""Size against iterations: what a smaller array costs in quality, in steps and in time.

Claim, after arXiv 2207.10731 (parameter sharing reaches the quality of the full table, in more iterations)
and 2108.02191 (hashed blocks; the published hash has no signs), as far as our measurements bear it out:

1. size: of shared arrays, one ten times smaller is never better at the end of the first pass over the rows,
   and the smallest is worse than the largest.
2. iterations: more steps buy back size, up to a point. An array 100 times smaller reaches what the full table
   knows after half a pass in at most 3 times as many steps; one 10,000 times smaller never does.
3. repetition: after the last pass a full table has lost more of its best AUC than the smallest array.
4. hash: mixed blocks with signs are not worse than the published hash without.

Conditions: the DLRM of the preset `small`, Adagrad at a constant rate; SYNTHETIC rows of a planted law in
which rare categories matter nearly as much as frequent ones, or the rows given by --data. The first point,
compression 1, is the ordinary full table where ids are a dictionary (so are the synthetic data's), and ROBE
with as many weights where they are hashed. Every point has its rate tuned alike: the one of RATES with the
best validation AUC after one pass, with a seed that is not used again. Then several seeds draw the initial
weights, the order of the rows and the hash, and what is told is the AUC of the test half. Intervals are
Student's, 95%, over these seeds, and of differences between points with equal seeds; the rows are always the
same, so other data may differ by more.

    python analysis/tradeoff.py [--quick] [--data PREPARED] [--seeds N] [--passes N] [--batch N]

Trainings are kept in analysis/out/tradeoff, see analysis/trainings.py, with a checkpoint after each pass.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from matplotlib import colormaps

from analysis import claim
from analysis.claim import Check, Rows, Verdict, conclude, mean_interval, where
from analysis.trainings import (
    RATES,
    TUNING_SEED,
    WIDTH,
    Study,
    StudyOptions,
    Trainings,
    curve,
    seeded,
)
from robe.config import (
    METHODS,
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    OptimizerConfig,
    TrainConfig,
    resolve,
    robe_weights,
)
from robe.model import build
from robe.train import versions

CACHE = claim.OUT / "tradeoff"
EVALUATIONS = 20  # per pass
TARGETS = (0.1, 0.25, 0.5)  # of a pass: what the first point knows then is to be reached by the others
SHOWN = (0.1, 0.5, 1.0)  # passes after which the tables tell the AUC; the last follows
REACHED, MOST_STEPS = 0.5, 3  # the target of the claim, and how many times as many steps it may take

COMPRESSIONS = (1, 10, 100, 1000, 10000)
MODEST = 100  # reaches that target
COMPARED = 1000  # where the ways to hash are compared
DEFAULT = "mix, signs, Z = 16"  # that of the sizes
PUBLISHED = "affine, no signs"
VARIANTS = {
    "mix, no signs": {"sign": False},
    "affine, signs": {"hash": "affine"},
    PUBLISHED: {"hash": "affine", "sign": False},
    "Z = 1": {"block": 1},
    "Z = 4": {"block": 4},
    "Z = 64": {"block": 64},
}


@dataclass(frozen=True)
class Sizes(Study):
    """What to train; the defaults are the full study. timed: turns of each point when steps are timed."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    timed: int = 30


QUICK = Sizes(
    rows=40_000, scale=0.005, seeds=3, passes=2, batch=128, rates=(0.03,), variants=(PUBLISHED,), timed=5
)


@dataclass(frozen=True)
class Point:
    """An embedding of the study. compression: against the full table, whose size the manifest tells."""

    name: str
    compression: int
    embedding: EmbeddingConfig
    passes: int


def measure(
    quick: bool = False,
    data: Path | None = None,
    seeds: int | None = None,
    passes: int | None = None,
    batch: int | None = None,
    study: Sizes | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> Rows:
    """Train what the cache lacks, and time the steps.

    study: the quick or the full one, if not given; data, seeds, passes and batch replace what it says.

    A row is one number: `value` is what `kind` says.

    validation_auc   after tuning at `rate`
    test_auc         after `step` steps, which are `passes` over the rows
    step_ms          of a training step, evaluations left out
    train_rows, test_rows
    best_auc         that the generator's own probabilities have on the test half
    """
    study = study or (QUICK if quick else Sizes())
    study = study.given(data=data, seeds=seeds, passes=passes, batch=batch)
    trainings = PointTrainings.of(study, cache, say, dialects=METHODS["robe"].ids)
    points = list(plan(study, trainings.spec))
    rows, tuned = [], {}
    for point in points:
        rates = study.rates if len(study.rates) > 1 else ()
        found = {rate: trainings.run(point, rate, TUNING_SEED, passes=1)[0] for rate in rates}
        tuned[point] = max(found, key=found.get, default=study.rates[0])
        rows += [trainings.row("validation_auc", point, auc, rate=rate) for rate, auc in found.items()]
    # Seed by seed, so that a study cut short has all points.
    for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + study.seeds):
        for point in points:
            for step, auc in trainings.run(point, tuned[point], seed, point.passes)[1]:
                facts = {"rate": tuned[point], "seed": seed, "step": step}
                facts |= {"passes": step / trainings.steps_per_pass}
                rows.append(trainings.row("test_auc", point, auc, **facts))
    say(f"timing the steps of each point, {study.timed} turns")
    for point, times in zip(points, trainings.times(points, study.timed), strict=True):
        rows += [trainings.row("step_ms", point, ms, rate=tuned[point]) for ms in times.tolist()]
    manifest = trainings.manifest
    rows += [trainings.row(f"{half}_rows", points[0], manifest.rows(half)) for half in ("train", "test")]
    if bayes := manifest.synthetic and manifest.synthetic["bayes"]:
        rows.append(trainings.row("best_auc", points[0], bayes["test"]["auc"]))
    return rows


def plan(study: Sizes, spec: DataSpec) -> Iterator[Point]:
    """The points of a study: the sizes, the largest first, then the ways to hash."""
    full, default = sum(spec.cardinalities) * WIDTH, EmbeddingConfig()
    if full < max(COMPRESSIONS) * default.block:
        raise ConfigError(
            f"{full:,} weights: the smallest array, {max(COMPRESSIONS):,} times smaller than the full table, "
            f"must hold a block of {default.block}"
        )
    for compression in COMPRESSIONS:
        if compression == 1 and spec.dialect == "dictionary":
            yield Point("full table", 1, EmbeddingConfig("full"), study.passes)
        else:
            embedding = dataclasses.replace(default, compression=compression)
            yield Point(f"{compression:,}x", compression, embedding, study.passes)
    for name in study.variants:
        embedding = dataclasses.replace(default, compression=COMPARED, **VARIANTS[name])
        yield Point(name, COMPARED, embedding, 1)


class PointTrainings(Trainings):
    """Those of the points of a study."""

    def config(self, point: Point, rate: float, seed: int, passes: int) -> TrainConfig:
        # The published coefficients are those of seed 1024; with affine, seed 1 is theirs.
        hash_seed = seed + (1023 if point.embedding.hash == "affine" else 0)
        return resolve(
            TrainConfig(
                embedding=seeded(point.embedding, hash_seed),
                optimizer=OptimizerConfig("adagrad", rate),
                batch=self.batch,
                epochs=passes,
                seed=seed,
                eval_every=max(1, self.steps_per_pass // EVALUATIONS),
                checkpoint_every=self.steps_per_pass,
            )
        )

    def run(self, point: Point, rate: float, seed: int, passes: int) -> tuple[float, list[tuple[int, float]]]:
        """The AUC on the validation half at the end, and (step, AUC on the test half) on the way."""
        config = self.config(point, rate, seed, passes)
        summary, log = self.trained(config, f"{point.name}, rate {rate}, seed {seed}, passes {passes}")
        # An evaluation at the very end may lie off the steps that all points share.
        curve = [(e["step"], e["auc"]) for e in log if e["step"] % config.eval_every == 0]
        return summary["test"]["auc"], curve

    def times(self, points: list[Point], rounds: int, burst: int = 6) -> np.ndarray:
        """Milliseconds per training step (points, rounds).

        The points take turns on the same batches, so that whatever else the machine does strikes all; each
        turn is a burst whose first half is not timed, so that an array small enough for a cache is in it.
        """
        configs = [self.config(point, RATES[0], TUNING_SEED, passes=1) for point in points]
        models = [build(config, self.spec, self.backend) for config in configs]
        with closing(self.rows["train"].batches(self.batch)) as batches:
            batches = [tuple(map(self.backend.to_device, batch)) for batch in islice(batches, burst)]
        times = np.empty((len(points), rounds))
        for turn in range(-1, rounds):  # turn -1 compiles, and is overwritten by the last
            for i, (model, config) in enumerate(zip(models, configs, strict=True)):
                for step, batch in enumerate(batches):
                    if step == len(batches) // 2:
                        self.backend.synchronize()
                        started = time.perf_counter()
                    model.step(*batch, config.optimizer.lr)
                self.backend.synchronize()
                passed = time.perf_counter() - started
                times[i, turn] = 1e3 * passed / (len(batches) - len(batches) // 2)
        return times

    def row(self, kind: str, point: Point, value: float, **facts) -> dict:
        # A full table has as many weights as an array of compression 1.
        sized = dataclasses.replace(point.embedding, compression=point.compression)
        weights = robe_weights(sized, WIDTH, self.spec.cardinalities)
        size = {"point": point.name, "compression": point.compression, "weights": weights}
        return {"kind": kind} | size | facts | {"value": value}


def values(rows: Rows, kind: str, point: str) -> list[float]:
    return [row["value"] for row in where(rows, kind=kind, point=point)]


def sizes(rows: Rows) -> dict[int, str]:
    """Compression -> point, as the study has them, the largest array first."""
    return {row["compression"]: row["point"] for row in rows if row["point"] not in VARIANTS}


def variants(rows: Rows) -> list[str]:
    """The points that differ in how they hash, behind the default of the same size."""
    found = dict.fromkeys(row["point"] for row in rows if row["point"] in VARIANTS)
    return [sizes(rows)[COMPARED], *found]


def auc_after(rows: Rows, point: str, passes: float) -> np.ndarray:
    """Test AUC (seeds,) at the last evaluation up to then."""
    _, done, auc = curve(rows, point)
    return auc[:, np.flatnonzero(done <= passes)[-1]]


def steps_to(steps: np.ndarray, auc: np.ndarray, target: float) -> float:
    """The step (from the evaluations around it, on a straight line) where AUC (E,) first reaches a target.

    inf if it never does; the first evaluation if it has then, which may be too late.
    """
    reached = np.flatnonzero(auc >= target)
    if not len(reached):
        return np.inf
    i = reached[0]
    if i == 0:
        return float(steps[0])
    share = (target - auc[i - 1]) / (auc[i] - auc[i - 1])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def difference(rows: Rows, a: str, b: str) -> tuple[float, float]:
    """Test AUC of one point less that of another after a pass, seed by seed: mean and half the interval."""
    return mean_interval(auc_after(rows, a, 1.0) - auc_after(rows, b, 1.0))


def steps_to_targets(rows: Rows) -> list[dict]:
    """For each of TARGETS the test AUC that the first point had then, and the steps of each size to it.

    steps: compression -> the steps of each seed, inf for one that does not reach it.
    """
    first = sizes(rows)[1]
    found = []
    for share in TARGETS:
        target = float(auc_after(rows, first, share).mean())
        steps = {}
        for compression, point in sizes(rows).items():
            at, _, auc = curve(rows, point)
            steps[compression] = [steps_to(at, one, target) for one in auc]
        found.append({"passes": share, "auc": target, "steps": steps})
    return found


def verdict(rows: Rows) -> Verdict:
    points = sizes(rows)
    first, *arrays = points.values()
    smaller = {f"{b} - {a}": difference(rows, b, a) for a, b in pairwise(arrays)}
    fall, fall_half = difference(rows, arrays[-1], arrays[0])

    target = next(target for target in steps_to_targets(rows) if target["passes"] == REACHED)
    factor = np.mean(target["steps"][MODEST]) / np.mean(target["steps"][1])
    reached = np.isfinite(target["steps"][max(points)])

    lost, lost_half = mean_interval(lost_again(rows, first) - lost_again(rows, arrays[-1]))
    better, better_half = difference(rows, points[COMPARED], PUBLISHED)
    return conclude(
        [
            Check(
                "size: ten times fewer weights are not better after a pass, and the fewest are worse",
                all(mean - half <= 0 for mean, half in smaller.values()) and fall + fall_half < 0,
                ", ".join(f"{name} {mean:+.4f} ± {half:.4f}" for name, (mean, half) in smaller.items()),
            ),
            Check(
                f"iterations: {points[MODEST]} reaches what the {first} knows after {REACHED:g} of a pass",
                bool(factor <= MOST_STEPS),
                f"AUC {target['auc']:.4f} takes {factor:.1f} times as many steps (inf: not with every seed)",
            ),
            Check(
                f"limit: {arrays[-1]} never reaches that",
                not reached.any(),
                f"{reached.sum()} of {len(reached)} seeds do",
            ),
            Check(
                f"repetition: the {first} loses more of its best AUC by the last pass than {arrays[-1]}",
                lost - lost_half > 0,
                f"{lost:.4f} ± {lost_half:.4f} more",
            ),
            Check(
                f"hash: at {points[COMPARED]}, mix with signs is not worse than {PUBLISHED}",
                better + better_half >= 0,
                f"{better:+.4f} ± {better_half:.4f}",
            ),
        ]
    )


def lost_again(rows: Rows, point: str) -> np.ndarray:
    """The best test AUC on the way less the last (seeds,)."""
    auc = curve(rows, point)[2]
    return auc.max(axis=1) - auc[:, -1]


def summarise(rows: Rows) -> dict:
    """The figures of the study, few enough to keep: the tables are made of them."""
    last = {row["point"]: row for row in where(rows, kind="test_auc")}
    points, passes = sizes(rows), round(max(row["passes"] for row in last.values()))

    def describe(point: str) -> dict:
        low, middle, high = np.percentile(values(rows, "step_ms", point), [25, 50, 75])
        kept = {key: last[point][key] for key in ("point", "compression", "weights", "rate")}
        return kept | {"step_ms": [middle, low, high]}

    def curves(point: str) -> dict:
        aucs = {f"{share:g}": mean_interval(auc_after(rows, point, share)) for share in (*SHOWN, passes)}
        return aucs | {"best": mean_interval(curve(rows, point)[2].max(axis=1))}

    def known(steps: dict) -> dict:
        """None, which JSON has, for the seeds that do not get there."""
        return {c: [s if np.isfinite(s) else None for s in found] for c, found in steps.items()}

    default = sizes(rows)[COMPARED]
    return {
        "train_rows": values(rows, "train_rows", points[1])[0],
        "test_rows": values(rows, "test_rows", points[1])[0],
        "best_auc": (values(rows, "best_auc", points[1]) or [None])[0],
        "passes": passes,
        "seeds": len(auc_after(rows, points[1], 1.0)),
        "sizes": [describe(name) | {"auc": curves(name)} for name in points.values()],
        "targets": [t | {"steps": known(t["steps"])} for t in steps_to_targets(rows)],
        "variants": [
            describe(name)
            | {
                "auc": mean_interval(auc_after(rows, name, 1.0)),
                "less_default": difference(rows, name, default),
            }
            for name in variants(rows)
        ],
        "checks": verdict(rows).checks,
        "versions": versions(),
    }


def tables(summary: dict) -> str:
    """The figures of a summary as two tables in Markdown."""
    passes, reached = summary["passes"], next(t for t in summary["targets"] if t["passes"] == REACHED)
    shares = [f"{share:g}" for share in (*SHOWN, passes)]
    heads = [f"AUC after {share} pass{'es' * (float(share) > 1)}" for share in shares] + [
        "best AUC on the way"
    ]
    lines = [
        f"{summary['train_rows']:,} training and {summary['test_rows']:,} test rows, {summary['seeds']} seeds"
        + (f"; the best possible test AUC is {summary['best_auc']:.4f}." if summary["best_auc"] else "."),
        "",
        f"| embeddings | bytes of weights | {' | '.join(heads)} | steps to AUC {reached['auc']:.4f} | step |",
        "| --- " * (len(heads) + 4) + "|",
    ]
    for size in summary["sizes"]:
        aucs = [f"{mean:.4f} ± {half:.4f}" for mean, half in size["auc"].values()]
        steps = [step for step in reached["steps"][str(size["compression"])] if step]
        if len(steps) == summary["seeds"]:
            to_target = f"{np.mean(steps):,.0f} in {np.mean(steps) * size['step_ms'][0] / 1e3:.1f} s"
        else:
            to_target = f"with {len(steps)} of {summary['seeds']} seeds" if steps else "never"
        cells = [size["point"], f"{4 * size['weights']:,}", *aucs, to_target, _milliseconds(size)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"| {COMPARED:,}x smaller | AUC after 1 pass | against the default | step |",
        "| --- " * 4 + "|",
    ]
    for i, variant in enumerate(summary["variants"]):
        auc = "{:.4f} ± {:.4f}".format(*variant["auc"])
        less = "{:+.4f} ± {:.4f}".format(*variant["less_default"]) if i else ""
        name = variant["point"] if i else DEFAULT
        lines.append(f"| {name} | {auc} | {less} | {_milliseconds(variant)} |")
    return "\n".join(lines)


def _milliseconds(described: dict) -> str:
    middle, low, high = described["step_ms"]
    return f"{middle:.2f} ms ({low:.2f}-{high:.2f})"


def plot(rows: Rows):
    """Test AUC against steps, steps to a given AUC against size, and the ways to hash."""
    source = "SYNTHETIC data" if where(rows, kind="best_auc") else "real data"
    seeds = len({row["seed"] for row in where(rows, kind="test_auc")})
    title = f"DLRM, {source}; bands and bars: 95% intervals over {seeds} seeds"
    figure, (first, whole, needed, hashes) = claim.figure(2, 2, title)
    points, best = sizes(rows), values(rows, "best_auc", sizes(rows)[1])

    colors = colormaps["viridis"](np.linspace(0, 0.9, len(points)))
    for color, name in zip(colors, points.values(), strict=True):
        steps, passes, auc = curve(rows, name)
        middle, half = np.array([mean_interval(at) for at in auc.T]).T
        for axes, shown in ((first, passes <= 1), (whole, passes > 0)):
            axes.plot(steps[shown], middle[shown], color=color, label=name)
            axes.fill_between(
                steps[shown], (middle - half)[shown], (middle + half)[shown], color=color, alpha=0.25
            )
    per_pass = steps[-1] / round(passes[-1])
    for axes, title in ((first, "the first pass"), (whole, f"{round(passes[-1])} passes over the same rows")):
        axes.set(xlabel="training steps", ylabel="test AUC", title=title)
        if best:
            axes.axhline(best[0], color="black", linestyle="--", linewidth=1, label="best possible")
    for end in range(1, round(passes[-1])):
        whole.axvline(end * per_pass, color="grey", linestyle=":", linewidth=1)
    first.legend(fontsize="small", title="compression", title_fontsize="small")

    for i, target in enumerate(steps_to_targets(rows)):
        label = f"{target['auc']:.4f}, after {target['passes']:g} of a pass"
        reached = [s if np.isfinite(s).all() else [np.nan] * len(s) for s in target["steps"].values()]
        middle, half = np.array([mean_interval(steps) for steps in reached]).T
        needed.errorbar(list(points), middle, half, color=f"C{i}", marker="o", capsize=3, label=label)
    needed.set(
        xscale="log", ylim=(0, 1.6 * needed.get_ylim()[1]), xlabel="compression", ylabel="training steps"
    )
    needed.set_title("steps to an AUC (no dot: not every seed gets there)")
    claim.ticks(needed, points)
    needed.legend(
        fontsize="small", title=f"AUC of the {points[1]}", title_fontsize="small", loc="upper right"
    )

    names = variants(rows)[::-1]
    middle, half = np.array([mean_interval(auc_after(rows, name, 1.0)) for name in names]).T
    hashes.errorbar(middle, range(len(names)), xerr=half, fmt="o", capsize=3, color="C0")
    hashes.set_yticks(range(len(names)), [*names[:-1], DEFAULT])
    hashes.set(xlabel="test AUC after the first pass", title=f"ways to hash, {COMPARED:,}x smaller")
    hashes.margins(y=0.15)
    hashes.locator_params(axis="x", nbins=5)
    return figure


def main() -> None:
    """Hold the claim against trainings, and write what the tables of docs/results.md are made of."""
    claim.told(StudyOptions, summarise, tables)


if __name__ == "__main__":
    main()
