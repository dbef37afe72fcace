"""Quality at equal stored bytes: what each way to store embeddings makes of the same few bytes.

Claim:

1. few bits: at 100 and at 1,000 times fewer bytes than the float32 table has, a ROBE array of few-bit
   weights, trained in so few bits or rounded after training, is better than one of float32 weights, by at
   least 0.002 and 0.01 of AUC.
2. rivals: at neither size any other way is better than the best few-bit array.
3. whole: at 100 times fewer bytes that array is within 0.001 of what the full table comes to.

Equal are the bytes that are kept to serve: weights, or codes with their scales and biases, and the
dictionary (4 bytes an id) of those ways that number the rows of tables. A second figure is what training
needs of memory: master weights, gradients and sums besides.

Conditions: the DLRM of the preset `small`, Adagrad, each pass but the first with a fresh embedding;
SYNTHETIC rows of a planted law with z-scored numbers, or the rows given by --data. Every way has its rate
tuned alike: of RATES the one with the best validation AUC at 100 times fewer bytes, with a seed that is not
used again. A seed draws initial weights, order of rows and hash, so points of equal seeds are paired; the
rows are always the same, so other data may differ by more.

How many seeds there are: all ways have --heat of them. At the sizes of the claims those go on that these do
not tell to be worse than the best of their size, and the float32 array. They have --seeds, which tell the
deviation s of each difference from that array. By Stein's rule (1945) there are then as many as make
t s / sqrt(n) no larger than --resolution, where t is Student's for --seeds, but no more than --most. So an
interval has its 95%, whatever s is; it is over the seeds that both ways have.

    python analysis/equal_bytes.py [--quick] [--data PREPARED] [--heat N] [--seeds N] [--most N]
                                   [--resolution X] [--jobs N] [--ways WAY...] [--compressions X...]

Trainings are kept in analysis/out/equal_bytes, see analysis/trainings.py; whoever stops the study and starts
it again loses at most one of them.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from scipy import stats

from analysis import claim, product_quantisation, pruned_rows
from analysis.claim import Check, Rows, Verdict, conclude, where
from analysis.trainings import (
    RATES,
    TUNING_SEED,
    WIDTH,
    Study,
    StudyOptions,
    Trainings,
    seeded,
)
from robe.config import (
    METHODS,
    NUMBERED,
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    OptimizerConfig,
    TrainConfig,
    resolve,
)
from robe.convert import convert_embedding
from robe.embeddings import planned_bytes
from robe.metrics import summary as scores
from robe.model import DLRM, build
from robe.train import predict, versions

CACHE = claim.OUT / "equal_bytes"
COMPRESSIONS = (10, 100, 1000, 10000)
TUNED_AT = 100
GAINS = {100: 0.002, 1000: 0.01}  # of the best few-bit array over float32, at least
WITHIN = 0.001  # of the full table's best, at 100x
LEVEL = 0.95
ID = 4  # bytes of an entry of a dictionary

FLOAT = "ROBE"
WAYS = {
    FLOAT: EmbeddingConfig(),
    **{f"ROBE in {bits} bits": EmbeddingConfig(memory=f"int{bits}") for bits in (8, 4, 3, 2, 1)},
    "exact rows and ROBE": EmbeddingConfig("hot"),
    "exact rows and ROBE in 3 bits": EmbeddingConfig("hot", memory="int3"),
    "exact rows and ROBE, online": EmbeddingConfig("hot", online=True),
    "hashing": EmbeddingConfig("hashing"),
    "compositional": EmbeddingConfig("compositional"),
    "CAFE": EmbeddingConfig("cafe"),
    "AdaEmbed": EmbeddingConfig("adaembed"),
    "quotient-remainder": EmbeddingConfig("quotient_remainder"),
    "tensor train": EmbeddingConfig("tensor_train"),
    # Each id has an entry of the dictionary, and a weight at least, or an index: these end at 8 times fewer
    # bytes, or at 10.
    "mixed dimension": EmbeddingConfig("mixed_dimension"),
    "low dimension": EmbeddingConfig("mixed_dimension", alpha=0.0),
    "CCE": EmbeddingConfig("cce"),
    "CCE in two chunks": EmbeddingConfig("cce", chunks=2),
}
# Trained in float32, and stored in these bits by `convert`.
AFTERWARDS = {
    f"{name}, {bits} bits after training": (name, bits)
    for name, widths in ((FLOAT, (8, 4, 3)), ("hashing", (8, 4)))
    for bits in widths
}
FEW_BITS = tuple(name for name in (*WAYS, *AFTERWARDS) if FLOAT in name and "bits" in name)
FULL = "full table"
QUANTISED = f"{FULL}, product quantisation after training"
PRUNED = f"{FULL}, pruned in training"


@dataclass(frozen=True)
class Sizes(Study):
    """What to train; the defaults are the full study.

    heat: seeds of all ways. seeds: of those that go on, at first. most: in the end.
    resolution: half the interval to come to.
    """

    heat: int = 4
    seeds: int = 8
    passes: int = 2
    most: int = 16
    resolution: float = 0.0005
    ways: tuple[str, ...] = (*WAYS, *AFTERWARDS, QUANTISED, PRUNED)
    compressions: tuple[int, ...] = COMPRESSIONS


QUICK = Sizes(
    rows=16_000,
    scale=0.02,
    heat=3,
    seeds=3,
    passes=1,
    batch=320,
    rates=(0.03,),
    most=3,
    ways=(FLOAT, "ROBE in 4 bits", "hashing"),
    compressions=(100,),
    jobs=1,
)


@dataclass(frozen=True)
class EqualBytesOptions(StudyOptions):
    heat: int | None = None
    """Seeds of all ways, of which the clearly worse ones go no further."""

    most: int | None = None
    """Seeds at most, however wide the intervals are."""

    resolution: float | None = None
    """Half the interval that differences in AUC are to be told to."""

    jobs: int | None = None
    """Trainings at a time, each on one core. Default: as many as there are cores."""

    ways: tuple[str, ...] | None = None
    """What to compare, by the names in WAYS and AFTERWARDS. Default: all."""

    compressions: tuple[int, ...] | None = None
    """How many times fewer bytes than the full table's. Default: 10, 100, 1000 and 10000."""


