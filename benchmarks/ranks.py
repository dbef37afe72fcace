"""Two processes that train one model beside one, ours and PyTorch's, each of one thread.

    python -m benchmarks.ranks [--quick]

Steps of the presets `kaggle` and `mlperf` by batches of 2,048, with ROBE arrays 1,000 times smaller than the
published tables. In a round each of these has a turn:

    alone           one process, by whole batches
    shared          two ranks of mpiexec, by half of each batch (ranks_worker.py)
    shared, late    the same, but dense gradients are added up when the backward pass is done
    apart           two processes at once that know nothing of each other, each by whole batches: what two
                    cores of this machine give at most, as they share caches and memory
    PyTorch         the same DLRM, alone and by DistributedDataParallel over gloo (torch_ranks.py): with the
                    published ROBE in an array as large as ours, and with full tables, of TABLES bytes

It needs the extra `mpi` and an mpiexec, and PyTorch for its rows. Takes some four minutes, and writes
benchmarks/results/ranks.json, unless --quick; `python -m benchmarks.readme` then writes the table of
docs/cluster.md.
"""

import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from analysis.staleness import mpiexec
from benchmarks.measure import (
    BenchmarkError,
    PeerError,
    cpu_seconds_of_others,
    machine,
    rounds,
    spread,
)
from benchmarks.peer import environment, process_jobs, torch_here
from benchmarks.step import config
from benchmarks.workload import Workload
from data_pipeline.whole_files import write_json
from robe.config import EmbeddingConfig
from robe.errors import RobeError
from robe.estimate import RATES, exchanged, shared_compute
from robe.threads import THREAD_POLICY

RESULTS = Path(__file__).parent / "results" / "ranks.json"
BATCH, BLOCK, COMPRESSION, RANKS = 2048, 32, 1000, 2
TABLES = 2.2e9  # bytes of PyTorch's tables, of which there are three copies
POOLS = ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
ONE_THREAD = dict.fromkeys(POOLS, "1")
PEERS = "tables", "published ROBE"


class Case(NamedTuple):
    """steps: of a turn; seconds: how long turns go on."""

    preset: str
    steps: int
    seconds: float


CASES = Case("kaggle", 8, 60), Case("mlperf", 2, 120)


def starter() -> list[str]:
    """The command that starts the ranks."""
    if (found := mpiexec()) is None:
        raise BenchmarkError("no mpiexec: pip install mpich, or apt-get install mpich")
    return [found, "-n", str(RANKS)]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def at_once(asks: list[Callable[[], object]]) -> list:
    """What calls return that begin together."""
    with ThreadPoolExecutor(len(asks)) as pool:
        return [asked.result() for asked in [pool.submit(ask) for ask in asks]]


def peer_turn(name: str, asks: list[Callable[[], float]]) -> float:
    try:
        return max(at_once(asks))
    except (BenchmarkError, BrokenPipeError) as error:
        raise PeerError(f"PyTorch, {name}: {error}") from None


def run(case: Case, batch: int = BATCH, table_bytes: float = np.inf, count: int = 9) -> dict:
    """Rows per second of all that have turns, and what the ranks told of their steps.

    table_bytes: of the tables, if they are to be smaller; count: the most rounds.
    """
    work = Workload(case.preset, table_bytes)
    sizes = {"preset": case.preset, "batch": batch, "count": case.steps}
    sizes |= {"table_bytes": work.full_bytes, "megabytes": work.full_bytes / COMPRESSION / 1e6}
    sizes["block"] = min(BLOCK, work.width)
    told: dict[str, list[dict]] = defaultdict(list)

    with ExitStack() as stack:

        def start(module: str, before: list[str], variables: dict[str, str], **settings) -> dict:
            command = [*before, sys.executable, "-m", f"benchmarks.{module}", json.dumps(sizes | settings)]
            return stack.enter_context(process_jobs(command, variables | ONE_THREAD))

        def ours(before: list[str], **settings) -> Callable[[], dict]:
            return start("ranks_worker", before, os.environ | THREAD_POLICY, **settings)["step"]

        def turn(name: str, asks: list[Callable[[], dict]]) -> Callable[[], float]:
            def job() -> float:
                answers = at_once(asks)
                told[name].append(answers[0])
                return max(answer["seconds"] for answer in answers)

            return job

        alone, other = ours([]), ours([])
        jobs = {
            "alone": turn("alone", [alone]),
            "shared": turn("shared", [ours(starter())]),
            "shared, late": turn("shared, late", [ours(starter(), late=True)]),
            "apart": turn("apart", [alone, other]),
        }
        if torch_here():
            further = {"peer_bytes": min(TABLES, table_bytes)}
            for ranks in 1, RANKS:
                further |= {"port": free_port(), "ranks": ranks}
                # They wait for each other as they begin.
                peers = at_once(
                    [
                        lambda rank=rank, further=dict(further): start(
                            "torch_ranks", [], environment(), rank=rank, **further
                        )
                        for rank in range(ranks)
                    ]
                )
                for name in PEERS:
                    jobs[f"{name} {ranks}"] = partial(peer_turn, name, [each[name] for each in peers])
        times = rounds(case.preset, jobs, count, until=time.monotonic() + case.seconds)
    found = sizes | {"rounds": len(times["alone"]), **figures(times, batch), **of_steps(told)}
    return found | {"planned": planned(work, found, float(np.median(times["alone"])))}


