"""Memory that operations need for themselves: made once for each size and kept.

A step that was captured as a CUDA graph finds it where it was, and a steady step allocates nothing.
"""

from contextlib import contextmanager

import numpy as np

_kept = {}


def scratch(like, name: str, shape: tuple[int, ...], dtype):
    """The array of that name, shape and dtype, which lives where `like` does; 0 at first."""
    key = type(like), name, shape, np.dtype(dtype)
    if key not in _kept:
        _kept[key] = np.zeros_like(like, dtype, shape=shape)  # CuPy's where `like` is
    return _kept[key]


@contextmanager
def zeros(like, name: str, shape: tuple[int, ...], dtype):
    """Such an array, for a caller that leaves it full of zeros, unless it is interrupted."""
    array = scratch(like, name, shape, dtype)
    try:
        yield array
    except BaseException:
        array[...] = 0
        raise
