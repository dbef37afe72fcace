"""Measure a GPU that is at hand for some minutes; what matters most comes first.

    bash benchmarks/gpu.sh [--minutes N] [--only PART]

First says which packages are missing. Then the device tests run, and then the parts in the order of PARTS, as
long as time is left. What is found stands in benchmarks/results/gpu.json at once, so a run that is cut off
leaves what it had; parts for which there was no time are listed. `python -m benchmarks.readme` writes the
tables.
"""

from robe.threads import share_cores

share_cores()  # before anything that loads NumPy

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import tyro

from benchmarks import embedding
from benchmarks.measure import Effort, figure, machine, ratio, rotate, rounds
from benchmarks.peer import peer, torch_here
from benchmarks.step import RATE, config, gate, verbs
from benchmarks.workload import Workload
from data_pipeline.whole_files import write_json
from robe.backend import select
from robe.config import EmbeddingConfig
from robe.errors import RobeError
from robe.interaction import Interaction
from robe.kernels.interaction import out_width
from robe.model import build
from robe.packages import extra

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
BACKEND = "cuda"
EFFORT = Effort(rounds=7, seconds=0.1)

# The tables that are compared with, and the ROBE array that stands for them.
ARRAY, NAME = EmbeddingConfig(megabytes=100, block=32), "ROBE 100 MB"
# Name -> precision, and whether a step is one CUDA graph.
OURS = {
    "tf32": ("tf32", True),
    "bf16": ("bf16", True),
    "fp32": ("fp32", True),
    "tf32, no graph": ("tf32", False),
}
STEPS = (("mlperf", 65536), ("mlperf", 2048), ("kaggle", 128))
MORE_STEPS = (("mlperf", 16384), ("kaggle", 2048), ("kaggle", 65536))
VERBS = ("training step", "inference")
PLAIN = tuple((how, precision) for how in ("graph", "eager") for precision in ("tf32", "amp"))
COMPILED = tuple((how, precision) for how in ("compiled graph", "compiled") for precision in ("tf32", "amp"))
ROWS = 65536

Part = Literal["tests", "steps", "look-ups", "updates", "start", "more steps", "compiled", "sanitizer"]
PARTS = get_args(Part)  # which are measured in this order
# Seconds without which a part is not begun.
LEAST = {"tests": 30, "look-ups": 60, "compiled": 150, "sanitizer": 60}

PYTEST = (sys.executable, "-m", "pytest", "-q")
WORKERS = "4"  # that test kernels at a time
FIRST = "start to first step"
FIRST_STEP = """
from benchmarks.step import RATE, config
from benchmarks.workload import Workload
from robe.backend import select
from robe.config import EmbeddingConfig
from robe.model import build
backend, work = select("{backend}"), Workload("kaggle", 1e6)
model = build(config("kaggle", EmbeddingConfig(megabytes=1), {rows}), work.data(), backend)
model.step(*map(backend.to_device, work.draw({rows})[0]), RATE)
backend.synchronize()
"""


class Run(NamedTuple):
    """What parts go by. until: of `time.monotonic()`, when the time is up."""

    effort: Effort
    until: float

    def left(self) -> float:
        return self.until - time.monotonic()


def lacking() -> Iterator[str]:
    """Lines: what is not installed, and what will not be measured without it."""
    wanted = dict.fromkeys(
        ("numba_cuda", "cupy", "nvmath"), f"nothing runs ({extra('cuda13')}, or cuda12)"
    ) | {
        "pytest": f"no device tests ({extra('test')})",
        "torch": f"no peers ({extra('torch')})",
        "fbgemm_gpu": "no tables of FBGEMM beside ours (pip install fbgemm-gpu)",
    }
    for name, without in wanted.items():
        if not find_spec(name):
            yield f"{name} is not installed: {without}"
    if sanitizer_tool() is None:
        yield "compute-sanitizer is not installed: kernels are not searched for races (CUDA's toolkit has it)"


def sanitizer_tool() -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("compute-sanitizer", path=path)


def reported(command: list, seconds: float) -> tuple[int, list[str]]:
    """Run a program, for so long at most: its exit code, and the last lines that it printed, which are shown.

    It is interrupted as by the keyboard, so that pytest still says how far it came.
    """
    lines: list[str] = []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True, **options) as process:
        ends = ((seconds, signal.SIGINT), (seconds + 20, signal.SIGKILL))
        timers = [threading.Timer(after, os.killpg, (process.pid, how)) for after, how in ends]
        for timer in timers:
            timer.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines = [*lines[-30:], line.strip()]
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            for timer in timers:
                timer.cancel()
    return process.returncode, lines


SUMMARY = re.compile(r"\d+ \w+.* in |ERROR SUMMARY|RACECHECK SUMMARY")


def checked(name: str, command: list, seconds: float) -> dict:
    """The row of a program that tests something: its exit code, its time and what it said in the end."""
    begin = time.monotonic()
    code, lines = reported(command, seconds)
    told = "; ".join(line.strip("= ") for line in lines if SUMMARY.search(line))
    return {"check": name, "code": code, "seconds": time.monotonic() - begin, "text": told}


