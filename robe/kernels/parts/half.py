"""Weights in half precision: IEEE 754 binary16, read as float32, and rounded at random when stored.

A step of training is often smaller than half the distance between two neighbouring float16 numbers ("halves"
here). Rounding to nearest would lose such a step every time. So a weight between two halves is rounded at
random, to the upper one with the probability that keeps its expectation:

    bits of a half = (bits of float32(x) * 2^-112, without the sign, + 13 random bits) >> 13

The factor changes the exponent's bias from 127 to 15; then the upper bits of the float32 are a half. (This
holds below 2^-14 too, where both are subnormal and x is first rounded to a multiple of 2^-37.) What exceeds
65504, the largest half, becomes 65504; NaN stays NaN. The random bits of a weight are a hash of (seed, step,
slot), so they are the same for any number of threads, for every version of a kernel, and after resuming.

Arrays are float16; kernels take the bits (`words`), since Numba has no float16 on the CPU, and on a GPU calls
a function for it. The functions below run on NumPy arrays, or compiled, like those of hashing.py.
"""

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from robe.kernels.parts.hashing import K1, K2, U64, mix64, word_of

U32 = np.uint32
SIGN, NO_SIGN, BITS = U32(0x8000), U32(0x7FFF), U32(13)
LARGEST, INFINITE = U32(0x7BFF), U32(0x7C00)  # 65504, and what is above
SMALLER, LARGER = np.float32(2.0**-112), np.float32(2.0**112)


@register_jitable
def to_half(x, random):
    """The bits of the half above or below a float32; random: 0 .. 2^13 - 1, 0 to round towards zero."""
    bits = np.float32(x * SMALLER).view(np.uint32)
    size = U32(U32(bits & U32(0x7FFFFFFF)) + random) >> BITS
    over = U32(size > LARGEST)
    size = U32(over * LARGEST + U32(U32(1) - over) * size) | U32(x != x) * NO_SIGN
    return np.uint16(size | U32(bits >> U32(16)) & SIGN)


@register_jitable
def from_half(bits):
    """The float32 that the bits of a half stand for."""
    size = U32(bits) & NO_SIGN
    number = np.float32(U32(size << BITS).view(np.float32) * LARGER).view(np.uint32)
    endless = U32(size >= INFINITE) * U32(0x7F800000)
    return U32(number | endless | U32(U32(bits) & SIGN) << U32(16)).view(np.float32)


def words(memory):
    """An array as kernels take it: the bits of halves as uint16, anything else as it is."""
    return memory.view("uint16") if memory.dtype == "float16" else memory


def widen(weight):
    """A weight of such an array as a float."""
    return from_half(weight) if isinstance(weight, np.uint16) else weight


@overload(widen)
def _widen(weight):
    if weight == types.uint16:
        return lambda weight: from_half(weight)
    return lambda weight: weight


def rounding_key(seed: int, step: int) -> np.uint64:
    """What `random_bits` needs of a step of training."""
    with np.errstate(over="ignore"):
        return word_of(mix64(U64(seed) + K2), U64(step))


def key_from(key: np.uint64, first: int) -> np.uint64:
    """The key by which slots that are counted from `first` on get the `random_bits` of all slots by `key`."""
    with np.errstate(over="ignore"):
        return key + U64(first) * K1


@register_jitable
def random_bits(key, slot):
    """13 bits for the weight of a slot, once a step."""
    return U32(word_of(key, U64(slot)) >> U64(51))
