"""Loads numba-cuda, which stands in for `numba.cuda` where it is installed.

If it does not load, nothing of it is left and Numba's own, older package is loaded instead. That compiles
none of our kernels, but it defines what their files import, so a CPU can be worked on.
"""

import sys
from importlib import import_module

import numpy as np


def load() -> Exception | None:
    """Load it; what it raised if it does not load."""
    try:
        cuda = import_module("numba.cuda")
        if cuda.implementation != "Built-in" and not hasattr(np, "row_stack"):
            _load_without_row_stack()
        return None
    except Exception as error:  # whatever packages do that do not fit together
        trouble = error.with_traceback(None)
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "NumbaCudaFinder"]
    for name in [name for name in sys.modules if f"{name}.".startswith("numba.cuda.")]:
        del sys.modules[name]
    import_module("numba.cuda")
    return trouble


def _load_without_row_stack() -> None:
    """numba-cuda 0.30 names `numpy.row_stack` once, when it is to compile; NumPy 2.5 no longer has it."""
    np.row_stack = np.vstack
    try:
        import_module("numba.cuda.np.arrayobj")
    finally:
        del np.row_stack
