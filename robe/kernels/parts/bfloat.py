"""Activations in bfloat16: the upper half of a float32, rounded to nearest, ties to even.

NumPy has no such type, so arrays of them hold words of 16 bits (uint16). CUDA kernels that read or write
activations take such arrays as well as arrays of floats: `number` reads an element of either, and `kept` is a
number as an element of either. Products and sums stay in float32.
"""

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

U32 = np.uint32
NAN, HALF, ODD, BITS = U32(0x7FC0), U32(0x7FFF), U32(1), U32(16)


@register_jitable
def to_bfloat(x):
    """The word of the bfloat16 nearest to a float32; any NaN is 0x7FC0."""
    bits = np.float32(x).view(np.uint32)
    # Half a unit, less one bit where the kept part is even, carries exactly where rounding goes up.
    word = U32(bits + U32(HALF + U32(U32(bits >> BITS) & ODD))) >> BITS
    return np.uint16(NAN if x != x else word)


@register_jitable
def from_bfloat(word):
    """The float32 that a word stands for."""
    return U32(U32(word) << BITS).view(np.float32)


def number(element):
    """An element of an array of activations as a float."""
    return from_bfloat(element) if isinstance(element, np.uint16) else element


@overload(number)
def _number(element):
    if element == types.uint16:
        return lambda element: from_bfloat(element)
    return lambda element: element


def kept(array, x):
    """A number as an element of an array of activations."""
    return to_bfloat(x) if array.dtype == np.uint16 else x


@overload(kept)
def _kept(array, x):
    if array.dtype == types.uint16:
        return lambda array, x: to_bfloat(x)
    return lambda array, x: x
