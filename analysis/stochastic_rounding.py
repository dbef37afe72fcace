"""Rounding at random keeps the steps that rounding to the nearest loses.

Claims (our derivation), for the table of mixed_precision (robe/embeddings/mixed_precision.py), and for ROBE
arrays whose codes are trained with no weights behind them (--master none, robe/kernels/code_step.py):

1. One weight. It lies on a grid of width h, takes N steps of s, 0 < s < h, and is rounded after each. To the
   nearest it moves by N h where s >= h/2, and never where s < h/2, however large N. At random it goes up by h
   with the chance p = s / h each time, whatever came before, so it moves by h times a binomial number: its
   mean is N s, and its variance N p (1 - p) h^2 = N s (h - s).
2. Training. What is lost is worth AUC: at INT4 and at INT8 a DLRM whose rows are rounded at random ends above
   the same rounded to the nearest, with every seed, and more so at INT4, whose grid is 17 times as wide.
3. Arrays. An array in INT8 alone that is rounded at random loses less than MARGIN of AUC, with 95%
   confidence, against one of float32 with as many weights that is stepped alike: by Adagrad with one sum for
   a group (--optimizer rowwise_adagrad). To the nearest it ends below. INT4 alone loses more than MARGIN.
   What one sum for a group costs, against one for a weight, is printed beside it.

Conditions: of the first, that the ends of the row stay, and with them its scale and bias, and that the weight
begins on the grid. In training neither holds, but there too each rounding is right on average, given all
before, with a variance of h^2 / 4 at most. Of the second: preset `small` without a cache, so that every step
is rounded; its own optimizer, Adagrad at 0.03; SYNTHETIC rows of the default law, or those given by --data.
The full table's Adagrad counts by element, this method's by row, so these differ by more than rounding; with
--optimizer sgd, at the rate 1, they do not, but there trainings stray more from seed to seed, and five seeds
need not tell the two ways to round at INT8. Intervals are Student's, 95%, over the seeds, of differences
between trainings with equal seeds; these draw the first weights and the order of the rows.

Measured: `quantise` and `cached_gather`, as an update rounds and a look-up reads, in 4, 8 and 16 bits (of
halves h = 2^-10 from 1 on); and trainings, which are kept in analysis/out/stochastic_rounding, see
analysis/trainings.py. Wrong formulas must be rejected, and so must points whose names were mixed up.

    python analysis/stochastic_rounding.py [--quick] [--data PREPARED] [--optimizer sgd] [--seeds N]
        [--passes N] [--batch N]
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from analysis import claim
from analysis.claim import RIGHT, WRONG, Check, mean_interval, where
from analysis.sketch import trials
from analysis.trainings import Study, StudyOptions, Trainings, curve
from robe.backend import select
from robe.config import EmbeddingConfig, OptimizerConfig, TrainConfig, resolve
from robe.kernels.parts.cache import EMPTY, WAYS
from robe.kernels.parts.codes import Form, row_bytes
from robe.kernels.parts.half import rounding_key

CACHE = claim.OUT / "stochastic_rounding"
STUDY = Study(rows=1_000_000, scale=0.02, zipf=1.2, decay=0.5, seeds=5, passes=1)
FINER = 4  # times as many seeds have the points of FINE
QUICK = dataclasses.replace(STUDY, rows=40_000, scale=0.0003, seeds=4, batch=128, jobs=1)
MARGIN = 0.0005  # of AUC
RATES = {"adagrad": 0.03, "sgd": 1.0}
EVALUATIONS = 10  # per pass

# Steps as shares of h -> how many are taken: so few that a weight stays among the 15 codes above the first.
STEPS = {1 / 16: 40, 1 / 4: 10, 7 / 16: 6, 5 / 8: 4}
WIDTH = 64
GRID, BIAS = 2.0**-6, -1.5  # of INT8 and INT4; halves hold them, and float32 all sums of steps
HALVES, FIRST_HALF = 2.0**-10, 1.0
ROUNDINGS = ("stochastic", "nearest")
FULL, ARRAY = "full table", "array"
GROUPED = f"{ARRAY}, a sum for a group"
COMPRESSION = 100  # of the arrays
# Between these the differences are small.
FINE = (ARRAY, GROUPED, *(f"{ARRAY}, INT8 {rounding}" for rounding in ROUNDINGS))


def bound(steps: int, step: float, grid: float, rounding: str) -> tuple[float, float]:
    """Mean and variance of how far a weight has moved."""
    if rounding == "nearest":
        return steps * grid * np.floor(step / grid + 0.5), 0.0
    return steps * step, steps * step * (grid - step)


# Name -> the wrong formula, and a case in which it must show.
WRONG_FORMULAS = {
    "steps are lost as to the nearest": (
        lambda n, s, h: (0.0, n * s * (h - s)),
        {"rounding": "stochastic", "share": 1 / 16},
    ),
    "each rounding adds h^2 / 12": (
        lambda n, s, h: (n * s, n * h**2 / 12),
        {"rounding": "stochastic", "share": 1 / 16},
    ),
    "scale = range / 2^bits": (
        lambda n, s, h: (n * s, n * s * (h * 255 / 256 - s)),
        {"rounding": "stochastic", "share": 7 / 16, "bits": 8, "steps": 1},
    ),
    "steps add up to the nearest": (
        lambda n, s, h: (n * s, 0.0),
        {"rounding": "nearest"},
    ),
}


def measure(
    quick: bool = False,
    seed: int = 0,
    data: Path | None = None,
    optimizer: Literal["adagrad", "sgd"] = "adagrad",
    seeds: int | None = None,
    passes: int | None = None,
    batch: int | None = None,
    study: Study | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> claim.Rows:
    """Rows of two kinds: moved, of weights, and test_auc, of trainings, after `step` steps.

    quick: INT4 only is trained, and no array. seed: of the weights' roundings; data, seeds, passes and batch
    replace what the study says.
    """
    study = study or (QUICK if quick else STUDY)
    study = study.given(data=data, seeds=seeds, passes=passes, batch=batch)
    trained = list(trainings(study, optimizer, (4,) if quick else (8, 4), cache, say))
    return [*moves(2**11 if quick else 2**14, seed), *trained]


def moves(rows: int, seed: int) -> Iterator[dict]:
    """How far weights have moved after each step: a row for the right formula, and for each wrong one."""
    for bits in (4, 8, 16):
        grid = HALVES if bits == 16 else GRID
        for share, most in STEPS.items():
            for rounding in ROUNDINGS:
                form, draws = Form(bits, rounding == "stochastic", WIDTH), int(trials(seed, 1, bits, most)[0])
                for steps, moved, stays in stepped(form, grid, share * grid, most, rows, draws):
                    columns = {"kind": "moved", "bits": bits, "share": share, "rounding": rounding}
                    columns |= {"steps": steps, "grid": grid, "ends_stay": stays}
                    yield from compare(columns, moved)


def stepped(form: Form, grid: float, step: float, most: int, rows: int, seed: int):
    """(steps taken, how far each weight has moved (N,), whether all ends stayed), step by step."""
    kernels, numbers = select("cpu").kernels, np.arange(rows, dtype=np.uint32)
    table = np.zeros((rows, row_bytes(form)), np.uint8)
    nobody, nothing = np.full((0, WAYS), EMPTY), np.zeros((0, form.width), np.float32)
    first = FIRST_HALF if form.bits == 16 else BIAS
    vectors = np.full((rows, 1, form.width), first, np.float32)
    if form.bits < 16:
        vectors[:, :, -1] += grid * (2**form.bits - 1)
    ends = vectors[:, 0, [0, -1]].copy()
    for taken in range(most + 1):
        if taken:
            vectors[:, :, 1:-1] += np.float32(step)
        key = rounding_key(seed, taken)
        kernels.quantise(vectors[:, 0], numbers, key, form, table)
        kernels.cached_gather(table, form, nobody, nothing, numbers[:, None], np.zeros(1, np.uint64), vectors)
        if taken:
            moved = vectors[:, 0, 1:-1].ravel() - np.float64(first)
            yield taken, moved, bool((vectors[:, 0, [0, -1]] == ends).all())


def compare(columns: dict, moved: np.ndarray) -> Iterator[dict]:
    steps, grid = columns["steps"], columns["grid"]
    step = columns["share"] * grid
    formulas = {"right": bound(steps, step, grid, columns["rounding"])} | {
        name: formula(steps, step, grid)
        for name, (formula, case) in WRONG_FORMULAS.items()
        if case.items() <= columns.items()
    }
    for name, (mean, variance) in formulas.items():
        squares = (moved - mean) ** 2
        yield columns | {
            "formula": name,
            "mean_formula": mean / grid,
            "deviation_formula": variance**0.5 / grid,
            "mean": float(moved.mean() / grid),
            "deviation": float(moved.std() / grid),
            "z_mean": claim.z_mean(moved / grid, mean / grid),
            "z_variance": claim.z_mean(squares / grid**2, variance / grid**2),
        }


def points(bits: tuple[int, ...]) -> dict[str, EmbeddingConfig]:
    found = {FULL: EmbeddingConfig("full")}
    for b in bits:
        for rounding in ROUNDINGS:
            embedding = EmbeddingConfig("mixed_precision", bits=b, cache=0.0, rounding=rounding)
            found[name_of(b, rounding)] = embedding
    if 8 not in bits:
        return found
    array = EmbeddingConfig("robe", compression=COMPRESSION)
    found |= {ARRAY: array, GROUPED: array}
    for b in bits:
        for rounding in ROUNDINGS:
            alone = dataclasses.replace(array, memory=f"int{b}", master="none", rounding=rounding)
            found[f"{ARRAY}, {name_of(b, rounding)}"] = alone
    return found


def name_of(bits: int, rounding: str) -> str:
    return f"INT{bits} {rounding}"


class RoundedTrainings(Trainings):
    def run(
        self, point: str, embedding: EmbeddingConfig, optimizer: str, seed: int, passes: int
    ) -> list[dict]:
        """The evaluations on the way."""
        rate = RATES["sgd" if optimizer == "sgd" else "adagrad"]
        config = TrainConfig(
            embedding=embedding,
            optimizer=OptimizerConfig(optimizer, rate),
            batch=self.batch,
            epochs=passes,
            seed=seed,
            eval_every=max(1, self.steps_per_pass // EVALUATIONS),
            checkpoint_every=self.steps_per_pass,
        )
        return self.trained(resolve(config), f"{point}, seed {seed}")[1]


def trainings(study: Study, optimizer: str, bits: tuple[int, ...], cache: Path, say: Callable[[str], None]):
    """Rows of the test AUC on the way, point by point and seed by seed."""
    made = RoundedTrainings.of(study, cache, say)
    tasks = [
        (point, embedding, "rowwise_adagrad" if point == GROUPED else optimizer, seed, study.passes)
        for point, embedding in points(bits).items()
        if point != GROUPED or optimizer == "adagrad"
        for seed in range(1, study.seeds * (FINER if point in FINE else 1) + 1)
    ]
    jobs = study.jobs or len(os.sched_getaffinity(0))
    for (point, _, _, seed, _), log in zip(tasks, made.runs(tasks, jobs), strict=True):
        for e in log:
            row = {"kind": "test_auc", "synthetic": bool(made.manifest.synthetic), "point": point}
            row |= {"seed": seed, "step": e["step"], "passes": e["step"] / made.steps_per_pass}
            yield row | {"value": e["auc"]}


def final(rows: claim.Rows) -> dict[str, np.ndarray]:
    """Point -> test AUC at the end (seeds,)."""
    return {
        point: curve(rows, point)[2][:, -1]
        for point in dict.fromkeys(row["point"] for row in where(rows, kind="test_auc"))
    }


def beats(better: np.ndarray, worse: np.ndarray) -> bool:
    """With every seed, and by more than the interval."""
    mean, half = mean_interval(better - worse)
    return bool((better > worse).all() and mean > half)


def verdict(rows: claim.Rows) -> claim.Verdict:
    return claim.conclude(checks(rows))


def checks(rows: claim.Rows) -> Iterator[Check]:
    right = where(rows, kind="moved", formula="right")
    yield Check("scale and bias stay", all(row["ends_stay"] for row in right), f"{len(right)} cases")
    for bits in (4, 8, 16):
        some = where(right, bits=bits, rounding="stochastic")
        worst = max(max(abs(row["z_mean"]), abs(row["z_variance"])) for row in some)
        what = f"{bits} bits at random: mean N s, variance N s (h - s), |z| < {RIGHT:g}"
        yield Check(what, worst < RIGHT, f"worst {worst:.2f}")
        some = where(right, bits=bits, rounding="nearest")
        off = [row for row in some if (row["mean"], row["deviation"]) != (row["mean_formula"], 0.0)]
        what = f"{bits} bits to the nearest: not a step below h/2 counts, and those above as h"
        yield Check(what, not off, f"{len(off)} of {len(some)} differ")
    for name in WRONG_FORMULAS:
        wrong = where(rows, kind="moved", formula=name)
        z = min(max(abs(row["z_mean"]), abs(row["z_variance"])) for row in wrong)
        yield Check(f"rejected: {name}", z > WRONG, f"|z| at least {z:.0f}")

    auc = final(rows)
    gaps = {}
    for bits in (8, 4):
        if name_of(bits, "nearest") not in auc:
            continue
        random, nearest = (auc[name_of(bits, rounding)] for rounding in ROUNDINGS)
        gaps[bits] = random - nearest
        mean, half = mean_interval(gaps[bits])
        left = "{:+.4f} ± {:.4f}".format(*mean_interval(random - auc[FULL]))
        found = f"AUC {mean:+.4f} ± {half:.4f}, least {gaps[bits].min():+.4f}; against the full table {left}"
        what = f"INT{bits} rounded at random beats the nearest with all {random.size} seeds"
        yield Check(what, beats(random, nearest), found)
        mixed_up = np.arange(random.size) % 2 == 0
        swapped = np.where(mixed_up, nearest, random), np.where(mixed_up, random, nearest)
        mean, half = mean_interval(swapped[0] - swapped[1])
        what = f"rejected: the same of INT{bits} with its names mixed up"
        yield Check(what, not beats(*swapped), f"AUC {mean:+.4f} ± {half:.4f}")
    if ARRAY in auc:
        yield from checks_of_arrays(auc)
    if len(gaps) == 2:
        mean, half = mean_interval(gaps[4] - gaps[8])
        yield Check("it matters more at INT4", mean > half, f"AUC {mean:+.4f} ± {half:.4f} more")


def checks_of_arrays(auc: dict[str, np.ndarray]) -> Iterator[Check]:
    alike = auc.get(GROUPED, auc[ARRAY])
    if GROUPED in auc:
        mean, half = mean_interval(alike - auc[ARRAY])
        what = "an array whose Adagrad has one sum for a group is not told to gain against one for a weight"
        yield Check(what, mean - half <= 0, f"AUC {mean:+.4f} ± {half:.4f}")
    for bits in (8, 4):
        random, nearest = (auc[f"{ARRAY}, {name_of(bits, rounding)}"] for rounding in ROUNDINGS)
        mean, half = mean_interval(random - alike[: random.size])
        found, what = f"AUC {mean:+.4f} ± {half:.4f}", f"array in INT{bits} alone loses less than {MARGIN:g}"
        if bits == 4:
            yield Check(f"rejected: an {what}", mean + half < -MARGIN, found)
            continue
        yield Check(f"an {what}, stepped alike", mean - half > -MARGIN, found)
        mean, half = mean_interval(random - nearest)
        what = f"an array in INT{bits} alone that is rounded at random beats the nearest"
        yield Check(what, mean > half, f"AUC {mean:+.4f} ± {half:.4f}, {random.size} seeds")


def plot(rows: claim.Rows):
    figure, (path, training) = claim.figure(1, 2, "Rounding at random and to the nearest")
    shown = where(rows, kind="moved", formula="right", bits=8, share=min(STEPS))
    for rounding, color in zip(ROUNDINGS, ("C0", "C3"), strict=True):
        some = where(shown, rounding=rounding)
        steps = np.array([row["steps"] for row in some])
        mean, deviation = (
            np.array([row[f"{name}_formula"] for row in some]) for name in ("mean", "deviation")
        )
        path.plot(steps, mean, color, label=f"{rounding}, theory")
        if rounding == "stochastic":
            path.fill_between(steps, mean - 2 * deviation, mean + 2 * deviation, color=color, alpha=0.2)
        found = [[row[name] for row in some[3::6]] for name in ("mean", "deviation")]
        path.errorbar(steps[3::6], found[0], 2 * np.array(found[1]), color=color, fmt="o", capsize=3)
    path.plot([], [], "ko", label="measured, ± 2 deviations of a weight")
    path.set(xlabel=f"steps of h / {1 / min(STEPS):g}", ylabel="moved, in units of the grid h")
    path.set_title("one weight (INT8)")

    colors = {FULL: "k", ARRAY: "C7", GROUPED: "C5"}
    for before, chosen in (("", ("C0", "C1")), (f"{ARRAY}, ", ("C2", "C4"))):
        colors |= {
            f"{before}{name_of(b, r)}": c for b, c in zip((8, 4), chosen, strict=True) for r in ROUNDINGS
        }
    for point in final(rows):
        steps, _, curves = curve(rows, point)
        middle, half = np.array([mean_interval(at) for at in curves.T]).T
        style = "--" if point.endswith("nearest") else "-"
        training.plot(steps, middle, style, color=colors[point], label=point)
        training.fill_between(steps, middle - half, middle + half, color=colors[point], alpha=0.15)
    source = "SYNTHETIC data" if where(rows, kind="test_auc")[0]["synthetic"] else "real data"
    training.set(xlabel="training steps", ylabel="test AUC")
    training.set_title(f"Tables without a cache, and arrays, {source}, 95%")
    path.legend(fontsize="small")
    training.legend(fontsize="x-small", loc="lower right", ncols=2)
    return figure


@dataclass(frozen=True)
class Options(StudyOptions):
    seed: int = 0
    """Of the weights' roundings."""

    optimizer: Literal["adagrad", "sgd"] = "adagrad"
    """Of the trainings."""


if __name__ == "__main__":
    claim.main(Options)
