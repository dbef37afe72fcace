"""What was tried and stays out: ways to make more of an array's bytes, held against the array itself.

Claim: at 100 and at 1,000 times fewer bytes than the float32 table has, none of these is better than a ROBE
array of the same bytes, trained alike:

- two or three summed readings: each vector is the sum of rows that are hashed apart, in one array;
- a scale per row, learned, in a second hashed array, which takes a tenth of the bytes (MEM-REC);
- a fold instead of a hash (RANDOMFOLD): every slot has as many readers, to within one;
- learned places for frequent ids: their blocks are clustered in the middle of a pass, and an index tells
  which they read from then on (CCE's idea on a ROBE array); index and keys, 8 bytes an id, are counted;
- in 4 bits, scales that are learned beside the weights of a group (ALPT), against the array in 4 bits;
- under SGD, gradients divided by the readers of a slot (STABLE-RPS), against the same array under SGD.

A claim like that also holds where nothing could be told, so what is known to gain must be found to: the array
in 4 bits, by as much as equal_bytes.py says, where the interval is not wider. What gains by an interval that
excludes 0 belongs into the product, and the verdict names it; with two intervals of 95% for each idea, one
study in four or so names one that gains nothing.

The theory of the last one. A slot is stepped by the sum of what its readers ask for, so its curvature is the
sum of theirs, and plain gradient descent must have a rate below 2 over the largest. Curvature goes with how
often a row is read. The most frequent id is read in p of the rows, a slot of M by all ids together F D / M
times on average. So the largest is about p + F D / M, or two or three times that where frequent ids meet, and
the rate must fall with compression only from M = F D / p on: a few hundred weights for a feature with a value
in every second row, however many readers a slot has. Dividing by the readers lowers the rate of all slots
alike, and so only asks for a larger one. Under Adagrad it changes nothing: a step is the sum over the root of
the sum of its squares, and both are divided alike.

Conditions: as of equal_bytes.py, whose rows, rates, passes and intervals (Stein's) these are: preset `small`,
Adagrad or SGD, each pass but the first with a fresh embedding, the rate of each way that is best at 100 times
fewer bytes by the validation AUC of a seed not used again. No dictionary is counted, which favours the fold.
The embeddings are in analysis/tried_embeddings.py.

    python analysis/tried.py [--quick] [--data PREPARED] [--seeds N] [--most N] [--resolution X] [--jobs N]
                             [--ways WAY...]

Trainings are kept in analysis/out/tried, see analysis/trainings.py; one that was killed begins anew.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from analysis import claim, tried_embeddings
from analysis.claim import Check, Rows, Verdict, conclude, where
from analysis.equal_bytes import GAINS, auc_of, differences, fitted, interval, seeds_for
from analysis.trainings import RATES, TUNING_SEED, WIDTH, Study, StudyOptions, Trainings
from analysis.tried_embeddings import readers_of, stored_bytes
from robe.backend import Backend, select
from robe.config import ConfigError, DataSpec, EmbeddingConfig, OptimizerConfig, TrainConfig, resolve
from robe.embeddings import ArrayEmbedding, create
from robe.metrics import summary as scores
from robe.model import DLRM
from robe.train import predict, versions

CACHE = claim.OUT / "tried"
TUNED_AT = 100
COMPRESSIONS = (TUNED_AT, 1000)
SGD_RATES = (0.3, 1.0, 3.0)
ROBE, ROBE_SGD, KNOWN = "ROBE", "ROBE, SGD", "ROBE in 4 bits"
DIVIDED, STRETCHED = "divided by readers, SGD", "learned scales in 4 bits"


@dataclass(frozen=True)
class Way:
    """make: the embedding, of a configuration, data and a backend; against: the way it is held against."""

    make: Callable[[TrainConfig, DataSpec, Backend], Any] = create
    against: str = ROBE
    optimizer: str = "adagrad"
    memory: str = "fp32"


WAYS = {
    ROBE: Way(),
    KNOWN: Way(memory="int4"),
    "two readings": Way(partial(tried_embeddings.summed, readings=2)),
    "three readings": Way(partial(tried_embeddings.summed, readings=3)),
    "scale per row": Way(tried_embeddings.scaled),
    "fold": Way(tried_embeddings.folded),
    "learned places": Way(tried_embeddings.placed),
    STRETCHED: Way(tried_embeddings.stretched, against=KNOWN, memory="int4"),
    ROBE_SGD: Way(optimizer="sgd", against=ROBE_SGD),
    # At TUNED_AT a slot has as many readers, so that there its steps are about as long as the array's.
    DIVIDED: Way(partial(tried_embeddings.divided, per=TUNED_AT), optimizer="sgd", against=ROBE_SGD),
}


@dataclass(frozen=True)
class Sizes(Study):
    """What to train; the defaults are the full study. most, resolution: as of equal_bytes.Sizes.

    rates: of Adagrad; those of SGD are SGD_RATES, or the one in the middle where there is one of Adagrad.
    """

    passes: int = 2
    most: int = 8
    resolution: float = 0.0005
    ways: tuple[str, ...] = tuple(WAYS)

    def rates_of(self, way: str) -> tuple[float, ...]:
        if WAYS[way].optimizer == "adagrad":
            return self.rates
        return SGD_RATES if len(self.rates) > 1 else SGD_RATES[1:2]


QUICK = Sizes(
    rows=16_000,
    scale=0.02,
    seeds=3,
    passes=1,
    batch=320,
    rates=RATES[1:2],
    jobs=1,
    most=3,
    ways=("scale per row", "learned places", DIVIDED),
)


@dataclass(frozen=True)
class TriedOptions(StudyOptions):
    most: int | None = None
    """Seeds at most, however wide the intervals are."""

    resolution: float | None = None
    """Half the interval that differences in AUC are to be told to."""

    jobs: int | None = None
    """Trainings at a time, each on one core. Default: as many as there are cores."""

    ways: tuple[str, ...] | None = None
    """What to hold against the array, by the names in WAYS. Default: all."""


class TriedTrainings(Trainings):
    resumes = False

    def config(self, way: str, compression: int, rate: float, seed: int, passes: int) -> TrainConfig:
        size = 4 * sum(self.spec.cardinalities) * WIDTH // compression
        embedding = fitted(EmbeddingConfig(hash_seed=seed, memory=WAYS[way].memory), self.spec, size)
        if embedding is None:
            raise ConfigError(f"{size:,} bytes: too few for an array; give data with more ids")
        return resolve(
            TrainConfig(
                embedding=embedding,
                optimizer=OptimizerConfig(WAYS[way].optimizer, rate),
                batch=self.batch,
                epochs=passes,
                seed=seed,
                eval_every=self.steps_per_pass,
                checkpoint_every=passes * self.steps_per_pass,
                fresh_embeddings=passes > 1,
            )
        )

    def made(self, config: TrainConfig, **also: Any) -> DLRM:
        # What is read may change halfway, which a graph would not see.
        backend = dataclasses.replace(self.backend, graph=None)
        return DLRM(config, self.spec, WAYS[also["way"]].make(config, self.spec, backend), backend)

    def run(self, way: str, compression: int, rate: float, seed: int, passes: int) -> dict[str, Any]:
        """Scores on the halves `validation` and `test`, and the `stored_bytes`."""
        config = self.config(way, compression, rate, seed, passes)

        def found(model: DLRM) -> dict:
            halves = {"validation": "test", "test": "validation"}  # which change names in Trainings
            told = {half: scores(*predict(model, self.rows[of])) for half, of in halves.items()}
            return {"scores": told | {"stored_bytes": stored_bytes(model.embedding)}}

        name = f"{way}, {compression:,}x, rate {rate:g}, seed {seed}"
        return self.trained(config, name, found, way=way)[0]["scores"]

    def most_read(self, compression: int, batches: int = 50) -> dict[str, float]:
        """How often the slot that is read most is read, per row of the data, and the id that is seen most."""
        config = self.config(ROBE, compression, RATES[0], TUNING_SEED, 1)
        array = create(config, self.spec, select("cpu"))
        reads = np.zeros_like(array.memory)
        with closing(self.rows["train"].batches(self.batch)) as rows:
            ids = np.concatenate([ids for *_, ids in islice(rows, batches)])
        plain = array.slot_map._replace(signed=False)
        ones = np.ones((*ids.shape, WIDTH), np.float32)
        array.backend.kernels.scatter_add(ones, ids, array.base, plain, 1, reads)
        p = max(np.bincount(column).max() for column in ids.T) / len(ids)
        return {
            "most_read": float(reads.max() / len(ids)),
            "theory": float(p + ids.shape[1] * WIDTH / array.weights),
            "p": float(p),
            "weights": array.weights,
            "readers": float(readers_of(array, self.spec.cardinalities).mean()),
        }


def divided_under_adagrad(spec: DataSpec, steps: int = 20) -> float:
    """How far apart the weights end, at most, whose gradients Adagrad is given whole or divided by readers,
    as a share of how far they have moved."""
    config = EmbeddingConfig(weights=sum(spec.cardinalities) * WIDTH // TUNED_AT)
    config = resolve(TrainConfig(embedding=config, optimizer=OptimizerConfig("adagrad", 0.1, eps=1e-30)))
    whole, parts = (create(config, spec, select("cpu"), "float64") for _ in range(2))
    assert isinstance(parts, ArrayEmbedding)
    before, kernels = whole.memory.copy(), parts.backend.kernels
    readers, rng = readers_of(parts, spec.cardinalities), np.random.default_rng(0)
    for _ in range(steps):
        ids = np.stack([rng.integers(0, n, 64) for n in spec.cardinalities], axis=1).astype(np.uint32)
        d_vectors = rng.standard_normal((*ids.shape, WIDTH))
        whole.update(ids, d_vectors, 0.1)
        slots = parts.slots(ids)
        kernels.scatter_add(d_vectors, *slots, 1, parts.gradient)
        parts.gradient /= readers
        parts.step(slots, 0.1)
    return float(abs(whole.memory - parts.memory).max() / abs(whole.memory - before).max())


def measure(
    quick: bool = False,
    data: Path | None = None,
    seeds: int | None = None,
    most: int | None = None,
    resolution: float | None = None,
    passes: int | None = None,
    batch: int | None = None,
    jobs: int | None = None,
    ways: tuple[str, ...] | None = None,
    study: Sizes | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> Rows:
    """Rows of four kinds: score, of one training on the test half; tuned, the validation AUC at a rate; read,
    of the slot that is read most; and adagrad. Options that are given replace what the study says."""
    given = {"data": data, "seeds": seeds, "most": most, "resolution": resolution, "passes": passes}
    study = (study or (QUICK if quick else Sizes())).given(**given, batch=batch, jobs=jobs, ways=ways)
    if unknown := [way for way in study.ways if way not in WAYS]:
        raise ConfigError(f"{unknown[0]!r} is no way of this study; there are {', '.join(WAYS)}")
    trainings = TriedTrainings.of(study, cache, say, dense="zscore")
    names = list(dict.fromkeys(name for way in study.ways for name in held_against(way)))
    points = [(way, compression) for compression in COMPRESSIONS for way in names]
    jobs = study.jobs or len(os.sched_getaffinity(0))
    tried = list(tunings(trainings, study, names, jobs))
    rates = {way: best_rate(tried, way, TUNED_AT) or study.rates_of(way)[0] for way in names}

    def of(seeds: Iterable[int]) -> Rows:
        each = [(*point, rates[point[0]], seed, study.passes) for seed in seeds for point in points]
        return [
            {
                **{"kind": "score", "way": way, "compression": compression, "rate": rate, "seed": seed},
                **{"auc": found["test"]["auc"], "log_loss": found["test"]["log_loss"]},
                **{"stored_bytes": found["stored_bytes"]},
                **{"first_stage": seed <= TUNING_SEED + study.seeds},
                **{"synthetic": bool(trainings.manifest.synthetic)},
            }
            for (way, compression, rate, seed, _), found in zip(each, trainings.runs(each, jobs), strict=True)
        ]

    first = range(TUNING_SEED + 1, TUNING_SEED + 1 + study.seeds)
    rows = of(first)
    enough = min(study.most, wanted(rows, study.resolution))
    say(f"{enough} seeds tell differences to {study.resolution:g}, or are the most that were asked for")
    rows += of(range(first.stop, TUNING_SEED + 1 + enough))
    read = [{"kind": "read", "compression": c} | trainings.most_read(c) for c in COMPRESSIONS]
    return [*rows, *tried, *read, {"kind": "adagrad", "apart": divided_under_adagrad(trainings.spec)}]


def held_against(way: str) -> tuple[str, ...]:
    """A way behind the one that it is held against, and what that is held against."""
    against = WAYS[way].against
    return WAYS[against].against, against, way


def tunings(trainings: TriedTrainings, study: Sizes, names: list[str], jobs: int) -> Iterator[dict]:
    """At TUNED_AT; the array under SGD at all sizes, to see whether its best rate falls with them."""
    each = [
        (way, compression, rate, TUNING_SEED, study.passes)
        for way in names
        for compression in (COMPRESSIONS if way == ROBE_SGD else (TUNED_AT,))
        for rate in study.rates_of(way)
        if len(study.rates) > 1
    ]
    for (way, compression, rate, *_), found in zip(each, trainings.runs(each, jobs), strict=True):
        row = {"kind": "tuned", "tuned": way, "compression": compression, "rate": rate}
        yield row | {"validation_auc": found["validation"]["auc"]}


def best_rate(rows: Rows, way: str, compression: int) -> float | None:
    """The rate of the best validation AUC; None where it was not tuned."""
    tried = where(rows, kind="tuned", tuned=way, compression=compression)
    return max(tried, key=lambda row: row["validation_auc"])["rate"] if tried else None


def pairs(rows: Rows) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Each point but those of arrays, and the array that it is held against."""
    found = dict.fromkeys((row["way"], row["compression"]) for row in where(rows, kind="score"))
    return [((way, c), (WAYS[way].against, c)) for way, c in found if way not in (ROBE, ROBE_SGD)]


