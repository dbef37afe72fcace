"""The pools of threads: how those of NumPy's BLAS and of the kernels share the cores.

A pool that has finished spins for a while and takes the cores from the other one; asleep it costs nothing,
but must be woken. Kernels are few, so OpenMP's threads sleep at once; products come in series, so those of
BLAS spin for 2^16 ticks of the clock, some 25 microseconds, instead of 2^26. At batch 2048 and on two cores
that made a step of the MLPerf model 1.14 times as fast, of Kaggle's 1.05 times; with 2^4, small batches are
slower.

The libraries read it when they are loaded, so the commands call `share_cores` before they import NumPy. A
program that imports robe may do the same; else its threads wait as their libraries have it.
"""

import os
import re
import sys
from functools import cache

from robe.errors import RobeError

# Variables by which launchers tell how many processes are on this machine: Open MPI; MPICH and Intel MPI.
TOGETHER = "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"
THREAD_POLICY = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "16"}
# Below about 0.2 ms of one core's arithmetic a matrix product is not worth waking a second thread, and
# waiting for it costs milliseconds where other programs use the cores. The kernels of a step, which do less
# than its products, are not worth it until those are ten times as large.
SMALL_PRODUCT, SMALL_STEP = 2e7, 2e8


class ThreadsError(RobeError):
    """The library of threads that is asked for cannot be loaded."""


def share_cores() -> None:
    """Set how threads wait, where the environment does not say, and mend numbers of threads that cannot be.

    For the whole process, and those that it starts; before NumPy, Numba and Polars are imported. Processes
    that `mpiexec` starts on one machine get equal shares of its cores.
    """
    for name, value in THREAD_POLICY.items():
        os.environ.setdefault(name, value)
    # Numba and Polars would end in a traceback when they are imported.
    for name in ("NUMBA_NUM_THREADS", "POLARS_MAX_THREADS"):
        if re.fullmatch(r"-\d+|0+", value := os.environ.get(name, "")):
            print(f"{name}={value}: must be at least 1, so all cores are used", file=sys.stderr)
            del os.environ[name]
    together = max(int(os.environ.get(name, 1)) for name in TOGETHER)
    # A launcher may have bound each process to cores of its own. Numba would not change what it began with.
    if together > 1 and len(os.sched_getaffinity(0)) == os.cpu_count() and "numba" not in sys.modules:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(max(1, os.cpu_count() // together)))


def limit_threads(flops: float) -> None:
    """Let NumPy's BLAS and the kernels use as many threads as a model's largest product is worth.

    The kernels' results do not depend on it: their sums have the same order for any number of threads. Those
    of products do not either with OpenBLAS's kernels for AVX-512 (see `product` in matmul.py); with those for
    AVX2, the bytes of a product depend on where its rows are cut for two threads.
    """
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    try:
        numba.set_num_threads(1 if flops < SMALL_STEP else most)
    except ValueError as error:  # the first time it loads the library of threads
        layer = numba.config.THREADING_LAYER
        reason = str(error).splitlines()[0]
        raise ThreadsError(f"NUMBA_THREADING_LAYER={layer}: {reason} unset it, or install it") from None
    for library in _blas():
        threads = 1 if flops < SMALL_PRODUCT else most
        if library.num_threads != threads:
            library.set_num_threads(threads)


@cache
def _blas() -> list:
    """The BLAS libraries that are loaded. Looking for them takes a millisecond."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas").lib_controllers
