"""Rows per second of the loader from the page cache, and its peak memory by size of the data.

    python -m benchmarks.loader [--quick] [--out FILE]

Beside it, in one thread each, as they are commonly written:

    NumPy     shards mapped, the rows of each day permuted, a batch gathered by fancy indexing
    TorchRec  what InMemoryBinaryCriteoIterDataPipe does in NumPy: the shards in memory, batches in the order
              of the log and shuffled within, the ids transposed (so not the same shuffle, nor a fair one)

Writes benchmarks/results/loader.json, from which the table in docs/speed.md is made.
"""

from robe.threads import share_cores

share_cores()  # before anything that loads NumPy

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from benchmarks.measure import (
    QUICK,
    BenchmarkError,
    Effort,
    cpu_seconds_of_others,
    figure,
    machine,
    ratio,
    rounds,
)
from data_pipeline.batches import Batch, Rows
from data_pipeline.manifest import KINDS, Day, Ids, Manifest, shard_name
from data_pipeline.schema import CRITEO
from data_pipeline.whole_files import write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DAYS = 4
OURS = "ours, shuffled"


def make(folder: Path, rows: int) -> Manifest:
    """A prepared folder of random rows, in DAYS days, all of them to train on."""
    rng, days = np.random.default_rng(0), np.diff(np.linspace(0, rows, DAYS + 1).astype(int)).tolist()
    for day, n in enumerate(days):
        arrays = (
            rng.integers(0, 2, (n, 1), np.int32),
            rng.random((n, len(CRITEO.dense)), np.float32),
            rng.integers(0, 2**32, (n, len(CRITEO.categorical)), np.uint32).view(np.int32),
        )
        for kind, array in zip(KINDS, arrays, strict=True):
            np.save(folder / shard_name(day, kind), array)
    split = {"train": tuple((day, 0, n) for day, n in enumerate(days))}
    split |= dict.fromkeys(("test", "validation"), ((0, 0, 1),))
    ids = Ids("hash", (rows,) * len(CRITEO.categorical), False)
    Manifest(CRITEO, "none", ids, tuple(Day(n, {}, "random") for n in days), split, "all").save(folder)
    return Manifest.load(folder)


def mapped(manifest: Manifest, day: int) -> list[np.ndarray]:
    """The shards of a day, mapped."""
    return [np.load(manifest.folder / shard_name(day, kind), mmap_mode="r") for kind in KINDS]


def numpy_batches(manifest: Manifest, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    for day, _, rows in manifest.split["train"]:
        label, dense, ids = mapped(manifest, day)
        order = rng.permutation(rows)
        for start in range(0, rows, size):
            chosen = order[start : start + size]
            yield Batch(label[chosen, 0].astype(np.float32), dense[chosen], ids[chosen].view(np.uint32))


def torchrec_batches(
    days: list[list[np.ndarray]], size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, ...]]:
    for label, dense, ids in days:
        for start in range(0, len(label), size):
            part = slice(start, start + size)
            order = rng.permutation(len(label[part]))
            shuffled = label[part][order], dense[part][order], ids[part][order]
            yield shuffled[0].reshape(-1), shuffled[1], shuffled[2].T.reshape(-1)


def jobs(manifest: Manifest, size: int) -> dict[str, Callable[[], Iterator]]:
    """Name -> an epoch of batches."""
    rows, rng = Rows(manifest, "train"), np.random.default_rng(0)
    whole = [[np.array(shard) for shard in mapped(manifest, day)] for day in range(DAYS)]
    return {
        OURS: lambda: rows.batches(size, seed=0),
        "ours, in order": lambda: rows.batches(size),
        "NumPy, shuffled": lambda: numpy_batches(manifest, size, rng),
        "TorchRec, within batches": lambda: torchrec_batches(whole, size, rng),
    }


def check(name: str, epoch: Iterator, manifest: Manifest) -> None:
    """Raise BenchmarkError unless the batches hold the rows of the shards, as sums of their bits tell."""
    days = [mapped(manifest, day) for day in range(DAYS)]
    if (_bits(epoch) != _bits(days)).any():
        raise BenchmarkError(f"{name}: not the rows of the shards; no time is told of it")


def _bits(batches: Iterable) -> np.ndarray:
    total = np.zeros(3, np.uint64)
    for label, *rest in batches:
        total += [array.view(np.uint32).sum(dtype=np.uint64) for array in (label.astype(np.float32), *rest)]
    return total


def speeds(manifest: Manifest, size: int, effort: Effort) -> Iterator[dict]:
    """Rows per second of all, and how many times as fast ours is, in batches of `size` rows."""
    epochs = jobs(manifest, size)
    for name, epoch in epochs.items():
        check(name, epoch(), manifest)
    turns = {name: effort.job(partial(drain, epoch), lambda: None) for name, epoch in epochs.items()}
    times = rounds(f"loader, batch {size}", turns, effort.rounds)
    for name, seconds in times.items():
        yield figure("loader", name, manifest.rows("train") / seconds, "rows/s", batch=size)
    for peer in ("NumPy, shuffled", "TorchRec, within batches"):
        yield ratio(OURS, peer, times[OURS], times[peer]) | {"batch": size}


def drain(epoch: Callable[[], Iterator]) -> None:
    for _ in epoch():
        pass


# A process of its own, as memory once used may never be given back.
WORKER = r"""
import re, sys
from pathlib import Path
from data_pipeline.batches import Rows
from data_pipeline.manifest import Manifest
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
rows, before = Rows(Manifest.load(sys.argv[1]), "train"), peak()
for batch in rows.batches(2048, seed=0):
    pass
print(before, peak())
"""


def memory(manifest: Manifest) -> dict:
    """Peak resident memory of an epoch in a process that does nothing else, and what it had before."""
    worker = [sys.executable, "-c", WORKER, str(manifest.folder)]
    answer = subprocess.run(worker, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    before, peak = (round(int(kib) / 1024) for kib in re.findall(r"\d+", answer))
    return {"rows": manifest.rows("train"), "peak_mib": peak, "before_mib": before}


def measure(quick: bool = False, out: Path | None = None) -> None:
    """Measure how fast batches come, and in how much memory.

    Args:
        quick: A few rows, to see that everything runs; the figures mean nothing.
        out: The file to write; default: loader.json or loader-quick.json in benchmarks/results.
    """
    effort = QUICK if quick else Effort(rounds=5)
    out = out or RESULTS / ("loader-quick.json" if quick else "loader.json")
    rows, needed = [], []
    for count in effort.pick((2_000_000, 8_000_000), (2_000, 8_000)):
        with tempfile.TemporaryDirectory() as folder:
            manifest = make(Path(folder), count)
            if not rows:
                start, others = time.monotonic(), cpu_seconds_of_others()
                for size in effort.pick((128, 2048, 16384), (128,)):
                    rows += speeds(manifest, size, effort)
                disturbed = (cpu_seconds_of_others() - others) / (time.monotonic() - start)
            needed.append(memory(manifest))
    where = machine("loader, 2 threads") | {"cores_used_by_others": max(0.0, round(disturbed, 2))}
    write_json(out, {"machine": where, "rows": rows, "memory": needed})
    print(f"{out}: written")


if __name__ == "__main__":
    tyro.cli(measure, prog="python -m benchmarks.loader")
