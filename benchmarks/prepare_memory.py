"""Speed and peak memory of `prepare` by size of the log: the peak must not grow with the log.

    python benchmarks/prepare_memory.py [ROWS ...]

Prints one JSON line per size of the log, plain and gzip. A log is 50,000 random rows, over and over; being a
single file, it is read twice, once to count the rows.
"""

import gzip
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

UNIT = 50_000
ROOT = Path(__file__).parents[1]

# Each run has a process of its own, as memory once used may never be given back.
WORKER = r"""
import json, re, sys, time
from pathlib import Path
import numpy, polars
from data_pipeline.prepare import PrepareConfig, prepare

log, out = map(Path, sys.argv[1:])
start = time.perf_counter()
manifest = prepare(PrepareConfig((log,), out))
seconds = time.perf_counter() - start
rows = sum(day.rows for day in manifest.days)
# Not getrusage: on Linux its maximum includes that of the process that started this one.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({
    "rows": rows, "rows_per_second": round(rows / seconds), "peak_mib": round(peak),
    "threads": polars.thread_pool_size(), "numpy": numpy.__version__, "polars": polars.__version__,
}))
"""


def unit(seed: int = 0) -> bytes:
    """UNIT lines: about 3% clicks, 20% of the values missing, ids from 10 to 10**6 per feature."""
    rng = np.random.default_rng(seed)
    dense = np.floor(rng.pareto(0.7, (UNIT, 13)).clip(0, 1e9)).astype(np.int64)
    # An odd factor spreads the ids over the 32 bits.
    ids = rng.integers(0, np.logspace(1, 6, 26).astype(np.int64), (UNIT, 26)) * 0x9E3779B1 % 2**32
    missing = rng.random((UNIT, 39)) < 0.2
    fields = np.concatenate([np.char.mod("%d", dense), np.char.mod("%08x", ids)], axis=1)
    fields[missing] = ""
    label = (rng.random((UNIT, 1)) < 0.03).astype(int).astype(str)
    return "".join("\t".join(row) + "\n" for row in np.concatenate([label, fields], axis=1).tolist()).encode()


def measure(piece: bytes, repeats: int) -> dict:
    """Prepare a log that is `piece` again and again; what the worker answers."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with open(log, "wb") as file:
            for _ in range(repeats):
                file.write(piece)
        worker = [sys.executable, "-c", WORKER, str(log), str(Path(folder, "out"))]
        answer = subprocess.run(worker, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return json.loads(answer) | {"file_mib": round(log.stat().st_size / 2**20)}


def main(sizes: list[int]) -> None:
    text = unit()
    for compressed, piece in ((False, text), (True, gzip.compress(text, 6))):
        for rows in sizes:
            result = {"gzip": compressed, **measure(piece, rows // UNIT), "machine": platform.machine()}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main([int(rows) for rows in sys.argv[1:]] or [200_000, 1_000_000, 4_000_000])
