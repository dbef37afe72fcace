"""One file per operation, each with its reference (NumPy), CPU (Numba) and CUDA version.

Importing the package sets, once and for the whole process, what every compiled kernel depends on.
"""

import numba

from robe.kernels.parts import disk_cache, numba_cuda

# What numba-cuda raised if it is installed in vain, or None.
NUMBA_CUDA_TROUBLE = numba_cuda.load()
disk_cache.install()
if numba.config.ENABLE_CUDASIM:
    from robe.kernels.parts.simulator import repair

    repair()
