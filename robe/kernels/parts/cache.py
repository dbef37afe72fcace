"""A set-associative cache of rows: which set a row belongs to, and where in the set it is.

    tags  (sets, WAYS) uint32   number of the row that each entry holds, or EMPTY
    used  (sets, WAYS) uint32   LRU: the step that last touched it; LFU: its look-ups since it came
    values (sets * WAYS, D) float32

The set of a row is the upper part of a hash of its number, which is one to one on 32 bits: so whoever sorts
the rows of a batch by their hash has equal rows side by side, and the rows of each set too.
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic, register_jitable

from robe.kernels.parts.codes import NO_ROW
from robe.kernels.parts.hashing import LOW32, U64
from robe.kernels.parts.lanes import _splat, _vector_pointer

WAYS = 32
EMPTY = NO_ROW
M1, M2 = U64(0x85EBCA6B), U64(0xC2B2AE35)
S13, S16, S32 = U64(13), U64(16), U64(32)
NOWHERE = -1
U32 = np.uint32


@register_jitable
def look_up_at(look_up, features):
    """(b, f) of a look-up, b * F + f."""
    b = U32(U32(look_up) // U32(features))
    return b, U32(U32(look_up) - U32(b * U32(features)))


@register_jitable
def row_at(ids, base, look_up):
    """(row, feature) of a look-up, b * F + f."""
    b, f = look_up_at(look_up, ids.shape[1])
    return U32(base[f] + U64(ids[b, f])), f


@register_jitable
def hash_row(row):
    """The finaliser of MurmurHash3 (Appleby), one to one on 32 bits; on uint64, where nothing overflows."""
    h = U64(row)
    h = ((h ^ (h >> S16)) * M1) & LOW32
    h = ((h ^ (h >> S13)) * M2) & LOW32
    return h ^ (h >> S16)


@register_jitable
def hash_token(token):
    """32 bits of a token of up to 64, whose upper half is folded in; of a row, its hash."""
    token = U64(token)
    return hash_row((token ^ ((token >> S32) * M2)) & LOW32)


@register_jitable
def set_of(hashed, sets):
    """The set of a row with that hash; 0 of none."""
    return np.int64((U64(hashed) * U64(sets)) >> S32)


@intrinsic
def _way_with(typing, tags, first, row):
    """The least w with tags[first + w] equal to the row, of a contiguous array; WAYS if there is none."""

    def code(context, builder, signature, arguments):
        tags, first, row = arguments
        found = builder.load(_vector_pointer(context, builder, signature.args[0], tags, first, WAYS), align=4)
        equal = builder.icmp_unsigned("==", found, _splat(builder, row, WAYS))
        ways = builder.bitcast(equal, ir.IntType(WAYS))
        return builder.zext(builder.cttz(ways, ir.IntType(1)(0)), ir.IntType(64))

    return types.int64(tags, first, row), code


if config.DISABLE_JIT or config.BOUNDSCHECK:

    @register_jitable
    def _way_with(tags, first, row):
        s = np.int64(first) // WAYS
        for way in range(WAYS):
            if tags[s, way] == row:
                return way
        return WAYS


@register_jitable
def entry_of(tags, row):
    """The entry in the cache, set * WAYS + way, of a row; NOWHERE if it is not there. On the CPU."""
    first = set_of(hash_row(row), tags.shape[0]) * WAYS
    way = _way_with(tags, first, np.uint32(row))
    return first + way if way < WAYS else np.int64(NOWHERE)


@register_jitable
def way_of(tags, s, row):
    """The way of a row in its set; NOWHERE if it is not there. Compiled for a GPU too."""
    for way in range(WAYS):
        if tags[s, way] == row:
            return way
    return NOWHERE
