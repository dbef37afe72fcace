"""Mixed precision beside the float32 table it stands for: what it costs in AUC, and how many bytes it saves.

    python -m benchmarks.quality [--quick] [--data PREPARED] [--seeds N] [--batch N]

The DLRM of the preset `small`, but for its width, and SGD at a rate that falls from 1 to 0 over the second
half of one pass; SYNTHETIC rows of the default law of data_pipeline/synthetic.py, or those given by --data
(dictionary ids). INT8 has a cache of 5% of the rows and INT4 one of 1%, as in arXiv 2010.11305. With SGD all
make the same steps, but for the rounding; Adagrad would have sums for each element of the table, and one for
each row of codes. Differences are between trainings of equal seeds, and small: so there are many rows.

Trainings are kept in analysis/out/quality, see analysis/trainings.py. Writes
benchmarks/results/quality.json; `python -m benchmarks.readme` then writes the table.
"""

from robe.threads import share_cores

share_cores()  # before anything that loads NumPy

import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from analysis import claim
from analysis.claim import mean_interval
from analysis.trainings import Study, Trainings, synthetic_data
from benchmarks.measure import machine
from benchmarks.methods import Asked, settings
from data_pipeline.folders import open_folder
from data_pipeline.schema import DataError
from robe.config import EmbeddingConfig, ModelConfig, OptimizerConfig, TrainConfig, resolve
from robe.embeddings import planned_bytes
from robe.errors import RobeError

RESULTS = Path(__file__).parent / "results" / "quality.json"
CACHE = claim.OUT / "quality"

FULL = "float32 table"
METHODS = {
    FULL: EmbeddingConfig("full"),
    "INT8, 5% cached": EmbeddingConfig("mixed_precision", bits=8),
    "INT4, 1% cached": EmbeddingConfig("mixed_precision", bits=4),
}
WIDTHS = (16, 64)
MORE_WIDTHS = (128, 256)  # of which only the bytes are told
OPTIMIZER = OptimizerConfig("sgd", 1.0)

STUDY = Study(rows=4_000_000, scale=0.02, zipf=1.2, decay=0.5, seeds=5)
TINY = Study(rows=16_000, scale=0.005, seeds=2, batch=320)


def measure(study: Study = STUDY, cache: Path = CACHE, say: Callable[[str], None] = print) -> dict:
    """Train what the cache lacks; what results/quality.json holds."""
    manifest = open_folder(study.data or synthetic_data(study, cache))
    say(f"data: {manifest.describe()}")
    trainings = Trainings(manifest, study.batch, cache, say)
    found = {(width, name): [] for width in WIDTHS for name in METHODS}
    # Seed by seed, so that a study cut short has all points.
    for seed in range(1, 1 + study.seeds):
        for (width, name), summaries in found.items():
            run = seed, study.batch, trainings.steps_per_pass, width
            config = settings(METHODS[name], OPTIMIZER, *run)
            summaries.append(trainings.trained(config, f"{name}, D = {width}, seed {seed}")[0])
    bayes = manifest.synthetic and manifest.synthetic["bayes"]
    rows = sum(trainings.spec.cardinalities)
    return {
        "machine": machine(trainings.backend.description),
        "data": manifest.describe(),
        "train_rows": manifest.rows("train"),
        "test_rows": manifest.rows("test"),
        "table_rows": rows,
        "batch": study.batch,
        "best": bayes and bayes["test"]["auc"],
        "rows": [
            {
                "method": name,
                "width": width,
                "bytes": summaries[0]["embedding_bytes"],
                # The loop's validation half is the test half, see Trainings.
                "auc": [summary["validation"]["auc"] for summary in summaries],
                "log_loss": [summary["validation"]["log_loss"] for summary in summaries],
            }
            for (width, name), summaries in found.items()
        ],
        "smaller": {
            name: {width: smaller(embedding, width, trainings.spec) for width in (*WIDTHS, *MORE_WIDTHS)}
            for name, embedding in METHODS.items()
            if name != FULL
        },
    }


def smaller(embedding: EmbeddingConfig, width: int, spec) -> float:
    """Bytes of the float32 table over those of rows and cache."""
    held = planned_bytes(resolve(TrainConfig(ModelConfig(width=width), embedding)), spec)
    stored = held["embedding weights"] + held["embedding cache"]
    return 4 * width * sum(spec.cardinalities) / stored


def table(results: dict) -> str:
    """The figures of a study as tables in Markdown."""
    by = {(row["width"], row["method"]): row for row in results["rows"]}
    seeds = len(results["rows"][0]["auc"])
    lines = [
        f"{results['train_rows']:,} training and {results['test_rows']:,} test rows, "
        f"{results['table_rows']:,} rows of tables, batch {results['batch']}, {seeds} seeds"
        + (f"; the best possible test AUC is {results['best']:.4f}" if results["best"] else "")
        + ". ± are 95% intervals over the seeds, of differences between equal seeds.",
        "",
        "| D | embeddings | bytes, with cache | test AUC | less the table's | log loss, less the table's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (width, name), row in by.items():
        middle, half = mean_interval(row["auc"])
        cells = [f"{width}", name, f"{row['bytes']:,}", f"{middle:.4f} ± {half:.4f}"]
        for kind in ("auc", "log_loss"):
            pairs = zip(row[kind], by[width, FULL][kind], strict=True)
            middle, half = mean_interval([ours - theirs for ours, theirs in pairs])
            cells.append(f"{middle:+.5f} ± {half:.5f}" if name != FULL else "")
        lines.append(f"| {' | '.join(cells)} |")
    widths = list(next(iter(results["smaller"].values())))
    lines += [
        "",
        f"| times smaller, with cache | {' | '.join(f'D = {width}' for width in widths)} |",
        "| --- " * (1 + len(widths)) + "|",
    ]
    for name, ratios in results["smaller"].items():
        lines.append(f"| {name} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios.values())} |")
    return "\n".join(lines)


def main(asked: tyro.conf.OmitArgPrefixes[Asked]) -> None:
    """Compare mixed precision with the table it stands for, and write what docs/results.md tells of it."""
    asked.finish(measure(asked.study(STUDY, TINY)), table, RESULTS)


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m benchmarks.quality")
    except (RobeError, DataError) as error:
        sys.exit(f"error: {error}")