@dataclass(frozen=True)
class Point:
    """A way at a size.

    bits: the embedding is trained as it stands, and stored in so many; parts: or by product quantisation of
    so many parts. share: of the bytes of full tables, to which they are pruned while they are trained.
    """

    way: str
    compression: int
    embedding: EmbeddingConfig
    bits: int | None = None
    parts: int | None = None
    share: float | None = None

    @property
    def name(self) -> str:
        return f"{self.way}, {self.compression:,}x"

    def stored(self) -> EmbeddingConfig:
        """The embedding that is kept to serve."""
        return dataclasses.replace(self.embedding, memory=f"int{self.bits}") if self.bits else self.embedding

    def stored_bytes(self, spec: DataSpec) -> int:
        """What is kept to serve."""
        rows = sum(spec.cardinalities)
        if self.parts:
            tables = [product_quantisation.stored_bytes(n, WIDTH, self.parts) for n in spec.cardinalities]
            return sum(tables) + ID * rows
        if self.share:
            chunks = pruned_rows.most_chunks(rows, self.share)
            return pruned_rows.stored_bytes(rows, chunks) + ID * rows
        return stored_bytes(self.stored(), spec)


def stored_bytes(embedding: EmbeddingConfig, spec: DataSpec) -> int:
    """What is kept to serve: the arrays of an embedding that is not trained, and the dictionary it needs."""
    config = resolve(TrainConfig(embedding=embedding, optimizer=OptimizerConfig("none")))
    by_count = embedding.method == "hot" and spec.dialect == "dictionary" and not embedding.online
    ids = ID * sum(spec.cardinalities) if by_count or embedding.method in NUMBERED else 0
    return sum(planned_bytes(config, spec).values()) + ids


def fitted(embedding: EmbeddingConfig, spec: DataSpec, size: int) -> EmbeddingConfig | None:
    """The embedding with the most weights that is stored in so many bytes; None if there is none."""

    def bytes_of(weights: int) -> int | None:
        try:
            return stored_bytes(dataclasses.replace(embedding, weights=weights), spec)
        except ConfigError:  # too few for the method
            return None

    low, high = 1, 8 * size + 1  # a weight takes a bit or more
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (bytes_of(middle) or 0) <= size else (low, middle)
    found = bytes_of(low)
    return None if found is None or found > size else dataclasses.replace(embedding, weights=low)


