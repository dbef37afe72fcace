"""Recipes: what the optimizer, passes, schedules, averages and a teacher are worth, at every size alike.

Claim: of the ways to train one model by itself, none is told to be better than that of `--recipe best`, which
is Adam over two passes, the second with a fresh embedding, and the mean of the weights at the end, at any of
these sizes: the full table, and a ROBE array in 3 bits of 10, 100 and 1,000 times fewer bytes. Two things are
known to gain and must be found to, or the study tells nothing: a second pass with a fresh embedding at 100
times fewer bytes, and a teacher, which is a full table trained first, at 1,000 times fewer.

The recipes are those of RECIPES: Adagrad over one pass, at a constant rate and with one that falls linearly
to 0; over two such passes, and with a rate that falls as a cosine over the last quarter; Adam, and Adam with
the L2 penalty of the embedding and the dropout of BARS (1e-5, 0.2), over two passes; and Adagrad over two
passes taught by a full table of the same seed that was trained so. Of each there is also the mean of the
weights over the last fifth of its last pass.

Conditions: the DLRM of the preset `small`; SYNTHETIC rows of a planted law with z-scored numbers, or the
rows given by --data. Each recipe has the learning rate, of its RATES, with the best validation AUC at 100
times fewer bytes, of a seed not used again. A seed draws initial weights, order of rows and hash, so points
of equal seeds are paired. Intervals and the number of seeds are those of equal_bytes.py: what --heat seeds
tell to be worse than the best of its size goes no further, and the others have --most.

    python analysis/recipes.py [--quick] [--data PREPARED] [--heat N] [--most N] [--jobs N]
                               [--recipes NAME...]

Trainings are kept in analysis/out/recipes, see analysis/trainings.py.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis import claim
from analysis.claim import Check, Rows, Verdict, conclude, where
from analysis.equal_bytes import FULL, ahead, auc_of, fitted, interval, ways_at
from analysis.trainings import RATES, TUNING_SEED, WIDTH, Study, StudyOptions, Trainings, seeded
from data_pipeline import batches
from robe.config import (
    ConfigError,
    EmbeddingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    resolve,
    to_json,
)
from robe.model import DLRM
from robe.run_folder import probabilities_of, teach
from robe.train import AVERAGED, versions

CACHE = claim.OUT / "recipes"
SIZES = (1, 10, 100, 1000)  # times fewer bytes than the full table has
TUNED_AT = 100
ARRAY = EmbeddingConfig(memory="int3")
ADAM_RATES = (0.0003, 0.001, 0.003)
LAST = 0.2  # of the last pass, whose weights are averaged
MEAN = ", averaged"


@dataclass(frozen=True)
class Recipe:
    """How to train.

    falls: share of all steps, at the end, over which the rate falls. taught: by a full table.
    """

    optimizer: dict[str, Any] = field(default_factory=lambda: {"optimizer": "adagrad"})
    model: dict[str, Any] = field(default_factory=dict)
    passes: int = 2
    falls: float = 0.0
    taught: bool = False

    def rates(self, study: "Sizes") -> tuple[float, ...]:
        return study.rates if self.optimizer["optimizer"] == "adagrad" else ADAM_RATES[-len(study.rates) :]


ONE_PASS, PLAIN, TAUGHT = "Adagrad, one pass", "Adagrad", "Adagrad, taught by the full table"
ADAM = "Adam"
BEST = ADAM + MEAN
RECIPES = {
    ONE_PASS: Recipe(passes=1),
    "Adagrad, one pass, linear decay": Recipe(
        {"optimizer": "adagrad", "schedule": "linear"}, passes=1, falls=1.0
    ),
    PLAIN: Recipe(),
    "Adagrad, cosine decay": Recipe({"optimizer": "adagrad", "schedule": "cosine"}, falls=0.25),
    ADAM: Recipe({"optimizer": "adam"}),
    "Adam, L2, dropout": Recipe({"optimizer": "adam", "embedding_l2": 1e-5}, {"dropout": 0.2}),
    TAUGHT: Recipe(taught=True),
}


@dataclass(frozen=True)
class Sizes(Study):
    """What to train; the defaults are the full study. heat, most: as of equal_bytes.Sizes."""

    heat: int = 4
    most: int = 8
    recipes: tuple[str, ...] = tuple(RECIPES)
    sizes: tuple[int, ...] = SIZES


QUICK = Sizes(
    rows=16_000,
    scale=0.02,
    heat=2,
    most=2,
    batch=320,
    rates=RATES[1:2],
    jobs=1,
    recipes=(ONE_PASS, ADAM, TAUGHT),
    sizes=(1, 100),
)


@dataclass(frozen=True)
class RecipesOptions(StudyOptions):
    heat: int | None = None
    """Seeds of all recipes, of which the clearly worse ones go no further."""

    most: int | None = None
    """Seeds of the others."""

    jobs: int | None = None
    """Trainings at a time, each on one core. Default: as many as there are cores."""

    recipes: tuple[str, ...] | None = None
    """What to compare, by the names in RECIPES. Default: all."""


class RecipeTrainings(Trainings):
    def config(self, name: str, size: int, rate: float, seed: int) -> TrainConfig:
        recipe, embedding = RECIPES[name], EmbeddingConfig("full")
        if size > 1:
            table = 4 * WIDTH * sum(self.spec.cardinalities)
            if (embedding := fitted(ARRAY, self.spec, table // size)) is None:
                raise ConfigError(f"{table // size:,} bytes: too few for an array; give data with more ids")
        steps = recipe.passes * self.steps_per_pass
        fall = {}
        if recipe.falls:
            last = int(recipe.falls * steps)
            fall = {"decay_start": steps - last, "decay_steps": last}
        return resolve(
            TrainConfig(
                model=ModelConfig(**recipe.model),
                embedding=seeded(embedding, seed),
                optimizer=OptimizerConfig(lr=rate, **recipe.optimizer, **fall),
                batch=self.batch,
                epochs=recipe.passes,
                seed=seed,
                eval_every=self.steps_per_pass,
                fresh_embeddings=recipe.passes > 1,
                average=1 - LAST / recipe.passes,
            )
        )

    def run(self, name: str, size: int, rate: float, seed: int, teachers: float) -> dict[str, dict]:
        """`""` and MEAN -> `validation` and `test` -> the scores of the last weights, and of their mean.

        teachers: the rate of the full table that teaches.
        """
        config, trainings = self.config(name, size, rate, seed), self
        if RECIPES[name].taught:
            config, trainings = self.taught(config, teachers, seed)
        found, _ = trainings.trained(config, f"{name}, {size:,}x, rate {rate:g}, seed {seed}")
        halves = {"validation": "test", "test": "validation"}  # which change names in Trainings
        weights = {"": found, MEAN: found[AVERAGED]}
        return {of: {half: kept[named] for half, named in halves.items()} for of, kept in weights.items()}

    def taught(self, config: TrainConfig, rate: float, seed: int) -> tuple[TrainConfig, Trainings]:
        """The same for rows that a full table teaches, which is trained where it is not kept yet."""
        teacher = self.config(PLAIN, 1, rate, seed)
        what = json.dumps([to_json(teacher), self.fingerprint])
        digest = hashlib.sha256(what.encode()).hexdigest()[:16]
        days = dict.fromkeys(day for day, *_ in self.manifest.split["train"])
        files = {day: self.cache / f"teacher_{digest}_{day}.npy" for day in days}

        def write(model: DLRM) -> dict:
            for day, path in files.items():
                for _ in teach(model, self.manifest, day, path):
                    pass
            return {}

        self.trained(teacher, f"teacher, rate {rate:g}, seed {seed}", write, teaches=True)
        trainings = copy.copy(self)
        probabilities = {
            day: probabilities_of(path, self.manifest.days[day].rows) for day, path in files.items()
        }
        trainings.rows = self.rows | {"train": batches.Rows(self.manifest, "train", taught=probabilities)}
        return resolve(replace(config, teacher=digest)), trainings


def measure(
    quick: bool = False,
    data: Path | None = None,
    heat: int | None = None,
    most: int | None = None,
    batch: int | None = None,
    jobs: int | None = None,
    recipes: tuple[str, ...] | None = None,
    study: Sizes | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> Rows:
    """Train what the cache lacks; a row is the scores of one training on the test half, or of its mean."""
    study = (study or (QUICK if quick else Sizes())).given(
        data=data, heat=heat, most=most, batch=batch, jobs=jobs, recipes=recipes
    )
    if unknown := [name for name in study.recipes if name not in RECIPES]:
        raise ConfigError(f"{unknown[0]!r} is no recipe of this study; there are {', '.join(RECIPES)}")
    trainings = RecipeTrainings.of(study, cache, say, dense="zscore")
    jobs = study.jobs or len(os.sched_getaffinity(0))
    rates = tuned(trainings, study, jobs)

    def of(points: Iterable[tuple[str, int]], seeds: Iterable[int]) -> Rows:
        each = [(*point, rates[point[0]], seed, rates[PLAIN]) for seed in seeds for point in points]
        return [
            {
                **{"way": name + weights, "compression": size, "rate": rate, "seed": seed},
                **{"auc": scores["test"]["auc"], "log_loss": scores["test"]["log_loss"]},
                **{"first_stage": seed <= TUNING_SEED + study.heat},
                **{"synthetic": bool(trainings.manifest.synthetic)},
            }
            for (name, size, rate, seed, _), found in zip(each, trainings.runs(each, jobs), strict=True)
            for weights, scores in found.items()
        ]

    names = dict.fromkeys((*study.recipes, PLAIN, ADAM))
    points = [(name, size) for size in study.sizes for name in names if size > 1 or not RECIPES[name].taught]
    heats = range(TUNING_SEED + 1, TUNING_SEED + 1 + study.heat)
    rows = of(points, heats)
    go_on = [
        (name, size)
        for name, size in points
        if name in (PLAIN, ADAM) or {name, name + MEAN} & {*ahead(rows, size)}
    ]
    return rows + of(go_on, range(heats.stop, TUNING_SEED + 1 + study.most))


def tuned(trainings: RecipeTrainings, study: Sizes, jobs: int) -> dict[str, float]:
    """Recipe -> its rate of the best validation AUC at TUNED_AT; what a table teaches has that of PLAIN."""
    names = [name for name in dict.fromkeys((*study.recipes, PLAIN, ADAM)) if not RECIPES[name].taught]
    rates = {name: RECIPES[name].rates(study) for name in names}
    each = [
        (name, TUNED_AT, rate, TUNING_SEED, 0.0)
        for name in names
        for rate in rates[name]
        if len(rates[name]) > 1
    ]
    found = zip(each, trainings.runs(each, jobs), strict=True)
    auc = {(name, rate): scores[""]["validation"]["auc"] for (name, _, rate, *_), scores in found}
    best = {name: max(rates[name], key=lambda rate: auc.get((name, rate), 0)) for name in names}
    return {TAUGHT: best[PLAIN], **best}


def alone(way: str) -> bool:
    """Whether a way trains one model by itself."""
    return not RECIPES[way.removesuffix(MEAN)].taught


def verdict(rows: Rows) -> Verdict:
    """Where an interval is too wide to tell a known gain, the check must only not be refuted."""
    checks = []
    for size in dict.fromkeys(row["compression"] for row in rows):
        others = [way for way in ways_at(rows, size) if way != BEST and alone(way)]
        gains = {way: interval(rows, (way, size), (BEST, size)) for way in others}
        checks.append(
            Check(
                f"best: at {label(size)}, no other recipe is better than {BEST}",
                all(mean - half <= 0 for mean, half in gains.values()),
                ", ".join(f"{way} {mean:+.4f} ± {half:.4f}" for way, (mean, half) in gains.items()),
            )
        )
    for what, way, against, size in (
        ("a second pass with a fresh embedding gains", PLAIN, ONE_PASS, 100),
        ("a teacher gains", TAUGHT, PLAIN, 1000),
    ):
        if {way, against} <= {*ways_at(rows, size)}:
            mean, half = interval(rows, (way, size), (against, size))
            found = f"{mean:+.4f} ± {half:.4f}"
            checks.append(Check(f"known: {what} at {size:,}x", mean > half or half > 0.001, found))
    return conclude(checks)


def label(size: int) -> str:
    return FULL if size == 1 else f"{size:,}x"


def summarise(rows: Rows) -> dict:
    """The figures of the study, few enough to keep: the table is made of them."""

    def describe(way: str, size: int) -> dict:
        found = where(rows, way=way, compression=size)
        kept = {key: found[0][key] for key in ("way", "compression", "rate")}
        kept |= {"seeds": len(found), "auc": claim.mean_interval(auc_of(rows, (way, size)))}
        kept["log_loss"] = float(np.mean([row["log_loss"] for row in found]))
        return kept if way == BEST else kept | {"less": interval(rows, (way, size), (BEST, size))}

    points = dict.fromkeys((row["way"], row["compression"]) for row in rows)
    return {
        "synthetic": rows[0]["synthetic"],
        "points": [describe(*point) for point in points],
        "checks": verdict(rows).checks,
        "versions": versions(),
    }


def table(summary: dict) -> str:
    """A line for each recipe, a column for each size: AUC, and by how much it is above that of BEST, bold
    where that is a gain."""
    points = {(point["way"], point["compression"]): point for point in summary["points"]}
    ways, sizes = (list(dict.fromkeys(key)) for key in zip(*points, strict=True))

    def cell(way: str, size: int) -> str:
        if (point := points.get((way, size))) is None:
            return ""
        auc = "{:.4f} ± {:.4f}".format(*point["auc"])
        if "less" not in point:
            return f"{auc} ({point['seeds']} seeds)"
        mean, half = point["less"]
        less = f"{mean:+.4f} ± {half:.4f}"
        return f"{point['auc'][0]:.4f}, {f'**{less}**' if mean > half else less}"

    source = "SYNTHETIC rows" if summary["synthetic"] else "Real rows"
    ways.sort(key=lambda way: way != BEST)
    heads = ["recipe", "rate", *(label(size) for size in sizes)]
    lines = [f"{source}; test AUC, and the difference from the first, of equal seeds.", ""]
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    rates = {way: point["rate"] for (way, _), point in points.items()}
    lines += [f"| {' | '.join([w, f'{rates[w]:g}', *(cell(w, size) for size in sizes)])} |" for w in ways]
    return "\n".join(lines)


def plot(rows: Rows):
    summary = summarise(rows)
    source = "SYNTHETIC data" if summary["synthetic"] else "real data"
    sizes = list(dict.fromkeys(point["compression"] for point in summary["points"]))
    figure, axes = claim.figure(1, len(sizes), f"Recipes against {BEST}, {source}, 95% intervals")
    ways = [way for way in dict.fromkeys(point["way"] for point in summary["points"]) if way != BEST]
    for ax, size in zip(axes, sizes, strict=True):
        found = [point for point in where(summary["points"], compression=size) if "less" in point]
        middle, half = np.array([point["less"] for point in found]).T
        at = [ways.index(point["way"]) for point in found]
        ax.errorbar(middle, at, xerr=half, fmt="o", capsize=3)
        ax.axvline(0, color="black", linewidth=1)
        ax.set_yticks(range(len(ways)), ways if size == sizes[0] else [""] * len(ways))
        ax.set(xlabel="test AUC less that of the best", title=label(size))
        ax.locator_params(axis="x", nbins=5)
    return figure


def main() -> None:
    """Hold the claim against trainings, and write what its table is made of."""
    claim.told(RecipesOptions, summarise, table)


if __name__ == "__main__":
    main()
