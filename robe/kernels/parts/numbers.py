"""Numbers that a CUDA kernel is given: by the host, or in an array (1,) on the device.

A graph of a step (robe/graph.py) calls its kernels with the arguments that it was captured with. What changes
from step to step, such as the learning rate, therefore lies in arrays, which kernels read each time.
"""

from numba import types
from numba.extending import overload


def typed(number, dtype):
    """A number as that type, for a launch; an array (1,) stays, if it has the type.

    Raises TypeError for an array of another type, since the kernel would compute in it.
    """
    if not hasattr(number, "ndim") or number.ndim == 0:
        return dtype.type(number)
    if number.dtype != dtype:
        raise TypeError(f"a kernel of {dtype} was given a number of {number.dtype}")
    return number


def value_of(number):
    """The number, in a kernel."""
    return number[0] if getattr(number, "ndim", 0) else number


@overload(value_of)
def _value_of(number):
    if isinstance(number, types.Array):
        return lambda number: number[0]
    return lambda number: number