def plan(study: Sizes, spec: DataSpec) -> Iterator[Point]:
    """The points of a study: the full table, then each way at each size that can be so small."""
    if unknown := [way for way in study.ways if way not in Sizes.ways]:
        raise ConfigError(f"{unknown[0]!r} is no way of this study; there are {', '.join(Sizes.ways)}")
    if study.heat < 2:
        raise ConfigError(f"{study.heat} seeds in the heat: an interval needs 2")
    full = EmbeddingConfig("full")
    table = 4 * WIDTH * sum(spec.cardinalities)
    if spec.dialect in METHODS["full"].ids:
        yield Point(FULL, 1, full)
    for compression in study.compressions:
        for way in study.ways:
            if way in (QUANTISED, PRUNED):
                yield from smaller_tables(Point(way, compression, full), spec, table // compression)
                continue
            trained, bits = AFTERWARDS.get(way, (way, None))
            embedding = WAYS[trained]
            if spec.dialect not in METHODS[embedding.method].ids:
                continue
            point = Point(way, compression, embedding, bits)
            if found := fitted(point.stored(), spec, table // compression):
                yield dataclasses.replace(
                    point, embedding=dataclasses.replace(found, memory=embedding.memory)
                )


def smaller_tables(point: Point, spec: DataSpec, size: int) -> Iterator[Point]:
    """A point of full tables in as many parts, or pruned to as large a share, as fit a size, if any do."""
    if spec.dialect not in METHODS["full"].ids:
        return
    rows = sum(spec.cardinalities)
    if point.way == PRUNED:
        share = max(0, size - ID * rows) / (rows * WIDTH * 4)
        choices = [dataclasses.replace(point, share=share)] if pruned_rows.most_chunks(rows, share) else []
    else:
        parts = [n for n in range(1, WIDTH + 1) if WIDTH % n == 0]
        choices = [dataclasses.replace(point, parts=n) for n in parts]
    yield from [choice for choice in choices if choice.stored_bytes(spec) <= size][-1:]


class PointTrainings(Trainings):
    """Those of the points of a study."""

    def config(self, point: Point, rate: float, seed: int, passes: int) -> TrainConfig:
        return resolve(
            TrainConfig(
                embedding=seeded(point.embedding, seed),
                optimizer=OptimizerConfig("adagrad", rate),
                batch=self.batch,
                epochs=passes,
                seed=seed,
                eval_every=self.steps_per_pass,
                fresh_embeddings=passes > 1,
            )
        )

    def made(self, config: TrainConfig, **also: Any) -> DLRM:
        if share := also.get("share"):
            return pruned_rows.pruned_model(config, self.spec, self.backend, pruned_rows.UTILITY, share)
        return super().made(config)

    def run(self, point: Point, rate: float, seed: int, passes: int) -> dict[str, dict[str, float]]:
        """`validation` and `test` -> the scores of what is kept to serve, after the last pass."""
        config = self.config(point, rate, seed, passes)

        def found(model: DLRM) -> dict:
            if point.bits:
                stored = dataclasses.replace(config.embedding, memory=point.stored().memory)
                kept = dataclasses.replace(config, embedding=stored, optimizer=OptimizerConfig("none"))
                served = build(resolve(kept), self.spec, self.backend)
                served.dense_parameters[...] = model.dense_parameters
                convert_embedding(model.embedding, served.embedding, self.spec)
                model = served
            if point.parts:
                product_quantisation.quantise(model.embedding, self.spec, point.parts, seed)
            halves = {"validation": "test", "test": "validation"}  # which change names in Trainings
            return {"scores": {half: scores(*predict(model, self.rows[of])) for half, of in halves.items()}}

        name = f"{point.name}, rate {rate}, seed {seed}"
        also = {"share": point.share} if point.share else {"stored": point.parts or point.stored().memory}
        summary, _ = self.trained(config, name, found, **also)
        return summary["scores"]

    def sizes(self, point: Point) -> dict[str, int]:
        config = self.config(point, RATES[0], TUNING_SEED, 1)
        return {
            "stored_bytes": point.stored_bytes(self.spec),
            "training_bytes": sum(planned_bytes(config, self.spec).values()),
        }


def measure(
    quick: bool = False,
    data: Path | None = None,
    heat: int | None = None,
    seeds: int | None = None,
    most: int | None = None,
    resolution: float | None = None,
    passes: int | None = None,
    batch: int | None = None,
    jobs: int | None = None,
    ways: tuple[str, ...] | None = None,
    compressions: tuple[int, ...] | None = None,
    study: Sizes | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> Rows:
    """Train what the cache lacks.

    study: the quick or the full one, if not given; the others replace what it says, seeds those of the first
    stage. A row is the scores of one training on the test half, at the rate that tuning found.
    """
    study = study or (QUICK if quick else Sizes())
    given = {
        "data": data,
        "heat": heat,
        "seeds": seeds,
        "most": most,
        "resolution": resolution,
        "passes": passes,
        "batch": batch,
        "jobs": jobs,
        "ways": ways,
        "compressions": compressions,
    }
    study = study.given(**given)
    trainings = PointTrainings.of(study, cache, say, dialects=METHODS["robe"].ids, dense="zscore")
    points = list(plan(study, trainings.spec))
    jobs = study.jobs or len(os.sched_getaffinity(0))
    rates = tuned(trainings, study, points, jobs)

    def of(points: list[Point], seeds: Iterable[int]) -> Rows:
        # Seed by seed, so that a study cut short has all points.
        each = [(point, rates[point.way], seed, study.passes) for seed in seeds for point in points]
        return [
            {
                **{"way": point.way, "compression": point.compression, **trainings.sizes(point)},
                **{"rate": rate, "seed": seed, "first_stage": seed <= TUNING_SEED + study.seeds},
                **{"auc": found["test"]["auc"], "log_loss": found["test"]["log_loss"]},
            }
            for (point, rate, seed, _), found in zip(each, trainings.runs(each, jobs), strict=True)
        ]

    heat = min(study.heat, study.seeds)
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + max(study.seeds, study.most))
    rows = of(points, seeds[:heat])
    points = [
        point
        for point in points
        if point.compression in (1, *GAINS) and point.way in (FLOAT, *ahead(rows, point.compression))
    ]
    say(f"{len(points)} points go on after {heat} seeds")
    rows += of(points, seeds[heat : study.seeds])
    told = min(study.most, wanted(rows, study.resolution))
    say(f"{told} seeds tell differences to {study.resolution:g}, or are the most that were asked for")
    rows += of(points, seeds[study.seeds : told])
    synthetic = trainings.manifest.synthetic
    best = synthetic and synthetic["bayes"]
    return [one | {"best_auc": best["test"]["auc"]} for one in rows] if best else rows


def tuned(trainings: PointTrainings, study: Sizes, points: list[Point], jobs: int) -> dict[str, float]:
    """Way -> the rate that is best at TUNED_AT, or else at the size of its next to it."""
    at = {
        point.way: point for point in sorted(points, key=lambda p: -abs(math.log(p.compression / TUNED_AT)))
    }
    if len(study.rates) == 1:
        return dict.fromkeys(at, study.rates[0])
    each = [(point, rate, TUNING_SEED, study.passes) for point in at.values() for rate in study.rates]
    found = zip(each, trainings.runs(each, jobs), strict=True)
    auc = {(point.way, rate): scores["validation"]["auc"] for (point, rate, *_), scores in found}
    return {way: max(study.rates, key=lambda rate: auc[way, rate]) for way in at}


def ahead(rows: Rows, compression: int) -> list[str]:
    """The ways of a size that are not told to be worse than its best one, which comes first."""
    mean = {way: auc_of(rows, (way, compression)).mean() for way in ways_at(rows, compression)}
    ways = sorted(mean, key=lambda way: -mean[way])
    return [way for way in ways if sum(interval(rows, (way, compression), (ways[0], compression))) >= 0]


def wanted(rows: Rows, resolution: float) -> int:
    """Seeds by Stein's rule, so that each point's difference from FLOAT at its size is told; points that went
    no further than the heat do not count."""
    first = len({row["seed"] for row in rows})
    points = dict.fromkeys((row["way"], row["compression"]) for row in rows if row["compression"] > 1)
    less = [differences(rows, (way, size), (FLOAT, size)) for way, size in points if way != FLOAT]
    return max([first, *(seeds_for(each, resolution) for each in less if len(each) == first)])


def seeds_for(less: np.ndarray, resolution: float) -> int:
    """Seeds that tell a difference by Stein's rule, from its values at those of the first stage."""
    return math.ceil((student(len(less)) * less.std(ddof=1) / resolution) ** 2)


def student(seeds: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1))


def ways_at(rows: Rows, compression: int) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in where(rows, compression=compression)))