def wanted(rows: Rows, resolution: float) -> int:
    """Seeds by Stein's rule, so that each difference is told."""
    less = [differences(rows, *pair) for pair in pairs(rows)]
    return max(len(less[0]), *(seeds_for(each, resolution) for each in less))


def verdict(rows: Rows) -> Verdict:
    return conclude(checks(rows))


def checks(rows: Rows) -> Iterator[Check]:
    scored = where(rows, kind="score")
    for (way, compression), against in pairs(rows):
        mean, half = interval(scored, (way, compression), against)
        told, found = mean - half > 0, f"AUC {mean:+.4f} ± {half:.4f}"
        if way == KNOWN:
            told |= half > GAINS[compression] <= mean + half
            yield Check(f"known: {way} gains at {compression:,}x", told, found)
        else:
            yield Check(f"{way} does not gain at {compression:,}x", not told, found)
    sizes = {(row["way"], row["compression"]): row["stored_bytes"] for row in scored}
    worst = max((sizes[pair] - sizes[against] for pair, against in pairs(rows)), default=0)
    yield Check("bytes: no way stores more than the array", worst <= 0, f"{worst:+,} at most")
    for row in where(rows, kind="read"):
        off, found = row["most_read"] / row["theory"], f"{row['most_read']:.2f} times a row"
        what = f"theory: at {row['compression']:,}x, with {row['readers']:,.0f} readers a slot, the most "
        what += f"that one is read is p + F D / M = {row['theory']:.2f}, to a factor of 3"
        yield Check(what, 1 / 3 < off < 3, found)
    apart = where(rows, kind="adagrad")[0]["apart"]
    yield Check("theory: under Adagrad to divide by readers changes nothing", apart < 1e-6, f"{apart:.1e}")
    if small := best_rate(rows, ROBE_SGD, COMPRESSIONS[1]):
        large = best_rate(rows, ROBE_SGD, COMPRESSIONS[0])
        what = "theory: the best rate of SGD does not fall as the readers grow, tenfold"
        found = f"{large:g} at {COMPRESSIONS[0]:,}x, {small:g} at {COMPRESSIONS[1]:,}x"
        yield Check(what, small > large / 9, found)


