"""Where arrays live and which version of each kernel runs, chosen once and handed on as an argument.

No other module imports CuPy or nvmath.
"""

import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from robe.errors import RobeError
from robe.feed import Streams, feed, fetch
from robe.graph import Graph
from robe.kernels import NUMBA_CUDA_TROUBLE
from robe.kernels.operations import OPERATIONS, version
from robe.kernels.parts import launch
from robe.kernels.parts.distinct import distinct
from robe.matmul import EMULATED, Epilogues, Gemm, Short, emulated
from robe.nccl import Nccl
from robe.packages import extra
from robe.ranks import ALONE, Alone, Mpi
from robe.threads import limit_threads
from robe.timeline import no_phase

NAMES = ("auto", "reference", "cpu", "cuda")
# Operations whose CUDA version adds floats atomically, in no fixed order, and has one that repeats to a bit.
ATOMIC = ("scatter_add", "code_step", "interaction_scatter", "gather_interaction_backward")


class BackendError(RobeError):
    """A backend that cannot run here."""


@dataclass(frozen=True)
class Backend:
    """One way to compute.

    name: `reference` (NumPy only), `cpu` (Numba) or `cuda`.
    description: the same for a person, with threads or device, and the precision.
    xp: the array module, NumPy or CuPy.
    kernels: one function for each key of OPERATIONS, under its name.
    matmul: (a, b, out), writes the product of two matrices, computed in the precision that was chosen.
    short: how activations are kept between products; None where they are float32.
    fused: (kind, a, b, out, bias, mask) -> whether the product and the pass beside it could be done in one,
        as matmul.Epilogues does; None where they never can.
    empty: (shape, dtype) -> a new array for the kernels to write to.
    to_device, to_host: copy an array there and back; they give the same array where nothing has to be copied.
    feed: (batches, rows, phase) -> each (tag, arrays) with its arrays on the device, as in feed.py.
    fetch: (results, rows) -> each (tag, array) with its array on the host, likewise.
    synchronize: waits for the device.
    limit_threads: (flops of the largest product), called before a step; see threads.py.
    fuses_scatter: whether interaction_scatter is better here than the two operations that it joins.
    multiple: of how many columns the inputs of dense layers should be, for the sake of the products.
    distinct: (tokens (B, F) uint64) -> the distinct ones, and (B, F) uint32 which of them each is.
    few_sizes: whether kernels keep memory for each size of what they add to, which then should have few.
    graph: makes an empty Graph, as of graph.py; None where work is not captured.
    connect: makes of ranks those that exchange arrays of the device; None where arrays are the host's.
    ranks: the processes that train a model together (ranks.py).
    """

    name: str
    description: str
    xp: ModuleType
    kernels: SimpleNamespace
    matmul: Callable[[Any, Any, Any], None]
    short: Short | None
    fused: Callable[..., bool] | None
    empty: Callable[..., Any]
    to_device: Callable[[np.ndarray], Any]
    to_host: Callable[[Any], np.ndarray]
    feed: Callable[..., Generator]
    fetch: Callable[[Generator, int], Generator]
    synchronize: Callable[[], None]
    limit_threads: Callable[[float], None]
    fuses_scatter: bool
    multiple: int
    distinct: Callable[[Any], tuple[Any, Any]]
    few_sizes: bool
    graph: Callable[[], Any] | None = None
    connect: Callable[[Any], Alone] | None = None
    ranks: Alone = ALONE

    def padded(self, columns: int) -> int:
        """Columns of an input of a dense layer that holds so many; the rest, if any, are zeros behind."""
        return -(-columns // self.multiple) * self.multiple


CACHE_LINE = 64  # bytes
# Tensor cores read 16 bytes at a time, 4 numbers or 8 in bf16: on an H200 tf32 products of 479 columns take
# three times as long as those of 480.
COLUMNS = 8


def aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """NumPy's `empty`, beginning on a cache line, so that no vector register is stored across two.

    NumPy's own begins at a multiple of 16 bytes. This makes the interaction and its gradient 1.3 to 1.6 times
    as fast at D = 128.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


INSTALL = f"{extra('cuda13')} (or cuda12, as your driver)"


def simulator() -> bool:
    """Whether Numba runs CUDA kernels as plain Python threads on NumPy arrays."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"


def cuda_trouble() -> str | None:
    """Why the `cuda` backend cannot run here, with the remedy; None if it can."""
    if simulator():
        return None
    from numba import cuda

    if NUMBA_CUDA_TROUBLE:
        return f"numba-cuda does not load ({_in_a_line(NUMBA_CUDA_TROUBLE)}): {INSTALL}; or use --backend cpu"
    if cuda.implementation == "Built-in":  # the one that Numba itself still has
        return f"the cuda backend needs numba-cuda and CuPy: {INSTALL}; use --backend cpu without a GPU"
    if not cuda.is_available():
        return _no_device(cuda.cudadrv.driver.driver.initialization_error)
    for package, title in (("cupy", "CuPy"), ("nvmath", "nvmath-python")):
        if importlib.util.find_spec(package) is None:
            return f"the cuda backend needs {title}: {INSTALL}"
    for variable in ("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "NUMBA_CUDA_PER_THREAD_DEFAULT_STREAM"):
        if os.environ.get(variable, "0") != "0":
            return f"{variable} is set, but kernels and CuPy must share one stream; unset it"
    driver, compiler = cuda.cudadrv.driver.get_version(), cuda.runtime.get_version()
    if driver[0] < compiler[0]:
        return (
            f"the driver is for CUDA {driver[0]}.{driver[1]}, numba-cuda for CUDA {compiler[0]}; "
            f"update the driver, or install the extra for it, if there is one: {INSTALL}"
        )
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # of CuPy's own choice, or of what it imports
        return f"CuPy does not load ({_in_a_line(error)}): {INSTALL}"
    return None


def bindings(*names: str) -> list[ModuleType]:
    """Modules of nvmath.bindings.

    They need nothing else of nvmath, whose import takes more than a second and loads NVIDIA's libraries for
    Fourier transforms, sparse matrices and tensors. So a bare package stands in for it meanwhile.
    """
    spec = importlib.util.find_spec("nvmath")
    bare = importlib.util.module_from_spec(spec)
    known = sys.modules.setdefault("nvmath", bare)
    try:
        return [importlib.import_module(f"nvmath.bindings.{name}") for name in names]
    finally:
        if known is bare:
            del sys.modules["nvmath"]


def _no_device(error: str | None) -> str:
    """What to say if Numba finds no device. error: how the driver failed; None if there is no compiler."""
    if error is None:
        return f"NVIDIA's compiler (NVVM) was not found: {INSTALL}"
    code = re.search(r"CUDA_ERROR_\w+", error)
    return (
        f"no CUDA device or driver was found{f' ({code[0]})' if code else ''}; use --backend cpu, or set "
        "NUMBA_ENABLE_CUDASIM=1 to run the CUDA kernels in the simulator"
    )


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def chosen_by(name: str) -> str:
    """The backend that a name stands for here: `auto` is `cuda` where a device is at hand, else `cpu`."""
    if name != "auto":
        return name
    return "cpu" if simulator() or cuda_trouble() else "cuda"


def select(
    name: str = "auto", precision: str = "fp32", deterministic: bool = False, graph: bool = True
) -> Backend:
    """The backend of that name; `auto` is `cuda` where a device is at hand, else `cpu`.

    precision: of the matrix products, a name of matmul.py.
    deterministic: add up gradients so that training repeats bit for bit, on a GPU too; elsewhere it always
        does.
    graph: on a GPU, compute batches of a size that comes again as one CUDA graph; the results are the same.
    Raises BackendError for an explicit `cuda` that cannot run.
    """
    if name not in NAMES:
        raise BackendError(f"no backend {name!r}; choose one of {', '.join(NAMES)}")
    name = chosen_by(name)
    if name == "cuda" and (trouble := cuda_trouble()):
        raise BackendError(trouble)
    kernels = kernels_of(name, deterministic)
    device = name == "cuda" and not simulator()
    chosen = _device(kernels, precision, graph) if device else _host(name, kernels, precision)
    # What repeats takes the largest of all gradients first, so they are written, and nothing is fused.
    return replace(chosen, fuses_scatter=False) if deterministic else chosen


def kernels_of(name: str, deterministic: bool) -> SimpleNamespace:
    """The version of each operation that a backend takes; deterministic: as of `select`."""
    versions = dict.fromkeys(OPERATIONS, name)
    if name == "cuda" and deterministic:
        versions |= dict.fromkeys(ATOMIC, "cuda_deterministic")
    return SimpleNamespace(**{operation: version(operation, of) for operation, of in versions.items()})


def among(backend: Backend, ranks: Alone) -> Backend:
    """The same backend for a model that these processes train or use together.

    Gradients that they exchange are written, so nothing is fused. No step is captured, as it waits on the
    host for how much the others send. On a GPU sums have a fixed order: each rank adds up what came from all,
    and their copies of the weights must stay the same. Raises BackendError where GPUs cannot be connected.
    """
    if ranks.size == 1:
        return backend
    return replace(
        backend,
        description=f"{backend.description}, {ranks.size} processes",
        kernels=kernels_of(backend.name, deterministic=True),
        fuses_scatter=False,
        graph=None,
        ranks=backend.connect(ranks) if backend.connect else ranks,
    )


def agreed(name: str, ranks: Alone) -> str:
    """The backend of that name for all of these processes, each on a GPU of its own where it is `cuda`; rank
    0 asks while the others follow, before any of them selects one.

    `auto` is `cuda` if each process finds a GPU for itself. Raises BackendError for an explicit `cuda` where
    one finds none.
    """
    if ranks.size == 1 or name not in ("auto", "cuda") or simulator():
        return name
    found = ranks.asked(take_card)
    for rank, trouble in enumerate(found):
        if trouble and name == "cuda":
            raise BackendError(f"process {rank} of {ranks.size}: {trouble}")
    return "cpu" if any(found) else "cuda"


def take_card(ranks: Alone) -> str | None:
    """Have this process use a GPU that none beside it uses; why it cannot, if so. All ranks call it at once.

    A launcher may show each process a GPU of its own alone, or all of a machine to all processes.
    """
    trouble, cards = cuda_trouble(), []
    if trouble is None:
        from cupy.cuda import Device, runtime

        cards = [runtime.deviceGetPCIBusId(number) for number in range(runtime.getDeviceCount())]
    seen, place = ranks.beside(cards)
    taken: list[str | None] = []
    for theirs in seen:
        taken.append(next((card for card in theirs if card not in taken), None))
    if trouble is not None:
        return trouble
    if taken[place] is None:
        count = len(set().union(*seen))
        return (
            f"{len(seen)} processes on a machine see {count} GPUs; start one for each, or use --backend cpu"
        )
    Device(cards.index(taken[place])).use()  # Numba takes the device that is current
    return None


def _connected(streams: Streams, ranks: Mpi) -> Nccl:
    """These ranks with arrays on the current device, which has these streams."""
    import cupy

    with warnings.catch_warnings(action="ignore"):  # of some lines, where it does not load
        from cupy.cuda import nccl
    if not nccl.available:
        raise BackendError(f"processes on GPUs need NCCL, which CuPy does not find: {INSTALL}; or start one")
    apart = replace(streams, copies=cupy.cuda.Stream(non_blocking=True))
    return Nccl(ranks.comm, nccl, cupy.ndarray, apart)


def _host(name: str, kernels: SimpleNamespace, precision: str) -> Backend:
    """A backend on NumPy's arrays, with nothing to copy."""
    import numba

    description = {
        "reference": "reference (NumPy only)",
        "cpu": f"cpu (Numba, {numba.config.NUMBA_NUM_THREADS} threads)",
        "cuda": "cuda (simulator, NumPy arrays)",
    }[name]
    if precision != "fp32":
        description += f", {precision} emulated"

    def same(array):
        return array

    def unfed(batches, rows, phase=no_phase):
        return batches

    def fetched(results, rows):
        return results

    return Backend(
        name=name,
        description=description,
        xp=np,
        kernels=kernels,
        matmul=emulated(precision),
        short=EMULATED if precision == "bf16" else None,
        fused=None,
        empty=aligned,
        to_device=same,
        to_host=same,
        feed=unfed,
        fetch=fetched,
        synchronize=lambda: None,
        limit_threads=limit_threads,
        fuses_scatter=name == "cuda",
        multiple=COLUMNS if name == "cuda" else 1,
        distinct=partial(_distinct, np) if name == "cuda" else distinct,
        few_sizes=name == "cuda",
    )


def _distinct(xp: ModuleType, tokens) -> tuple[Any, Any]:
    """Backend.distinct of CuPy, by sorting."""
    found, numbers = xp.unique(tokens, return_inverse=True)
    return found, numbers.reshape(tokens.shape).astype(np.uint32)


def _device(kernels: SimpleNamespace, precision: str, graph: bool) -> Backend:
    """The backend on the current CUDA device."""
    import cupy
    import cupyx

    device = cupy.cuda.Device()
    model = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
    if precision != "fp32" and int(device.compute_capability) < 80:
        raise BackendError(
            f"{model} has no {precision}; use --backend cpu to emulate it, or train with --precision fp32"
        )
    from numba.cuda.core import config  # type: ignore[import-not-found]  # numba-cuda's

    # Of a launch with little work Numba would say, on every size of batch, that it fills no card.
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
    # The stream of all kernels and CuPy functions, see kernels/parts/launch.py.
    compute = cupy.cuda.Stream.null
    streams = Streams(
        cupy.empty,
        cupyx.empty_pinned,
        partial(cupy.cuda.Event, disable_timing=True),
        compute,
        cupy.cuda.Stream(non_blocking=True),
    )
    # As to_bfloat and from_bfloat of kernels/parts/bfloat.py.
    store = cupy.ElementwiseKernel(
        "float32 x",
        "uint16 word",
        "unsigned int w = __float_as_uint(x);word = isnan(x) ? 0x7fc0 : (w + 0x7fff + (w >> 16 & 1)) >> 16",
        "to_bfloat",
    )
    load = cupy.ElementwiseKernel(
        "uint16 word", "float32 x", "x = __uint_as_float((unsigned int)word << 16)", "from_bfloat"
    )
    cublas, cublas_lt = bindings("cublas", "cublasLt")
    try:
        matmul = Gemm(precision, cublas, cupy.empty)
        fused = Epilogues(matmul, cublas_lt)
    except RuntimeError as error:  # nvmath looks for the libraries at the first call
        raise BackendError(f"cuBLAS cannot be used ({error}): {INSTALL}") from None
    return Backend(
        name="cuda",
        description=f"cuda ({model}), {precision}{', steps as CUDA graphs' if graph else ''}",
        xp=cupy,
        kernels=kernels,
        matmul=matmul,
        short=Short("uint16", store, load) if precision == "bf16" else None,
        fused=fused,
        empty=cupy.empty,
        to_device=cupy.asarray,
        to_host=cupy.asnumpy,
        feed=partial(feed, streams),
        fetch=partial(fetch, streams),
        synchronize=compute.synchronize,
        limit_threads=lambda flops: None,
        fuses_scatter=True,
        multiple=COLUMNS,
        distinct=partial(_distinct, cupy),
        few_sizes=True,
        graph=partial(Graph, cupy.cuda, (launch.use, matmul.use)) if graph else None,
        connect=partial(_connected, streams),
    )