def auc_of(rows: Rows, point: tuple[str, int]) -> np.ndarray:
    """Test AUC (seeds,)."""
    way, compression = point
    return np.array([row["auc"] for row in where(rows, way=way, compression=compression)])


def differences(rows: Rows, a: tuple[str, int], b: tuple[str, int]) -> np.ndarray:
    """Test AUC of one point less that of another, seed by seed, of the seeds that both have."""
    pairs = zip(auc_of(rows, a), auc_of(rows, b), strict=False)  # which are the first ones
    return np.array([one - other for one, other in pairs])


def stein(less: np.ndarray, first: int) -> tuple[float, float]:
    """Mean, and half the interval, by the deviation of the first stage, which the number of seeds follows."""
    first = min(first, len(less))
    return float(less.mean()), student(first) * float(less[:first].std(ddof=1)) / math.sqrt(len(less))


def interval(rows: Rows, a: tuple[str, int], b: tuple[str, int]) -> tuple[float, float]:
    first = len({row["seed"] for row in rows if row["first_stage"]})
    return stein(differences(rows, a, b), first)


def winner(rows: Rows, compression: int) -> str | None:
    """The best few-bit array of a size; None if it has none."""
    found = [way for way in ways_at(rows, compression) if way in FEW_BITS]
    return max(found, key=lambda way: auc_of(rows, (way, compression)).mean(), default=None)


