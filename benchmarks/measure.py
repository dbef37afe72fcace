"""Timing, shared by all benchmarks and by the peers' process: turns, rounds, figures, ratios.

A *turn* is one call unmeasured, then calls one after the other for a while, and gives seconds per call. In a
*round* every job has one turn; so what the machine does besides hits all of them. Figures are taken over the
turns of a job, and ratios over the rounds, each of two turns a moment apart.
"""

import math
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robe.errors import RobeError
from robe.progress import progress_bar

# Threads of BLAS that have finished spin for some 30 ms before they sleep: not into the next one's turn.
PAUSE = 0.05
# A turn is quiet if others use less than this of one core; processor time is told in ticks of 10 ms.
QUIET = 0.1
# For so many times its length a turn is tried again.
PATIENCE = 4


class BenchmarkError(RobeError):
    """A benchmark that cannot be run here, or whose subject is wrong."""


class PeerError(BenchmarkError):
    """A job of a peer that failed."""


class Effort(NamedTuple):
    """How much is measured."""

    rounds: int = 9
    seconds: float = 0.15  # of a turn
    table_bytes: float = 10e9  # of the largest tables
    quick: bool = False  # tiny sizes: the code runs, the figures mean nothing

    def pick(self, full, quick):
        return quick if self.quick else full

    def job(self, call: Callable[[], object], synchronize: Callable[[], None]) -> Callable[[], float]:
        """A turn of a call, as `rounds` takes it."""
        return lambda: turn(call, self.seconds, synchronize)


QUICK = Effort(rounds=2, seconds=1e-4, table_bytes=1e6, quick=True)


def rotate(call: Callable, *arguments: list) -> Callable[[], object]:
    """A call that takes the next of each list of arguments, over and over."""
    rounds = cycle(zip(*arguments, strict=True))
    return lambda: call(*next(rounds))


def turn(call: Callable[[], object], seconds: float, synchronize: Callable[[], None]) -> float:
    """Seconds per call: warm, then over as many calls as fill `seconds`, one at least.

    Where other programs used the cores meanwhile it is tried again for a while, and the least disturbed try
    counts: threads that wait for one another lose far more than the time that was taken from them.
    """
    call()
    synchronize()
    tries, start = [], time.perf_counter()
    while True:
        others, begin = cpu_seconds_of_others(), time.perf_counter()
        per_call = _repeat(call, seconds, synchronize)
        end = time.perf_counter()
        disturbed = (cpu_seconds_of_others() - others) / (end - begin)
        tries.append((disturbed, per_call))
        if disturbed < QUIET or end - start > PATIENCE * seconds:
            return min(tries)[1]


def _repeat(call: Callable[[], object], seconds: float, synchronize: Callable[[], None]) -> float:
    """Seconds per call. The device is waited for at the end only: it may work ahead, as in training."""
    start = time.perf_counter()
    call()
    synchronize()
    once = time.perf_counter() - start
    if (count := int(seconds / once)) < 2:
        return once
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


def cpu_seconds_of_others() -> float:
    """Processor time that other programs, and other machines on this one's host, have used so far.

    The peer's process counts as ours once it has ended.
    """
    user, nice, system, _, _, *rest = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    ticks = sum(map(int, (user, nice, system, *rest)))
    children = os.times().children_user + os.times().children_system
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time() - children


def rounds(
    title: str,
    jobs: dict[str, Callable[[], float]],
    count: int,
    pause: float = PAUSE,
    until: float = math.inf,
) -> dict[str, np.ndarray]:
    """Name -> what each of `count` turns of that job gave.

    until: of `time.monotonic()`, from when on no round is begun but the first. A peer's job that fails is
    left out, with a line that says why.
    """
    times, failed = {name: [] for name in jobs}, set()
    with progress_bar(title, "turns") as update:
        for done in range(count):
            if done and time.monotonic() > until:
                break
            for i, (name, job) in enumerate(jobs.items()):
                update(done * len(jobs) + i, count * len(jobs), name)
                if name in failed:
                    continue
                time.sleep(pause)
                try:
                    times[name].append(job())
                except PeerError as error:
                    failed.add(name)
                    print(f"not measured: {error}", file=sys.stderr)
    return {name: np.array(values) for name, values in times.items() if name not in failed}


def spread(values: np.ndarray) -> dict:
    """Median, quartiles, extremes and number of measured values."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "range": [float(min(values)), float(max(values))],
        "repeats": len(values),
    }


def figure(group: str, name: str, values: np.ndarray, unit: str = "s", **facts) -> dict:
    return {"group": group, "name": name, "unit": unit, **spread(values), **facts}


def ratio(
    what: str, peer: str, ours: np.ndarray, theirs: np.ndarray, limit: np.ndarray | None = None
) -> dict:
    """How many times as fast as a peer we are, round by round; and the time of a limit as a share of ours."""
    row = {
        "what": what,
        "peer": peer,
        "seconds": float(np.median(ours)),
        "peer_seconds": float(np.median(theirs)),
    }
    row["ratio"] = spread(theirs / ours)
    # Of what was least disturbed; on a quiet machine it is the median.
    row["fastest"] = float(min(theirs) / min(ours))
    if limit is not None:
        row["of_limit"] = float(np.median(limit / ours))
    return row


def agree(what: str, found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Raise BenchmarkError unless arrays agree: no figure is told of a wrong kernel."""
    error = np.max(np.abs(found - expected) / (1 + np.abs(expected)), initial=0)
    if not error <= tolerance:  # NaN is not good either
        raise BenchmarkError(f"{what}: wrong by {error:g}; no time is told of it")


def memory_available() -> float:
    """Bytes that can be had without pushing others out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def table_limit(effort: Effort) -> float:
    """Bytes of the largest table: what is wanted, or what leaves room for what it is made from."""
    return min(effort.table_bytes, 0.6 * memory_available())


def machine(device: str) -> dict:
    """Where and with what it is measured. device: the backend's description."""
    import numba
    from threadpoolctl import threadpool_info

    packages = (
        "robe-dlrm",
        "numpy",
        "numba",
        "numba-cuda",
        "polars",
        "pyarrow",
        "pandas",
        "isal",
        "cupy-cuda12x",
        "cupy-cuda13x",
        "nvmath-python",
        "torch",
        "fbgemm-gpu",
    )
    cpu = next(
        (
            x.split(": ")[1]
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith("model name")
        ),
        platform.machine(),
    )
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "device": device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "threads": numba.get_num_threads(),
        "blas": [f"{p['internal_api']} {p['version']}" for p in threadpool_info() if p["user_api"] == "blas"],
        "huge_pages": huge.read_text().strip() if huge.exists() else "unknown",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
