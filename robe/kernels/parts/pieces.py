"""Pieces of rows: what a CUDA kernel hashes once for many elements.

A piece is R = gcd(Z, D, 64) consecutive elements of a row, the first of them a multiple of R; of a full
table, which has no blocks, gcd(D, 64). So it lies in one block and under one word of signs, and one hash
locates all of it: element k lies at slot + k, which goes on behind the end of the array as `around` says, and
bit k of the sign bits is its sign. R is a power of two, 2^shift, so a shift finds the piece of an element.

Thread blocks work on tiles of TILE pieces: each thread hashes one into shared memory, all wait for each
other, and then they share the elements of the tile. Pieces are numbered row after row: piece p is part
p mod (D / R) of row (b, f), where b * F + f = p div (D / R). The numbers have 32 bits, since a 64-bit
division is slow.
"""

from math import gcd

import numpy as np
from numba import config
from numba.extending import register_jitable

from robe.kernels.parts.groups import fetch
from robe.kernels.parts.hashing import TABLE, U64, flip, span_at

U32 = np.uint32
TILE = 8 if config.ENABLE_CUDASIM else 256  # pieces


def count_pieces(slot_map, ids) -> tuple[int, np.uint32]:
    """(pieces of a batch of ids, shift)."""
    width, block = int(slot_map.width), int(slot_map.block)
    length = gcd(width, 64) if slot_map.family == TABLE else gcd(width, block, 64)
    pieces = ids.size * (width // length)
    if pieces >= 2**31:
        raise ValueError(f"{len(ids)} rows are {pieces} pieces of {length} elements; 2^31 is too many")
    return pieces, U32(length.bit_length() - 1)


@register_jitable
def piece_at(piece, ids, base, slot_map, shift):
    """(slot and sign bits of the first element of a piece, b, f, the element's number in its row)."""
    parts = U32(U32(slot_map.width) >> shift)
    row = U32(piece // parts)
    b = U32(row // U32(ids.shape[1]))
    f = U32(row - b * U32(ids.shape[1]))
    element = U32((piece - row * parts) << shift)
    slot, _, bits = span_at(slot_map, base[f] + U64(ids[b, f]), U64(element))
    return slot, bits, b, f, element


@register_jitable
def around(slot, slot_map):
    """A slot less than a piece behind the end of an array is one at the beginning of its ring."""
    return slot - (slot_map.memory - slot_map.front) if slot >= slot_map.memory else slot


@register_jitable
def weight(memory, slot_map, slot, bits, k):
    """Element k of a piece."""
    return flip(fetch(memory, slot_map, around(slot + U64(k), slot_map)), bits, k)