def verdict(rows: Rows) -> Verdict:
    """Where an interval is too wide to tell what a check asks for, the check must only not be refuted."""
    checks = []
    for compression, gain in GAINS.items():
        best, of_float = winner(rows, compression), (FLOAT, compression)
        if best is None or FLOAT not in ways_at(rows, compression):
            continue
        mean, half = interval(rows, (best, compression), of_float)
        checks.append(
            Check(
                f"few bits: at {compression:,}x, {best} is better than {FLOAT} by {gain:g} at least",
                mean + half >= gain if half > gain else mean >= gain and mean - half > 0,
                f"{mean:+.4f} ± {half:.4f}",
            )
        )
        others = [way for way in ways_at(rows, compression) if way not in (*FEW_BITS, FLOAT)]
        ahead = {way: interval(rows, (way, compression), (best, compression)) for way in others}
        checks.append(
            Check(
                f"rivals: at {compression:,}x, no other way is better than {best}",
                all(mean - half <= 0 for mean, half in ahead.values()),
                ", ".join(f"{way} {mean:+.4f} ± {half:.4f}" for way, (mean, half) in ahead.items()),
            )
        )
    if FULL in ways_at(rows, 1) and (best := winner(rows, 100)):
        mean, half = interval(rows, (best, 100), (FULL, 1))
        checks.append(
            Check(
                f"whole: at 100x, {best} is within {WITHIN:g} of the {FULL}",
                mean + half >= -WITHIN,
                f"{mean:+.4f} ± {half:.4f}",
            )
        )
    return conclude(checks)


def summarise(rows: Rows) -> dict:
    """The figures of the study, few enough to keep: the table is made of them."""
    points = dict.fromkeys((row["way"], row["compression"]) for row in rows)

    def describe(point: tuple[str, int]) -> dict:
        way, compression = point
        found = where(rows, way=way, compression=compression)
        kept = {
            key: found[0][key] for key in ("way", "compression", "stored_bytes", "training_bytes", "rate")
        }
        loss = claim.mean_interval([row["log_loss"] for row in found], LEVEL)
        kept |= {"auc": claim.mean_interval(auc_of(rows, point), LEVEL), "log_loss": loss}
        kept["seeds"] = len(found)
        if compression > 1 and FLOAT in ways_at(rows, compression) and way != FLOAT:
            kept["less_float"] = interval(rows, point, (FLOAT, compression))
        return kept

    return {
        "seeds": len({row["seed"] for row in rows}),
        "best_auc": rows[0].get("best_auc"),
        "points": [describe(point) for point in points],
        "ahead": {compression: ahead(rows, compression) for _, compression in points},
        "checks": verdict(rows).checks,
        "versions": versions(),
    }


