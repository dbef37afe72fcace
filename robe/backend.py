"""Where arrays live and which version of each kernel runs, chosen once and handed on as an argument.

The only place that imports CuPy.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from robe import RobeError
from robe.kernels.operations import OPERATIONS, version

NAMES = ("auto", "reference", "cpu", "cuda")


class BackendError(RobeError):
    """A backend that cannot run here."""


@dataclass(frozen=True)
class Backend:
    """One way to compute.

    name: `reference` (NumPy only), `cpu` (Numba) or `cuda`.
    xp: the array module, NumPy or CuPy.
    kernels: one function per key of OPERATIONS.
    to_device, to_host: copy an array there and back; the same array where there is nothing to copy.
    synchronize: wait for the device.
    """

    name: str
    description: str
    xp: ModuleType
    kernels: SimpleNamespace
    to_device: Callable[[np.ndarray], Any]
    to_host: Callable[[Any], np.ndarray]
    synchronize: Callable[[], None]


# Below about 0.2 ms of one core's arithmetic a matrix product is not worth waking a second thread, and
# waiting for that thread costs milliseconds where other programs use the cores.
SMALL_PRODUCT = 2e7


def limit_blas_threads(flops: float) -> None:
    """Give NumPy's BLAS as many threads as Numba has, or one if a model's largest product is small."""
    import numba
    from threadpoolctl import threadpool_limits

    threadpool_limits(1 if flops < SMALL_PRODUCT else numba.get_num_threads(), user_api="blas")


def simulator() -> bool:
    """Whether Numba runs CUDA kernels as plain Python threads on NumPy arrays."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"


def cuda_trouble() -> str | None:
    """Why the `cuda` backend cannot run here, with the remedy; None if it can."""
    if simulator():
        return None
    from numba import cuda

    if not cuda.is_available():
        return (
            "no CUDA device or driver was found; use --backend cpu, or set NUMBA_ENABLE_CUDASIM=1 to run "
            "the CUDA kernels in the simulator"
        )
    if importlib.util.find_spec("cupy") is None:
        return "the cuda backend needs CuPy: pip install 'robe-dlrm[cuda13]' (or [cuda12], as your driver)"
    return None


def select(name: str = "auto") -> Backend:
    """The backend of that name; `auto` is `cuda` where a device is at hand, else `cpu`.

    Raises BackendError for an explicit `cuda` that cannot run.
    """
    if name not in NAMES:
        raise BackendError(f"no backend {name!r}; choose one of {', '.join(NAMES)}")
    if name == "auto":
        name = "cpu" if simulator() or cuda_trouble() else "cuda"
    kernels = SimpleNamespace(**{operation: version(operation, name) for operation in OPERATIONS})

    def same(array):
        return array

    def nothing():
        return None

    if name != "cuda":
        import numba

        threads = "NumPy only" if name == "reference" else f"Numba, {numba.get_num_threads()} threads"
        return Backend(name, f"{name} ({threads})", np, kernels, same, same, nothing)
    if trouble := cuda_trouble():
        raise BackendError(trouble)
    if simulator():
        return Backend(name, "cuda (simulator, NumPy arrays)", np, kernels, same, same, nothing)
    import cupy

    device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    stream = cupy.cuda.Stream.null
    return Backend(name, f"cuda ({device})", cupy, kernels, cupy.asarray, cupy.asnumpy, stream.synchronize)
