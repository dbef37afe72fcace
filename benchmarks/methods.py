"""Ways to store embeddings at equal bytes: quality and time of ROBE, its rivals and the full table.

    python -m benchmarks.methods [--quick] [--data PREPARED] [--methods NAME...] [--megabytes X...]

The DLRM of the preset `small`, Adagrad at a rate that falls to 0 over the second half of one pass, over
SYNTHETIC rows of the law of analysis/tradeoff.py, ids numbered from the most frequent value on, or over those
given by --data (prepare them with --order count, which `frequency` counts on). Every method at every size has
its rate tuned alike: the one of RATES with the best AUC on the validation half, with a seed that is not used
again. Then several seeds draw the initial weights, the order of the rows and the hashes, and what is told is
the AUC and the log loss on the test half.

Trainings are kept in analysis/out/methods, see analysis/trainings.py: a study that was stopped
goes on, and a method or a size more trains that alone. Writes benchmarks/results/methods.json;
`python -m benchmarks.readme` then writes the table and the figure.
"""

from robe.threads import share_cores

share_cores()  # before anything that loads NumPy

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import tyro

from analysis import claim
from analysis.claim import mean_interval
from analysis.trainings import RATES, TUNING_SEED, WIDTH, Study, Trainings, seeded, synthetic_data
from benchmarks.measure import QUICK, Effort, machine, rotate, rounds, spread
from data_pipeline.dialects import DICTIONARY
from data_pipeline.folders import open_folder
from data_pipeline.schema import DataError
from data_pipeline.whole_files import write_json
from robe.config import (
    NUMBERED,
    ConfigError,
    EmbeddingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    resolve,
)
from robe.errors import RobeError
from robe.model import build

RESULTS = Path(__file__).parent / "results" / "methods.json"
CACHE = claim.OUT / "methods"

# Methods of one size, and methods that are given a size.
FIXED = {
    "full": EmbeddingConfig("full"),
    "mixed_precision, INT8": EmbeddingConfig("mixed_precision", bits=8),
    "mixed_precision, INT4": EmbeddingConfig("mixed_precision", bits=4),
    "none": EmbeddingConfig("none"),
}
SIZED = {
    "robe": EmbeddingConfig("robe"),
    "hashing": EmbeddingConfig("hashing"),
    "frequency": EmbeddingConfig("frequency"),
    "compositional": EmbeddingConfig("compositional"),
    "quotient_remainder": EmbeddingConfig("quotient_remainder"),
    "quotient_remainder, add": EmbeddingConfig("quotient_remainder", combine="add"),
    "tensor_train": EmbeddingConfig("tensor_train"),
}
COMPRESSIONS = (10, 30, 100, 1000)  # the sizes, if none are given

STUDY = Study(rows=500_000, seeds=3)
EFFORT = Effort(rounds=5, seconds=0.03)
TINY = Study(rows=16_000, scale=0.005, seeds=2, batch=320, rates=(0.03,))


@dataclasses.dataclass(frozen=True)
class Point:
    """A method at a size. megabytes: what it is given, None if its size is its own."""

    method: str
    megabytes: float | None
    embedding: EmbeddingConfig

    def __str__(self) -> str:
        return self.method + ("" if self.megabytes is None else f" in {self.megabytes:.3g} MB")


def plan(methods: tuple[str, ...], sizes: list[float]) -> Iterator[Point]:
    for name in methods:
        if name in FIXED:
            yield Point(name, None, FIXED[name])
        elif name in SIZED:
            for size in sizes:
                yield Point(name, size, dataclasses.replace(SIZED[name], megabytes=size))
        else:
            raise ConfigError(f"no method {name!r}; choose of {'; '.join([*FIXED, *SIZED])}")


