"""One file per operation, each with its reference (NumPy), CPU (Numba) and CUDA version.

Importing the package sets, once and for the whole process, what every compiled kernel depends on.
"""

import hashlib
import os
from pathlib import Path

import numba

import robe.threads  # noqa: F401  sets how OpenMP's threads wait, before a kernel starts them


def _cache_folder() -> Path:
    """Where compiled kernels are kept: one folder per state of the kernels' sources.

    Numba notices an edit to a kernel's own file, but not to a function the kernel imports, such as the
    hash; it would go on running the old code. A name made of all the sources leaves no stale kernel.
    """
    here = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(here.rglob("*.py")))
    cache = here / "__pycache__"
    if not os.access(here, os.W_OK):
        cache = Path.home() / ".cache" / "robe-dlrm"
    return cache / f"kernels-{hashlib.sha256(sources).hexdigest()[:16]}"


if "NUMBA_CACHE_DIR" not in os.environ:
    numba.config.CACHE_DIR = str(_cache_folder())
if numba.config.ENABLE_CUDASIM:
    from robe.kernels.parts.simulator import repair

    repair()
