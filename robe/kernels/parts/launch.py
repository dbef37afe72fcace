"""How CUDA kernels are started. Every kernel strides over its work, so any shape of launch is right.

All run on Numba's default stream, which is the legacy default stream of CUDA. It is CuPy's current stream
too, so kernels and CuPy's functions run in the order in which they were called and nothing has to wait
for anything; only copies have a stream of their own (robe/feed.py). While a thread captures a graph
(robe/graph.py), CuPy and its kernels use the stream of that graph instead.
"""

from threading import local

import numpy as np
from numba import config, cuda

# The simulator runs each CUDA thread as a Python thread: a handful shows the same races as a thousand.
THREADS = 4 if config.ENABLE_CUDASIM else 256
BLOCKS = 2 if config.ENABLE_CUDASIM else 4096  # along each axis
# Arrays of a training step and their views, full and short batches: some hundred.
WRAPPED_MOST = 4096

_chosen = local()  # .stream: of the kernels that this thread starts, if not the default one
_wrapped = {}  # (address, shape, strides, dtype) -> Numba's array there


def launch(kernel, work: tuple[int, ...], *arguments, shape=None) -> None:
    """Run a kernel that strides over `work`: 1 to 3 sizes, that of neighbouring addresses first.

    `shape` is for kernels whose thread blocks work together on something, as `block_shape` makes it.

    A kernel over several axes needs no division to find its indices (nor with `while`, as Numba divides to
    count the rounds of a strided `range`), and neighbouring threads stand along the first axis, so their
    reads and writes are merged. Nothing is started where there is no work. In the
    simulator, device memory is host memory: NumPy arrays, strided views too, are used in place.
    """
    if 0 in work:
        return
    start(kernel, shape or launch_shape(work), arguments)


def use(stream: int) -> None:
    """Start later kernels of this thread on the CUDA stream of that address; 0 is the default stream."""
    _chosen.stream = cuda.external_stream(stream) if stream else None


def start(kernel, shape, arguments) -> None:
    if stream := getattr(_chosen, "stream", None):
        blocks, threads, _, shared = shape if len(shape) == 4 else (*shape, 0, 0)
        shape = blocks, threads, stream, shared
    kernel[shape](*map(taken, arguments))


def taken(argument):
    """The argument as Numba takes it at once; of a plain tuple each part."""
    if type(argument) is tuple:
        return tuple(map(taken, argument))
    if not config.ENABLE_CUDASIM:
        return on_device(argument)
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    return FakeCUDAArray(argument) if isinstance(argument, np.ndarray) else argument


def on_device(argument):
    """The argument as Numba takes it at once: CuPy's arrays wrapped, numbers and tuples as they are.

    Numba takes CuPy's arrays too, but looks each over anew at every launch, and may wait for the stream. So
    it is done once per address. What is kept does not own the memory: should CuPy free it and hand
    out the same address in the same shape again, the view is as right as before.
    """
    if isinstance(argument, np.ndarray):
        # Numba would copy it to the device and back, in silence, at every launch.
        raise TypeError(f"a CUDA kernel was given a host array of shape {argument.shape}")
    if not hasattr(type(argument), "__cuda_array_interface__"):
        return argument
    key = argument.data.ptr, argument.shape, argument.strides, argument.dtype
    if key not in _wrapped:
        if len(_wrapped) == WRAPPED_MOST:
            _wrapped.clear()
        address, shape, strides, dtype = key
        interface = {"data": (address, False), "shape": shape, "strides": strides, "typestr": dtype.str}
        _wrapped[key] = cuda.from_cuda_array_interface(interface | {"version": 3})
    return _wrapped[key]


def launch_shape(work: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(blocks, threads of a block) along each axis; a block fills its first axis, then the next."""
    threads, left = [], THREADS
    for size in work:
        threads.append(min(left, 1 << (size - 1).bit_length()))
        left //= threads[-1]
    blocks = [min(BLOCKS, -(-size // count)) for size, count in zip(work, threads, strict=True)]
    return tuple(blocks), tuple(threads)


def block_shape(blocks: int, threads: int = 1024, shared: int = 0) -> tuple[int, int, int, int]:
    """Shape of a launch of thread blocks of whole warps, each with `shared` bytes of dynamic shared memory.

    The third number is Numba's default stream, unless `use` has named another.
    """
    return min(BLOCKS, blocks), min(THREADS, -(-threads // 32) * 32), 0, shared