def summarise(rows: Rows) -> dict:
    """The figures of the study, few enough to keep: the table is made of them."""
    scored = where(rows, kind="score")
    held = dict(pairs(rows))

    def describe(way: str, compression: int) -> dict:
        found = where(scored, way=way, compression=compression)
        kept = {key: found[0][key] for key in ("way", "compression", "stored_bytes", "rate")}
        kept["auc"] = claim.mean_interval(auc_of(scored, (way, compression)))
        if against := held.get((way, compression)):
            kept |= {"against": against[0], "less": interval(scored, (way, compression), against)}
        return kept

    points = dict.fromkeys((row["way"], row["compression"]) for row in scored)
    return {
        "seeds": len({row["seed"] for row in scored}),
        "synthetic": scored[0]["synthetic"],
        "points": [describe(*point) for point in points],
        "checks": verdict(rows).checks,
        "versions": versions(),
    }


def table(summary: dict) -> str:
    """The figures of a summary as a table in Markdown; what gains is bold."""
    source = "SYNTHETIC rows" if summary["synthetic"] else "Real rows"
    heads = "fewer bytes", "way", "stored bytes", "rate", "AUC", "against the array"
    lines = [f"{source}, {summary['seeds']} seeds.", "", f"| {' | '.join(heads)} |", "| --- " * 6 + "|"]
    for point in summary["points"]:
        less = ""
        if "less" in point:
            mean, half = point["less"]
            less = f"{mean:+.4f} ± {half:.4f}"
            less = f"**{less}**" if mean - half > 0 else less
        cells = [f"{point['compression']:,}x", point["way"], f"{point['stored_bytes']:,}"]
        cells += [f"{point['rate']:g}", "{:.4f} ± {:.4f}".format(*point["auc"]), less]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Rows):
    summary = summarise(rows)
    source = "SYNTHETIC data" if summary["synthetic"] else "real data"
    title = f"Ways to make more of an array, {source}, {summary['seeds']} seeds, 95%"
    figure, axes = claim.figure(1, len(COMPRESSIONS), title)
    for ax, compression in zip(axes, COMPRESSIONS, strict=True):
        found = [point for point in where(summary["points"], compression=compression) if "less" in point]
        middle, half = np.array([point["less"] for point in found]).T
        ax.errorbar(middle, range(len(found)), xerr=half, fmt="o", capsize=3)
        ax.axvline(0, color="black", linewidth=1)
        ax.set_yticks(range(len(found)), [point["way"] for point in found])
        ax.set(xlabel="test AUC less that of the array", title=f"{compression:,} times fewer bytes")
        ax.locator_params(axis="x", nbins=5)
    return figure


def main() -> None:
    """Hold the claim against trainings, and write what its table is made of."""
    claim.told(TriedOptions, summarise, table)


if __name__ == "__main__":
    main()