def tests(run: Run) -> Iterator[dict]:
    """The tests that need a device: those of training alone, as they look at times; then every kernel."""
    together = ("-n", WORKERS) if find_spec("xdist") else ()
    files = {"test_device_training.py": (), "test_device_kernels.py": together}
    for file, options in files.items() if find_spec("pytest") else ():
        yield checked(f"tests/gpu/{file}", [*PYTEST, f"tests/gpu/{file}", *options], run.left() / 5)


def steps(run: Run, cases, variants) -> Iterator[dict]:
    """Training steps and inferences of the presets in every precision, beside PyTorch's."""
    for preset, batch in cases:
        if run.left() > 20:
            yield from beside_peers(run, preset, run.effort.pick(batch, 8), variants)
        else:
            yield {"left_out": f"{preset}, batch {batch}"}


def beside_peers(run: Run, preset: str, batch: int, variants) -> Iterator[dict]:
    effort, work = run.effort, Workload(preset, run.effort.table_bytes)
    array = run.effort.pick(ARRAY, EmbeddingConfig(megabytes=0.1, block=32))
    gate(preset, array, min(batch, 256), select(BACKEND))
    jobs = {}
    for how, (precision, graph) in OURS.items():
        backend = select(BACKEND, precision, graph=graph)
        batches = [tuple(map(backend.to_device, drawn)) for drawn in work.draw(batch)]
        model = build(config(preset, array, batch), work.data(), backend)
        calls = verbs(model, batches)
        jobs |= {f"{NAME} {how}: {v}": effort.job(calls[v], backend.synchronize) for v in VERBS}
    settings = {"tables": preset, "table_bytes": work.table_bytes, "batches": [batch], "variants": variants}
    with peer("torch_dlrm", backend, effort.seconds, **settings) as found:
        theirs = {name.split(": ", 1)[1]: job for name, job in found.items() if "embedding part" not in name}
        times = rounds(f"{preset}, batch {batch}", jobs | theirs, effort.rounds, until=run.until)
    group = f"{preset}, batch {batch}"
    for name, values in times.items():
        yield figure(group, name, values, batch=batch, rows_per_second=float(batch / np.median(values)))
    for verb in VERBS:
        peers = {name: values for name, values in times.items() if name in theirs and name.endswith(verb)}
        if peers:
            best = min(peers, key=lambda name: np.median(peers[name]))
            for how in OURS:
                ours, name = times[f"{NAME} {how}: {verb}"], best.removesuffix(f": {verb}")
                row = ratio(f"{group}: {verb}, {NAME}, {how}", name, ours, peers[best])
                yield row | {"batch": batch, "table_bytes": work.full_bytes}


def look_ups(run: Run) -> Iterator[dict]:
    """Look-ups and updates of a large batch beside a device copy of their output, and beside PyTorch's."""
    yield from embedding.run(select(BACKEND), run.effort, ROWS, (32,), run.until)


def updates(run: Run) -> Iterator[dict]:
    """The interaction with its look-up, its gradient with its scatter, and sums in a fixed order."""
    rows, sizes = run.effort.pick((ROWS, (10, 100)), (8, (0.1,)))
    for law in embedding.LAWS:
        work = Workload(law, run.effort.table_bytes)
        calls, vectors = update_calls(work, rows, sizes)
        jobs = {name: run.effort.job(call, select(BACKEND).synchronize) for name, call in calls.items()}
        times = rounds(f"updates, {law}", jobs, run.effort.rounds, until=run.until)
        written = 4 * rows * out_width(1 + len(work.cardinalities), work.width)
        share = (vectors.nbytes + written) / (2 * vectors.nbytes)  # of the copied bytes
        for name, values in times.items():
            # A share of the copy's rate, of the vectors once and what is made of them: also where the vectors
            # are never written.
            of_copy = (
                {"of_copy": float(np.median(share * times["copy"] / values))} if "forward" in name else {}
            )
            yield figure(f"updates, {law}", name, values, rows=rows) | of_copy
        for size in sizes:
            for name in ("update", "backward with update"):
                what, peer = (f"ROBE {size:g} MB {name}, {order}" for order in ("fixed order", "any order"))
                yield ratio(f"{law} ids: {what}", peer, times[what], times[peer])


class Keeping(Interaction):
    """The interaction that keeps the vectors of a training step, whatever the rule says."""

    @classmethod
    def gathers_again(cls, *sizes: Any) -> bool:
        return False


