"""The processor time, on one thread, of predictions by a run and by the ONNX file that was exported from it.

    python -m benchmarks.onnx_runtime RUN FILE

Other programs on the machine hardly change it, as they do the time that passes.
"""

import os

os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import tyro

import robe
from benchmarks.measure import agree

ROWS = 1, 2048
SPENT = 2.0  # seconds on each of them, in turns


def compare(run: tyro.conf.Positional[Path], file: tyro.conf.Positional[Path]) -> None:
    """Print the median of both in milliseconds, for random rows of any ids.

    Args:
        run: The folder of a run.
        file: What `export` made of it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    ours, theirs = robe.load(run, "cpu"), onnxruntime.InferenceSession(file, options)
    rng, counts = np.random.default_rng(0), ours.data.cardinalities
    for rows in ROWS:
        dense = rng.standard_normal((rows, ours.data.dense), np.float32)
        ids = rng.integers(0, counts, (rows, len(counts)))
        calls = {
            "robe.load(RUN).predict": partial(ours.predict, dense, ids),
            "onnxruntime": partial(theirs.run, ["probability"], {"dense": dense, "ids": ids}),
        }
        agree(f"{rows} rows", *(np.ravel(call()) for call in calls.values()))
        times = {name: [] for name in calls}
        while min(map(sum, times.values())) < SPENT:
            for name, call in calls.items():
                times[name].append(processor_time(call))
        for name, seconds in times.items():
            print(f"{rows:5,} rows: {1e3 * np.median(seconds):8.2f} ms  {name}")


def processor_time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    tyro.cli(compare)