def settings(
    embedding: EmbeddingConfig,
    optimizer: OptimizerConfig,
    seed: int,
    batch: int,
    steps: int,
    width: int | None = None,
) -> TrainConfig:
    """That of one pass of `steps`; the rate falls, which makes trainings of different seeds alike."""
    never = 2**31  # but at the end
    falling = {"decay_start": steps // 2, "decay_steps": steps - steps // 2}
    return resolve(
        TrainConfig(
            ModelConfig(width=width),
            seeded(embedding, seed),
            dataclasses.replace(optimizer, **falling),
            batch=batch,
            seed=seed,
            eval_every=never,
            checkpoint_every=never,
        )
    )


def measure(
    methods: tuple[str, ...] = (),
    megabytes: tuple[float, ...] = (),
    study: Study = STUDY,
    effort: Effort = EFFORT,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> dict:
    """Train what the cache lacks, and time look-ups and steps; what results/methods.json holds."""
    manifest = open_folder(study.data or synthetic_data(study, cache, "count"))
    say(f"data: {manifest.describe()}")
    trainings = Trainings(manifest, study.batch, cache, say)
    table = 4 * sum(trainings.spec.cardinalities) * WIDTH
    sizes = sorted(megabytes or (table / c / 1e6 for c in COMPRESSIONS), reverse=True)
    points, left_out = [], []
    for point in plan(methods or (*FIXED, *SIZED), sizes):
        try:
            build(config(trainings, point), trainings.spec, trainings.backend)
            points.append(point)
        except ConfigError as error:
            say(f"{point}: left out: {error}")
            left_out.append({"point": str(point), "why": str(error)})

    def scores(point: Point, rate: float, seed: int) -> dict:
        return trainings.trained(config(trainings, point, rate, seed), f"{point}, rate {rate}, seed {seed}")[
            0
        ]

    rates = {}
    for point in points:
        found = {rate: scores(point, rate, TUNING_SEED)["test"]["auc"] for rate in study.rates}
        rates[point] = max(found, key=found.get)
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + study.seeds)
    # Seed by seed, so that a study cut short has all points.
    found = {point: [] for point in points}
    for seed in seeds:
        for point in points:
            found[point].append(scores(point, rates[point], seed))
    times = dict(zip(points, timed(points, trainings, effort), strict=True))
    bayes = manifest.synthetic and manifest.synthetic["bayes"]["test"]
    dictionary = manifest.folder / DICTIONARY
    return {
        "machine": machine(trainings.backend.description),
        "data": manifest.describe(),
        "train_rows": manifest.rows("train"),
        "test_rows": manifest.rows("test"),
        "batch": study.batch,
        "seeds": study.seeds,
        "table_bytes": table,
        "dictionary_bytes": dictionary.stat().st_size if dictionary.exists() else 0,
        "best": bayes and {"auc": bayes["auc"], "log_loss": bayes["log_loss"]},
        "left_out": left_out,
        "rows": [
            {
                "method": point.method,
                "megabytes": point.megabytes,
                "bytes": summaries[0]["embedding_bytes"],
                "dictionary": point.embedding.method in NUMBERED,
                "rate": rates[point],
                # The loop's validation half is the test half, see Trainings.
                "auc": [summary["validation"]["auc"] for summary in summaries],
                "log_loss": [summary["validation"]["log_loss"] for summary in summaries],
                **times[point],
            }
            for point, summaries in found.items()
        ],
    }


def config(
    trainings: Trainings, point: Point, rate: float = RATES[0], seed: int = TUNING_SEED
) -> TrainConfig:
    optimizer = OptimizerConfig("adagrad", rate)
    return settings(point.embedding, optimizer, seed, trainings.batch, trainings.steps_per_pass)


def timed(points: list[Point], trainings: Trainings, effort: Effort) -> Iterator[dict]:
    """Seconds of a look-up and of a training step, of each point, taking turns."""
    backend, batch = trainings.backend, trainings.batch
    with closing(trainings.rows["train"].batches(batch)) as batches:
        batches = [tuple(map(backend.to_device, arrays)) for arrays in islice(batches, 4)]
    ids = [arrays[-1] for arrays in batches]
    jobs = {}
    for i, point in enumerate(points):
        model = build(config(trainings, point), trainings.spec, backend)
        mine = [x[:, : model.embedding.features].copy() for x in ids]
        out = backend.empty((batch, model.embedding.features, model.embedding.width), "float32")
        jobs[f"{i} lookup"] = rotate(lambda x, m=model, o=out: m.embedding.lookup(x, o), mine)
        parts = [[arrays[k] for arrays in batches] for k in range(2)]
        jobs[f"{i} step"] = rotate(lambda y, d, x, m=model: m.step(y, d, x, 0.01), *parts, mine)
    jobs = {name: effort.job(call, backend.synchronize) for name, call in jobs.items()}
    times = rounds("methods", jobs, effort.rounds)
    for i in range(len(points)):
        yield {verb: spread(times[f"{i} {verb}"]) for verb in ("lookup", "step")}


def table(results: dict) -> str:
    """The figures of a study as a table in Markdown."""
    best, device = results["best"], results["machine"]["device"]
    heads = ["method", "bytes of weights", "smaller", "test AUC", "less ROBE's", "test log loss", "rate"]
    heads += ["look-up", "step"]
    lines = [
        f"{results['train_rows']:,} training and {results['test_rows']:,} test rows, {results['seeds']} seeds"
        + (f"; the best possible test AUC is {best['auc']:.4f}, " if best else "")
        + (f"log loss {best['log_loss']:.4f}" if best else "")
        + ". ± are 95% intervals over the seeds, of differences between equal seeds. Methods marked * need "
        f"the dictionary besides, {results['dictionary_bytes']:,} bytes. Times on {device}, batch "
        f"{results['batch']}, are medians and quartiles.",
        "",
        f"| {' | '.join(heads)} |",
        "| --- " * len(heads) + "|",
    ]
    robe = {row["megabytes"]: row["auc"] for row in results["rows"] if row["method"] == "robe"}
    for row in results["rows"]:
        smaller = f"{results['table_bytes'] / row['bytes']:,.1f}x" if row["bytes"] else ""
        auc, loss = ("{:.4f} ± {:.4f}".format(*mean_interval(row[kind])) for kind in ("auc", "log_loss"))
        less = ""
        if row["method"] != "robe" and (beside := robe.get(row["megabytes"])):
            less = "{:+.4f} ± {:.4f}".format(*mean_interval(np.subtract(row["auc"], beside)))
        name = row["method"] + " *" * row["dictionary"]
        cells = [name, f"{row['bytes']:,}", smaller, auc, less, loss, f"{row['rate']:g}"]
        cells += [_milliseconds(row[verb]) for verb in ("lookup", "step")]
        lines.append(f"| {' | '.join(cells)} |")
    if out := [left_out["point"] for left_out in results["left_out"]]:
        lines += ["", f"Cannot be had: {'; '.join(out)}."]
    return "\n".join(lines)


def _milliseconds(times: dict) -> str:
    low, high = times["quartiles"]
    return f"{1e3 * times['median']:.2f} ms ({1e3 * low:.2f}-{1e3 * high:.2f})"


def plot(results: dict):
    """Test AUC and log loss against the bytes of the weights."""
    source = "SYNTHETIC data" if results["best"] else "real data"
    title = f"DLRM, {source}, one pass; bars: 95% intervals over {results['seeds']} seeds"
    figure, axes = claim.figure(1, 2, title)
    methods = {row["method"]: [] for row in results["rows"] if row["bytes"]}
    for row in results["rows"]:
        methods.get(row["method"], []).append(row)
    for ax, kind, name in zip(axes, ("auc", "log_loss"), ("test AUC", "test log loss"), strict=True):
        for i, (method, rows) in enumerate(methods.items()):
            middle, half = zip(*(mean_interval(row[kind]) for row in rows), strict=True)
            style = {"marker": "os^vDPX*"[i % 8], "color": f"C{i % 10}", "capsize": 3, "markersize": 5}
            ax.errorbar([row["bytes"] for row in rows], middle, half, label=method, **style)
        if results["best"]:
            best = {"color": "black", "linestyle": "--", "linewidth": 1, "label": "best possible"}
            ax.axhline(results["best"][kind], **best)
        ax.set(xscale="log", xlabel="bytes of weights", ylabel=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a comparison of trainings can be asked for on its command line."""

    data: Path | None = None
    """A folder made by `prepare --ids dictionary`, instead of synthetic rows."""

    seeds: int | None = None
    """How many, two at least, besides one for tuning."""

    batch: int | None = None
    """Rows a step; few rows need many steps."""

    quick: bool = False
    """Few rows and few repeats, to see that everything runs."""

    out: Path | None = None
    """The file to write; default: one in benchmarks/results, or in analysis/out if quick."""

    def study(self, full: Study, tiny: Study) -> Study:
        study = tiny if self.quick else full.given(batch=self.batch)
        return study.given(data=self.data, seeds=self.seeds and max(2, self.seeds))

    def finish(self, results: dict, table: Callable[[dict], str], kept: Path) -> None:
        """Print the table of the results, and write them to the file; kept: in benchmarks/results."""
        out = self.out or (claim.OUT / kept.name if self.quick else kept)
        write_json(out, results)
        print(table(results))
        print(f"{out}: written")


def main(
    asked: tyro.conf.OmitArgPrefixes[Asked], methods: tuple[str, ...] = (), megabytes: tuple[float, ...] = ()
) -> None:
    """Compare ways to store embeddings, and write what the table and the figure are made of.

    Args:
        methods: Names of benchmarks/methods.py; default: all.
        megabytes: Sizes, in 10^6 bytes; default: the full table's divided by COMPRESSIONS.
    """
    results = measure(methods, megabytes, asked.study(STUDY, TINY), QUICK if asked.quick else EFFORT)
    asked.finish(results, table, RESULTS)


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m benchmarks.methods")
    except (RobeError, DataError) as error:
        sys.exit(f"error: {error}")