def update_calls(work: Workload, rows: int, sizes) -> tuple[dict[str, Callable], np.ndarray]:
    """(name -> call on one batch after the other, the vectors (B, 1 + F, D) that are copied as a limit)."""
    backend = select(BACKEND)
    ids = [backend.to_device(batch.ids) for batch in work.draw(rows)]
    vectors = backend.xp.full((rows, 1 + ids[0].shape[1], work.width), 1e-3, np.float32)
    out, copy = backend.xp.empty_like(vectors), embedding.copier(backend)
    calls = {"copy": lambda: copy(vectors.ravel(), out.ravel())}
    d_vectors = backend.xp.full_like(vectors[:, 1:], 1e-3)

    def add(size, order: str, deterministic: bool, kind=Interaction) -> None:
        there = select(BACKEND, deterministic=deterministic)
        array, name = embedding.robe(work, size, 32, there), f"ROBE {size:g} MB"
        layer = kind(array, rows, there)
        layer.first(rows)[...] = vectors[:, 0]
        d_out = backend.xp.full_like(layer.forward(ids[0]), 1e-3)
        calls[f"{name} backward with update, {order}"] = rotate(lambda i: layer.backward(d_out, i, RATE), ids)
        if kind is Interaction:
            calls[f"{name} update, {order}"] = rotate(lambda i: array.update(i, d_vectors, RATE), ids)
            # In a fixed order the vectors are kept.
            calls[f"{name} forward with look-up, {order}"] = rotate(layer.forward, ids)

    for size in sizes:
        add(size, "fixed order", True)
        add(size, "any order", False)
        add(size, "any order, vectors kept", False, Keeping)
    return calls, vectors


def start(run: Run) -> Iterator[dict]:
    """From the start of Python to the end of the first step, with empty caches, and from then on."""
    program = FIRST_STEP.format(backend=BACKEND, rows=run.effort.pick(2048, 8))
    with tempfile.TemporaryDirectory() as folder:
        caches = {"NUMBA_CACHE_DIR": f"{folder}/numba", "CUPY_CACHE_DIR": f"{folder}/cupy"}
        seconds = []
        for _ in range(4):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | caches, check=True)
            seconds.append(time.perf_counter() - begin)
    yield figure(FIRST, "first start, which compiles", np.array(seconds[:1]))
    yield figure(FIRST, "second start", np.array(seconds[1:]))


def sanitizer(run: Run) -> Iterator[dict]:
    """NVIDIA's searches for accesses out of bounds and for races, over all kernels on all awkward cases."""
    program = [*PYTEST, "tests/gpu/test_device_kernels.py", "-k", "agrees_with_the_reference and small"]
    for search in ("memcheck", "racecheck") if (tool := sanitizer_tool()) else ():
        command = [tool, "--tool", search, "--error-exitcode", 9, *program]
        yield checked(search, command, run.left() / 2 if search == "memcheck" else run.left())


MEASURES: dict[str, Callable[[Run], Iterator[dict]]] = {
    "tests": tests,
    "steps": lambda run: steps(run, STEPS, PLAIN),
    "look-ups": look_ups,
    "updates": updates,
    "start": start,
    "more steps": lambda run: steps(run, MORE_STEPS, PLAIN),
    # The first again, beside PyTorch's compiler, which takes a minute for each.
    "compiled": lambda run: steps(run, STEPS, COMPILED if torch_here() else ()),
    "sanitizer": sanitizer,
}


def line(row: dict) -> str:
    from benchmarks.__main__ import line as of_figure

    if "check" in row:
        return f"{'ok' if row['code'] == 0 else 'FAIL':<5}{row['check']}: {row['text']}"
    return f"left out: {row['left_out']}" if "left_out" in row else of_figure(row)


def measure(minutes: float = 10, only: Part | None = None, out: Path = RESULTS) -> None:
    """Test and measure the GPU at hand, what matters most first.

    Args:
        minutes: After which no part is begun; the last one may take a little longer.
        only: One part; the others keep what the file says of them.
        out: The file to write.
    """
    write(Run(EFFORT, time.monotonic() + 60 * minutes), (only,) if only else PARTS, out)


def write(run: Run, parts: tuple[str, ...], out: Path) -> None:
    for text in lacking():
        print(text, flush=True)
    where = machine(select(BACKEND).description)
    results = json.loads(out.read_text()) if parts != PARTS and out.exists() else {}
    for part in parts:
        results[part] = {"machine": where, "rows": []}
        for row in rows_of(part, run):
            results[part]["rows"].append(row)
            write_json(out, results)
            print(line(row), flush=True)
    print(f"{out}: written")


def rows_of(part: str, run: Run) -> Iterator[dict]:
    """Those of one part, or why there are no more of them: one that fails leaves the others their time."""
    if run.left() < LEAST.get(part, 20):
        yield {"left_out": f"{part}: no time was left"}
        return
    try:
        yield from MEASURES[part](run)
    except Exception as error:  # of a driver, a compiler or a peer, or for want of memory
        yield {"left_out": f"{part}: " + " ".join(f"{type(error).__name__}: {error}".split())}


def main(arguments: list[str] | None = None) -> None:
    try:
        tyro.cli(measure, prog="python -m benchmarks.gpu", args=arguments)
    except RobeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
