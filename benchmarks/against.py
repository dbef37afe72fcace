"""How fast this revision is beside another one: every CPU kernel, look-ups, updates, and whole steps.

    python -m benchmarks.against REVISION [--threads 1 2] [--only kernels|steps] [--quick]

Two processes, one for each revision, do the same work in turns of some 50 ms: whatever else the machine does
strikes both. The result for a piece of work is the ratio of the times of two turns in succession, new over
old, so above 1 is slower: its median and quartiles. Processes are started anew several times, because where
their arrays happen to lie makes a difference of some percent. Work that only one of the two knows, such as an
operation that was split, is left out and named; look-ups, updates and steps are there in both.

Writes benchmarks/results/against-REVISION.json, unless --quick.
"""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from benchmarks.measure import BenchmarkError, machine, spread
from benchmarks.peer import process_jobs
from benchmarks.revision import ROOT, checked_out, environment, git
from data_pipeline.whole_files import write_json
from robe.progress import progress_bar
from robe.threads import THREAD_POLICY

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).with_name("against_worker.py")
SECONDS = 0.05  # of a turn
STARTS, ROUNDS = 3, 8  # fresh pairs of processes, and turns of each piece of work with every pair


def variables(tree: Path, threads: int) -> dict[str, str]:
    pools = ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return environment(tree) | THREAD_POLICY | dict.fromkeys(pools, str(threads))


def paired(
    trees: tuple[Path, Path], parts: tuple[str, ...], threads: int, quick: bool = False
) -> tuple[dict[str, list[tuple[float, float]]], list[str]]:
    """(Name -> seconds per call of two trees, in turns that followed one another; work of one tree only)."""
    starts, rounds, seconds = (1, 2, 1e-4) if quick else (STARTS, ROUNDS, SECONDS)
    command = [sys.executable, "-P", WORKER, ",".join(parts), str(seconds), *["quick"] * quick]
    times, alone = {}, set()
    title = f"{threads} thread{'s' * (threads > 1)}"
    with progress_bar(title, "turns") as update:
        for start in range(starts):
            with contextlib.ExitStack() as stack:
                jobs = [
                    stack.enter_context(process_jobs(command, variables(tree, threads))) for tree in trees
                ]
                both = [name for name in jobs[0] if name in jobs[1]]
                alone |= jobs[0].keys() ^ jobs[1].keys()
                for turn in range(rounds):
                    for i, name in enumerate(both):
                        update((start * rounds + turn) * len(both) + i, starts * rounds * len(both), name)
                        # First one, then the other begins.
                        first = turn % 2
                        pair = {which: jobs[which][name]() for which in (first, 1 - first)}
                        times.setdefault(name, []).append((pair[0], pair[1]))
    return times, sorted(alone)


def row(name: str, threads: int, times: list[tuple[float, float]]) -> dict:
    """What is told of a piece of work; times: (new, old) seconds per call."""
    new, old = np.array(times).T
    medians = {"seconds": float(np.median(new)), "seconds_before": float(np.median(old))}
    # Of what was least disturbed; on a quiet machine it is the median.
    fastest = float(new.min() / old.min())
    return {"work": name, "threads": threads, **medians, "ratio": spread(new / old), "fastest": fastest}


def line(row: dict) -> str:
    low, high = row["ratio"]["quartiles"]
    times = f"{1e3 * row['seconds_before']:>9.3f} -> {1e3 * row['seconds']:<9.3f} ms"
    ratio = f"{row['ratio']['median']:.3f} ({low:.3f}-{high:.3f}), fastest {row['fastest']:.3f}"
    return f"{row['threads']:>2}  {ratio}  {times}  {row['work']}"


def measure(
    revision: Annotated[str, tyro.conf.Positional],
    threads: tuple[int, ...] = (1, 2),
    only: Literal["kernels", "steps"] | None = None,
    quick: bool = False,
    out: Path | None = None,
) -> None:
    """Time the same work with this tree and with another revision, turn by turn.

    Args:
        revision: What git calls the other one; or a folder where it is checked out, which saves compiling its
            kernels.
        threads: Of the kernels and of BLAS, one pass each.
        only: kernels (with look-ups and updates) or steps (with inference).
        quick: Tiny sizes and few turns, to see that everything runs; the figures mean nothing.
        out: The file to write; default: against-REVISION.json in benchmarks/results, none if quick.
    """
    parts = (only,) if only else ("kernels", "steps")
    results = {"revision": git("describe", "--always", "--dirty"), "against": revision, "rows": []}
    with checked_out(revision) as other:
        for count in threads:
            times, alone = paired((ROOT, other), parts, count, quick)
            for name, pairs in times.items():
                results["rows"].append(row(name, count, pairs))
                print(line(results["rows"][-1]), flush=True)
    results |= {"only_in_one": alone, "machine": machine("cpu")}
    if alone:
        print(f"known to one revision only: {', '.join(alone)}")
    if out or not quick:
        out = out or RESULTS / f"against-{Path(revision).name}.json"
        write_json(out, results)
        print(f"{out}: written")


if __name__ == "__main__":
    try:
        tyro.cli(measure, prog="python -m benchmarks.against")
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
