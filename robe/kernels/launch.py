"""How CUDA kernels are started. Every kernel strides over its work, so any shape of launch is right."""

import numpy as np
from numba import config

# The simulator runs each CUDA thread as a Python thread: a handful shows the same races as a thousand.
THREADS = 4 if config.ENABLE_CUDASIM else 256
BLOCKS = 2 if config.ENABLE_CUDASIM else 4096  # along each axis


def launch(kernel, work: tuple[int, ...], *arguments, shape=None) -> None:
    """Run a kernel that strides over `work`: 1 to 3 sizes, that of neighbouring addresses first.

    `shape` is for kernels whose thread blocks work together on something, as `block_shape` makes it.

    A kernel over several axes needs no division to find its place (nor with `while`, as Numba divides to
    count the rounds of a strided `range`), and neighbouring threads stand along the first axis, so their
    reads and writes are merged. Nothing is started where there is no work. In the
    simulator, device memory is host memory: NumPy arrays, strided views too, are used in place.
    """
    if 0 in work:
        return
    start(kernel, shape or launch_shape(work), arguments)


def start(kernel, shape, arguments) -> None:
    if config.ENABLE_CUDASIM:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        arguments = [FakeCUDAArray(a) if isinstance(a, np.ndarray) else a for a in arguments]
    kernel[shape](*arguments)


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

    The third number is Numba's default stream.
    """
    return min(BLOCKS, blocks), min(THREADS, -(-threads // 32) * 32), 0, shared
