"""Rows per second and peak memory of `prepare`, beside other readers of the same files.

    python -m benchmarks.prepare [--megabytes 2000] [--rounds 3] [--only text|gzip]

The files are synthetic: some rows in Criteo's format, over and over, in four days. Each reader has a process
of its own, and they take turns. What they do with the rows:

    polars    a streaming scan, hexadecimal to numbers, everything thrown away: what parsing alone takes
    ours      `prepare`: checked, transformed, counted, hashed and written
    pyarrow, pandas    read in chunks, the hexadecimal left as text, everything thrown away
"""

import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.measure import cpu_seconds_of_others, machine
from data_pipeline.logs import count_rows
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.schema import CRITEO
from data_pipeline.synthetic import CHUNK_ROWS, Law, SyntheticConfig, to_text
from data_pipeline.whole_files import write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DAYS = 4


def polars(files: list[Path], out: Path) -> None:
    import polars as pl

    columns = {CRITEO.label: pl.Int32} | dict.fromkeys(CRITEO.dense, pl.Int64)
    columns |= dict.fromkeys(CRITEO.categorical, pl.String)
    log = pl.scan_csv(files, separator="\t", has_header=False, quote_char=None, schema=columns)
    numbers = pl.col(CRITEO.categorical).str.to_integer(base=16, dtype=pl.UInt32)
    log.with_columns(numbers).sink_batches(lambda batch: None, engine="streaming")


def ours(files: list[Path], out: Path) -> None:
    prepare(PrepareConfig(tuple(files), out))


def pyarrow(files: list[Path], out: Path) -> None:
    import pyarrow as pa
    from pyarrow import csv

    types = {CRITEO.label: pa.int32()} | dict.fromkeys(CRITEO.dense, pa.int64())
    types |= dict.fromkeys(CRITEO.categorical, pa.string())
    for file in files:
        batches = csv.open_csv(
            file,
            read_options=csv.ReadOptions(column_names=CRITEO.columns),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=csv.ConvertOptions(column_types=types),
        )
        for _ in batches:
            pass


def pandas(files: list[Path], out: Path) -> None:
    import pandas as pd

    types = {CRITEO.label: "int32"} | dict.fromkeys(CRITEO.dense, "Int64")
    types |= dict.fromkeys(CRITEO.categorical, "str")
    for file in files:
        compression = "gzip" if file.suffix == ".gz" else None
        chunks = pd.read_csv(
            file, sep="\t", names=CRITEO.columns, dtype=types, chunksize=100_000, compression=compression
        )
        for _ in chunks:
            pass


READERS = {reader.__name__: reader for reader in (polars, ours, pyarrow, pandas)}


def make(folder: Path, megabytes: float, packed: bool) -> list[Path]:
    """Four files of so many MB of text in all."""
    law = Law(SyntheticConfig(out=folder, scale=1.0))
    chunks = min(16, int(megabytes * 1e6 / DAYS / 250 / CHUNK_ROWS) + 1)
    parts = (law.draw(CHUNK_ROWS, number) for number in range(chunks))
    text = b"".join(to_text(chunk, law.values(chunk.ranks)) for chunk in parts)
    repeats = max(1, round(megabytes * 1e6 / DAYS / len(text)))
    piece = gzip.compress(text, 6) if packed else text
    files = [folder / f"day_{day}{'.gz' if packed else ''}" for day in range(DAYS)]
    for file in files:
        with open(file, "wb") as stream:
            for _ in range(repeats):
                stream.write(piece)
    return files


def child(reader: str, files: list[Path]) -> dict:
    """Seconds and peak memory of a reader in a new process; raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory(dir=files[0].parent) as folder:
        command = [sys.executable, "-m", "benchmarks.prepare", "--child", reader, "--out", f"{folder}/out"]
        command += ["--files", *map(str, files)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{reader}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_child(reader: str, files: list[Path], out: Path) -> dict:
    start = time.perf_counter()
    READERS[reader](files, out)
    seconds = time.perf_counter() - start
    # Not getrusage: on Linux its maximum includes that of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    return {"seconds": seconds, "peak_mib": round(int(peak) / 1024)}


def compare(megabytes: float, rounds: int, packed: bool) -> dict:
    """All readers on the same files, in turns."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        files = make(Path(folder), megabytes, packed)
        rows = sum(count_rows(file) for file in files)  # the files are then in the page cache, too
        start, others, turns = time.monotonic(), cpu_seconds_of_others(), {}
        for _ in range(rounds):
            for reader in READERS:
                try:
                    turns.setdefault(reader, []).append(child(reader, files))
                except RuntimeError as error:
                    print(error)
        used = (cpu_seconds_of_others() - others) / (time.monotonic() - start)
        result = {
            "megabytes_of_text": megabytes,
            "megabytes_on_disk": round(sum(file.stat().st_size for file in files) / 1e6),
            "rows": rows,
            "rounds": rounds,
            "cores_used_by_others": max(0.0, round(used, 2)),
            "readers": {},
        }
    for reader, found in turns.items():
        ratios = [base["seconds"] / own["seconds"] for base, own in zip(turns["polars"], found, strict=True)]
        result["readers"][reader] = {
            "rows_per_second": round(rows / statistics.median(turn["seconds"] for turn in found)),
            "of_polars": round(statistics.median(ratios), 3),
            "of_polars_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "peak_mib": max(turn["peak_mib"] for turn in found),
        }
    return result


def main(
    megabytes: float = 2000,
    rounds: int = 3,
    only: Literal["text", "gzip"] | None = None,
    out: Path = RESULTS / "prepare.json",
    child: str | None = None,
    files: tuple[Path, ...] = (),
) -> None:
    """Compare readers of raw logs.

    Args:
        megabytes: Text in all, unpacked.
        rounds: Turns of each reader.
        only: One form of file; the other keeps what the file of results says of it.
        out: The file of results, in JSON.
        child: For this program itself: run this reader on the files.
        files: For this program itself.
    """
    if child is not None:
        print(json.dumps(run_child(child, list(files), out)))
        return
    results = json.loads(out.read_text()) if only and out.exists() else {}
    for form in ("text", "gzip"):
        if only in (None, form):
            results[form] = compare(megabytes, rounds, packed=form == "gzip")
            results[form]["machine"] = machine("cpu")
            write_json(out, results)
            for reader, figures in results[form]["readers"].items():
                print(form, reader, figures, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
