"""A peer in a process of its own, so that it has its own environment and pools of threads.

Our package puts idle OpenMP threads to sleep (OMP_WAIT_POLICY=passive), which is not a peer's default. The
process first writes the names of its jobs, a list in JSON on one line; then it answers each line that names a
job by one with the seconds per call in a turn of it, or with a string that says why there are none.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

from benchmarks.measure import BenchmarkError, PeerError
from robe.backend import Backend
from robe.threads import THREAD_POLICY

ROOT = Path(__file__).parents[1]


def torch_here() -> bool:
    return importlib.util.find_spec("torch") is not None


def environment() -> dict[str, str]:
    """That of a peer: ours without what our package sets, and with what is best for PyTorch.

    Memory is kept for the next step, not returned to the system (inference up to 1.5x faster), and large
    tensors are on huge pages, as NumPy's are. Its waiting threads spin, which at a batch of 128 is 1.7x
    faster than if they slept, as long as no other program wants the cores.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in THREAD_POLICY}
    malloc = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    return inherited | malloc | {"THP_MEM_ALLOC_ENABLE": "1"}


@contextmanager
def peer(module: str, backend: Backend, seconds: float, **settings) -> Iterator[dict[str, Callable]]:
    """The jobs of `benchmarks.MODULE`, run with these settings on the backend's device; none without PyTorch.

    seconds: length of a turn. There are none, and a line says so, if they do not compute what we do, or fail.
    """
    import numba

    device = "cuda" if backend.name == "cuda" else "cpu"
    if not torch_here() or not agree(device):
        yield {}
        return
    settings |= {"device": device, "threads": numba.config.NUMBA_NUM_THREADS, "seconds": seconds}
    command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(settings)]
    with ExitStack() as stack:
        try:
            jobs = stack.enter_context(process_jobs(command, environment()))
        except BenchmarkError as error:
            print(f"not measured: {error}", file=sys.stderr)
            jobs = {}
        yield {name: partial(_turn, name, job) for name, job in jobs.items()}


def _turn(name: str, job: Callable[[], float]) -> float:
    try:
        return job()
    except (BenchmarkError, BrokenPipeError) as error:  # the pipe breaks when the process has ended
        raise PeerError(f"{name}: {error}") from None


@contextmanager
def process_jobs(command: list, environment: dict[str, str]) -> Iterator[dict[str, Callable[[], float]]]:
    """The jobs of a process that speaks the protocol, by name; the process ends with the block."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:

        def read():
            if not (line := process.stdout.readline()):
                program = " ".join(map(str, command[1:3]))
                raise BenchmarkError(f"{program} ended with code {process.wait()}; see above")
            return json.loads(line)

        def ask(name: str) -> float:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            if isinstance(answer := read(), str):
                raise BenchmarkError(answer)
            return answer

        yield {name: lambda name=name: ask(name) for name in read()}


@cache
def agree(device: str) -> bool:
    """Whether the peers pass `check`, which is asked once."""
    try:
        check(device)
    except BenchmarkError as error:
        print(f"not measured: {error}", file=sys.stderr)
        return False
    return True


def check(device: str) -> None:
    """The gate of the peers, in a process that is not measured; BenchmarkError if they do not pass."""
    command = [sys.executable, "-m", "benchmarks.torch_gate", device]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise BenchmarkError("PyTorch and we do not agree, see above; no time is told")