def table(summary: dict) -> str:
    """The figures of a summary as a table in Markdown; the best of each size is bold."""
    points = summary["points"]
    best = {}
    for point in points:
        best[point["compression"]] = max(best.get(point["compression"], 0.0), point["auc"][0])
    lines = [
        f"Up to {summary['seeds']} seeds"
        + (f"; the best possible test AUC is {summary['best_auc']:.4f}." if summary["best_auc"] else "."),
        "",
        "| fewer bytes | way | stored bytes | training bytes | seeds | AUC | against fp32 ROBE | log loss |",
        "| --- " * 8 + "|",
    ]
    for point in points:
        auc = "{:.4f} ± {:.4f}".format(*point["auc"])
        cells = [
            f"{point['compression']:,}x",
            point["way"],
            f"{point['stored_bytes']:,}",
            f"{point['training_bytes']:,}",
            str(point["seeds"]),
            f"**{auc}**" if point["auc"][0] == best[point["compression"]] else auc,
            "{:+.4f} ± {:.4f}".format(*point["less_float"]) if "less_float" in point else "",
            "{:.4f} ± {:.4f}".format(*point["log_loss"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def overview(summary: dict) -> str:
    """A line for each way and a column for each size: AUC and its interval, then log loss. The best AUC of a
    size is bold; below it stand the ways that could not be told apart from it."""
    points = {(point["way"], point["compression"]): point for point in summary["points"]}
    ways, sizes = (list(dict.fromkeys(key)) for key in zip(*points, strict=True))
    best = {size: max(point["auc"][0] for (_, of), point in points.items() if of == size) for size in sizes}
    stored = {size: max(p["stored_bytes"] for (_, of), p in points.items() if of == size) for size in sizes}

    def cell(way: str, size: int) -> str:
        if (point := points.get((way, size))) is None:
            return ""
        auc = "{:.4f} ± {:.4f}".format(*point["auc"])
        return f"{f'**{auc}**' if point['auc'][0] == best[size] else auc}, {point['log_loss'][0]:.4f}"

    header = ["AUC, log loss", *(f"{stored[size]:,} B ({size:,}x)" for size in sizes)]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    lines += [f"| {' | '.join([way, *(cell(way, size) for size in sizes)])} |" for way in ways]
    lines.append("")
    for size, (best_way, *others) in summary["ahead"].items():
        if others:
            lines.append(f"- At {int(size):,}x not told to be worse than {best_way}: {'; '.join(others)}.")
    return "\n".join(lines)


def plot(rows: Rows):
    return draw(summarise(rows))


def draw(summary: dict):
    """Test AUC against stored bytes, a line for each way, and the same near the full table's."""
    source = "SYNTHETIC data" if summary["best_auc"] else "real data"
    bars = f"bars: 95% intervals over up to {summary['seeds']} seeds"
    figure, axes = claim.figure(1, 2, f"DLRM, {source}; {bars}")
    figure.set_size_inches(14, 6)
    small = [point for point in summary["points"] if point["compression"] > 1]
    sizes: dict[int, int] = {}  # compression -> bytes
    for point in small:
        sizes[point["compression"]] = max(sizes.get(point["compression"], 0), point["stored_bytes"])
    whole = [point["auc"][0] for point in summary["points"] if point["way"] == FULL]
    for ax in axes:
        for number, way in enumerate(ways := list(dict.fromkeys(point["way"] for point in small))):
            found = where(small, way=way)
            middle, half = np.array([point["auc"] for point in found]).T
            beside = 1.02 ** (number - len(ways) / 2)
            at = [beside * sizes[point["compression"]] for point in found]
            ax.errorbar(at, middle, half, label=way, capsize=3, **look(way, number))
        for auc in whole:
            ax.axhline(auc, color="grey", linewidth=1, label=FULL)
        if summary["best_auc"]:
            ax.axhline(summary["best_auc"], color="grey", linestyle="--", linewidth=1, label="best possible")
        ax.set(xscale="log", xlabel="stored bytes", ylabel="test AUC")
        ax.set_xlim(min(sizes.values()) / 2, 2 * max(sizes.values()))
        ax.set_xticks(list(sizes.values()), [f"{size:,}\n{x:,}x" for x, size in sizes.items()])
        ax.minorticks_off()
    near = max(whole or [point["auc"][0] for point in small])
    axes[1].set_ylim(near - 0.03, near + 0.005)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return figure


def look(way: str, number: int) -> dict[str, Any]:
    """How the line of a way is drawn: arrays by their bits, what was rounded after training dashed, and all
    others dotted."""
    if way == FLOAT:
        return {"color": "black", "marker": "o", "linewidth": 2}
    if way in FEW_BITS:
        bits = next(int(word) for word in way.split() if word.isdigit())
        color = colormaps["viridis"](0.95 - math.log2(bits) / 3.5)
        after = {"linestyle": "--", "markerfacecolor": "white"} if way in AFTERWARDS else {}
        return {"color": color, "marker": "o", **after}
    return {"color": colormaps["tab20"](number % 20), "marker": "s", "linestyle": ":"}


def main() -> None:
    """Hold the claim against trainings, and write what its table is made of."""
    claim.told(EqualBytesOptions, summarise, table)


if __name__ == "__main__":
    main()
