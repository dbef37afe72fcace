"""A week of new days: going on from the model of the day before, beside training from scratch every day.

    python -m benchmarks.daily [--rows N] [--days N]

Runs the commands of docs/daily.md on SYNTHETIC days of one law: a first model of two days, then each day one
more with `prepare --append` and `train --start`, and `train` from scratch on all days so far. Both are tested
on the first half of the day that comes next. The law does not change from day to day, so what is shown is
what more rows bring, and rare values that are new, but not how fast a model follows the world.

Writes benchmarks/results/daily.json; `python -m benchmarks.readme` then writes the table.
"""

from robe.threads import share_cores

share_cores()  # before anything that loads NumPy

import contextlib
import io
import json
import shutil
from pathlib import Path

import tyro

from analysis import claim
from benchmarks.measure import machine
from data_pipeline.whole_files import write_json
from robe.backend import select
from robe.cli import main as robe

RESULTS = Path(__file__).parent / "results" / "daily.json"
FOLDER = claim.OUT / "daily"
FIRST = 3  # days of the first folder, of which the last one tests
# Name -> the dialect of its ids, and what its model is trained with.
WAYS = {
    "ROBE, 100x": ("hash", ["--method", "robe", "--compression", "100"]),
    "full table": ("dictionary", ["--method", "full"]),
}
TRAINING = ["--optimizer", "adagrad", "--lr", "0.03", "--batch", "512", "--eval-every", "1000000"]


def call(*words: object) -> None:
    """Run a command; what it prints is of no use here."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        robe([str(word) for word in words])


def measure(rows: int, days: int, folder: Path = FOLDER) -> dict:
    """What results/daily.json holds; rows: of a day; days: in all."""
    shutil.rmtree(folder, ignore_errors=True)
    raw, found = folder / "raw", []
    law = "--scale", 0.05, "--zipf", 1.05, "--decay", 0.1
    call("synth", "--rows", rows * days, "--days", days, *law, "--out", raw)
    logs = [raw / f"day_{day}" for day in range(days)]
    for way, (ids, model) in WAYS.items():
        data = folder / f"{ids}_{FIRST}"
        call("prepare", *logs[:FIRST], "--ids", ids, "--dense", "zscore", "--out", data)
        started = folder / f"{way} {FIRST}"
        call("train", "--data", data, *model, *TRAINING, "--out", started)
        for day in range(FIRST, days):
            before, data = (data, started), folder / f"{ids}_{day + 1}"
            started, scratch = (folder / f"{how}{way} {day + 1}" for how in ("", "scratch "))
            call("prepare", logs[day], "--append", before[0], "--out", data)
            call("train", "--start", before[1], "--data", data, *TRAINING[-2:], "--out", started)
            call("train", "--data", data, *model, *TRAINING, "--out", scratch)
            found.append(
                {
                    "way": way,
                    "day": day - FIRST + 1,
                    **{name: figures(run) for name, run in (("started", started), ("scratch", scratch))},
                }
            )
            print(f"{way}, day {day - FIRST + 1}: {found[-1]['started']}, {found[-1]['scratch']}", flush=True)
    return {"machine": machine(select().description), "rows_of_a_day": rows, "rows": found}


def figures(run: Path) -> dict:
    """What is told of a run."""
    summary = json.loads((run / "summary.json").read_text())
    return {
        "auc": summary["test"]["auc"],
        "seconds": summary["seconds"],
        "rows": summary["rows_trained"],
        "bytes": summary["embedding_bytes"],
        "best": summary["bayes"]["test"]["auc"],
    }


def table(results: dict) -> str:
    """The figures as a table in Markdown: a line for each day."""
    lines = [
        f"SYNTHETIC days of {results['rows_of_a_day']:,} rows; test AUC on the first half of the next day, "
        "and seconds of training.",
        "",
        "| embeddings | day | bytes | AUC, gone on | scratch | seconds, gone on | scratch | best AUC |",
        "| --- " * 8 + "|",
    ]
    for row in results["rows"]:
        started, scratch = row["started"], row["scratch"]
        cells = [row["way"], f"{row['day']}", f"{started['bytes']:,}"]
        cells += [f"{one['auc']:.4f}" for one in (started, scratch)]
        cells += [f"{one['seconds']:.1f}" for one in (started, scratch)] + [f"{started['best']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(rows: int = 100_000, days: int = 10, out: Path = RESULTS) -> None:
    """Train a week of days both ways, and write what docs/daily.md tells of it.

    Args:
        rows: Of a day.
        days: In all; the first three come before the week.
        out: The file to write.
    """
    results = measure(rows, days)
    write_json(out, results)
    print(table(results))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.daily")
