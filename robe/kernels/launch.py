"""How CUDA kernels are started. Every kernel strides over its work, so any shape of launch is right."""

import numpy as np
from numba import config

# The simulator runs each CUDA thread as a Python thread: a handful shows the same races as a thousand.
THREADS = 4 if config.ENABLE_CUDASIM else 256
BLOCKS = 2 if config.ENABLE_CUDASIM else 4096


def launch(kernel, items: int, *arguments) -> None:
    """Run a kernel that strides over `items` pieces of work; nothing is started where there is none.

    In the simulator, device memory is host memory: NumPy arrays, strided views too, are used in place.
    """
    if items == 0:
        return
    if config.ENABLE_CUDASIM:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        arguments = [FakeCUDAArray(a) if isinstance(a, np.ndarray) else a for a in arguments]
    kernel[max(1, min(BLOCKS, -(-items // THREADS))), THREADS](*arguments)
