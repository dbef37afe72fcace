"""Sums that do not depend on their order: numbers as whole multiples of one unit, added up as integers.

A sum of floats is rounded at each addition, so its last bits tell the order. A sum of integers is exact, and
any order gives the same. So the numbers of a batch are cut, towards zero, to multiples of

    unit = 2^(e - digits),  e the least exponent with |x| < 2^e for all finite x,  but at least 2^-126

which is 2^-40 of the largest number, or of up to twice that, for sums of up to 2^23 numbers (`digits_of`). A
sum of n numbers is wrong by less than n units, and then rounded to a float once. A number that is not finite
has no multiple; who adds must look for it.

The functions below run on NumPy's numbers, or compiled, like those of hashing.py.
"""

import numpy as np
from numba.extending import register_jitable

U32 = np.uint32
SIZE, INFINITE, BIAS, MANTISSA = U32(0x7FFFFFFF), U32(0x7F800000), U32(127), U32(23)
DIGITS = 40  # bits of a number in units, without its sign, where 63 are enough for the sum


def digits_of(count: int) -> np.uint32:
    """Bits that each of `count` numbers may have, so that their sum has 63 at most."""
    return U32(min(DIGITS, 63 - count.bit_length()))


@register_jitable
def size_bits(x):
    """|x| as the bits of a float32: as integers they are in the order of the sizes, then infinity and NaN."""
    return U32(np.float32(x).view(np.uint32) & SIZE)


@register_jitable
def finite_bits(x):
    """`size_bits` of a finite number; 0 of any other."""
    bits = size_bits(x)
    return bits if bits < INFINITE else U32(0)


@register_jitable
def unit_bits(largest, digits):
    """The exponent of the unit, as in the bits of a float32; largest: `size_bits` of the largest number."""
    exponent = U32(U32(largest >> MANTISSA) + U32(1))
    return U32(exponent - digits) if exponent > digits else U32(1)


@register_jitable
def to_units(x, largest, digits):
    """A finite number in units, int64."""
    return np.int64(x * U32(U32(U32(2) * BIAS - unit_bits(largest, digits)) << MANTISSA).view(np.float32))


@register_jitable
def from_units(total, largest, digits):
    """A sum in units, int64, as a float32."""
    return np.float32(total) * U32(unit_bits(largest, digits) << MANTISSA).view(np.float32)