def planned(work: Workload, found: dict, alone: float) -> float:
    """How many times as fast as one process two should be by the arithmetic of `robe plan --processes`, with
    the bytes and the link that were measured, and one of the cores of which its rates tell."""
    embedding = EmbeddingConfig(megabytes=found["megabytes"], block=found["block"])
    settings = config(work.preset, embedding, found["batch"])
    rates = json.loads(RATES.read_text())
    most = exchanged(settings, work.data())
    own = shared_compute(settings, work.data(), alone, rates["update"] / rates["cores"], most, RANKS)
    return alone / (own + found["bytes"] / found["link"])


def figures(times: dict[str, np.ndarray], batch: int) -> dict:
    """Rows per second, and ratios round by round."""
    pairs = {"shared": "alone"} | {f"{name} {RANKS}": f"{name} 1" for name in PEERS}
    rows = {name: spread(batch * (1 + (name == "apart")) / seconds) for name, seconds in times.items()}
    return {
        "rows_per_second": rows,
        "faster": {
            **{two: spread(times[one] / times[two]) for two, one in pairs.items() if two in times},
            "apart": spread(2 * times["alone"] / times["apart"]),
            "shared, late": spread(times["alone"] / times["shared, late"]),
        },
        "of_apart": spread(times["apart"] / 2 / times["shared"]),
        "times_peer": {
            name: spread(times[f"{name} {RANKS}"] / times["shared"])
            for name in PEERS
            if f"{name} {RANKS}" in times
        },
    }


def of_steps(told: dict[str, list[dict]]) -> dict:
    """Medians of the phases, alone and shared; bytes of a step, and how gradients of vectors travelled."""
    phases = {
        name: {
            phase: float(np.median([turn["phases"][phase] for turn in told[name]]))
            for phase in told[name][0]["phases"]
        }
        for name in ("alone", "shared")
    }
    last = told["shared"][-1]
    return {"phases": phases, **{name: last[name] for name in ("bytes", "ways", "link")}}


def measure(quick: bool = False) -> None:
    """Measure two processes that train one model, beside one and beside PyTorch's.

    Args:
        quick: Tiny sizes and few repeats, to see that everything runs; the figures mean nothing.
    """
    start, others, found = time.monotonic(), cpu_seconds_of_others(), []
    for case in CASES:
        found.append(run(case, 64, 1e6, 2) if quick else run(case))
        print("\n".join(lines(found[-1])), flush=True)
    used = (cpu_seconds_of_others() - others) / (time.monotonic() - start)
    if not quick:
        where = machine("cpu") | {"cores_used_by_others": max(0.0, round(used, 2))}
        where["versions"]["mpi4py"] = version("mpi4py")
        write_json(RESULTS, {"machine": where, "cases": found})
        print(f"{RESULTS}: written")


def lines(case: dict) -> Iterator[str]:
    for name, rate in case["rows_per_second"].items():
        told = f"{case['preset']}, {name}: {rate['median']:,.0f} rows/s"
        if faster := case["faster"].get(name):
            low, high = faster["quartiles"]
            told += f", {faster['median']:.2f} times as fast ({low:.2f}-{high:.2f})"
        yield told


def table(results: dict) -> str:
    """Rows per second of one process and of two, ours and PyTorch's, for docs/cluster.md."""
    where, shown = results["machine"], []
    for case in results["cases"]:
        rates, faster = case["rows_per_second"], case["faster"]

        def row(name: str, one: str, two: str, case=case, rates=rates, faster=faster) -> str:
            low, high = faster[two]["quartiles"]
            times = f"{faster[two]['median']:.2f} ({low:.2f}-{high:.2f})"
            model = f"`{case['preset']}`, {name}"
            return f"| {model} | {rates[one]['median']:,.0f} | {rates[two]['median']:,.0f} | {times} |"

        size = f"ROBE {case['megabytes']:.3g} MB"
        shown += [
            row(f"{size}: two that share nothing", "alone", "apart"),
            row(f"{size}: **one model**", "alone", "shared"),
            row(f"{size}: one model, dense gradients added up at the end", "alone", "shared, late"),
            *(row(f"PyTorch, {name}", f"{name} 1", f"{name} {RANKS}") for name in case["times_peer"]),
        ]
    steps = []
    for case in results["cases"]:
        ways, phases = ", ".join(case["ways"]), case["phases"]
        times = "; ".join(
            f"{name} {1e3 * seconds:.3g}"
            + (f" (alone {1e3 * phases['alone'][name]:.3g})" if name in phases["alone"] else "")
            for name, seconds in phases["shared"].items()
        )
        steps.append(
            f"- `{case['preset']}`: {case['bytes'] / 1e6:.2f} MB received a step and process, gradients of "
            f"vectors as {ways}; {case['link'] / 1e9:.2g} GB/s, of which `plan` makes {case['planned']:.2f} "
            f"times as fast. Milliseconds of a step of two processes: {times}."
        )
    versions = where["versions"]
    return "\n".join(
        [
            f"{where['cpu']}, {where['cores']} cores, one thread a process, batches of {BATCH:,}; numba "
            f"{versions['numba']}, mpi4py {versions['mpi4py']}, torch {versions.get('torch', 'none')}, "
            f"{where['date']}; medians and quartiles of "
            f"{' and '.join(str(case['rounds']) for case in results['cases'])} rounds, while other programs "
            f"used {where['cores_used_by_others']:.2f} cores.",
            "",
            "| | rows/s of one process | of two | times as fast |",
            "| --- | --- | --- | --- |",
            *shown,
            "",
            *steps,
        ]
    )


if __name__ == "__main__":
    try:
        tyro.cli(measure, prog="python -m benchmarks.ranks")
    except RobeError as error:
        sys.exit(f"error: {error}")
