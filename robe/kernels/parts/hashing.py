"""Where each element of the virtual embedding table lives: the hash, written once for every machine.

The functions below are plain Python on uint64. NumPy runs them on arrays, `njit` and `cuda.jit` compile
them into the kernels that call them, and the CUDA simulator and the debugger step through them.

A row of the virtual table is a *token* (feature and id in one number); its element i lies at `position`
p of a block of Z elements, and blocks are placed in `memory` (M weights) as a whole. Four families:

    mix     e = token * D + i,  block = e // Z,  p = e mod Z                             (any 1 <= Z <= M)
            word  = mix64(mix64(seed + K1) + block * K1)
            start = floor(word * M / 2^64)                                           (no division)
            slot  = (start + p) mod M                                                (circular)
    affine  the published implementation's map (github.com/apd10/robez); c = i // Z, p = i mod Z
            start = ((token * A + c * B + C) mod P) mod (M - Z + 1)
            slot  = start + p                                                        (not circular)
    table   no hash: slot = token * D + i, the ordinary full table, M = rows * D; its block is a row
    hot     `exact` rows in front, and from slot `front` on a ROBE array, the ring; row = token mod 2^32
            slot  = row * D + i                      where row < exact, without signs
            slot  = front + the slot that `mix` finds in an array of M - front weights             elsewhere
            (front is a multiple of 64, so that no group of codes of groups.py holds weights of both)

The sign of an element is -1 where bit (p mod 64) of mix64(word + (p // 64 + 1) * KS) is set, if the map
is signed. `affine` has signs only as an experiment (the published code has none); its word is then that
of `mix` with the number token * D + c for the block.

mix64 is the finaliser of splitmix64 (Steele, Lea, Flood, 2014).
"""

import warnings
from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

MIX, AFFINE, TABLE, HOT = 0, 1, 2, 3
FAMILIES = {"mix": MIX, "affine": AFFINE, "table": TABLE, "hot": HOT}
ALIGNED = 64  # weights: `front` is a multiple

# Every constant is an explicit uint64: one signed operand turns a sum into int64 (Numba) or float64 (NumPy).
U64 = np.uint64
ZERO, ONE, WORD_BITS = U64(0), U64(1), U64(64)
K1 = U64(0x9E3779B97F4A7C15)
K2 = U64(0xBF58476D1CE4E5B9)
K3 = U64(0x94D049BB133111EB)
KS = U64(0xD1B54A32D192ED03)
P = U64(2038074743)  # a prime near 2^31, the modulus of `affine`
P_RECIPROCAL = U64((2**64 - 1) // 2038074743)
LOW32, S27, S30, S31, S32 = U64(0xFFFFFFFF), U64(27), U64(30), U64(31), U64(32)

# As plain Python (simulator, debugger) uint64 scalars wrap as they should, but NumPy warns of it.
warnings.filterwarnings("ignore", "overflow encountered in scalar", RuntimeWarning, module=__name__)


class SlotMap(NamedTuple):
    """Everything a kernel needs to locate an element; scalars only, so kernels take it as an argument."""

    family: int
    signed: bool
    key: np.uint64  # mix64(seed + K1)
    a: np.uint64  # coefficients of `affine`
    b: np.uint64
    c: np.uint64
    width: np.uint64  # D
    block: np.uint64  # Z
    block_reciprocal: np.uint64
    memory: np.uint64  # M
    starts: np.uint64  # M - Z + 1, how many starts `affine` has
    starts_reciprocal: np.uint64
    exact: np.uint64  # rows in front of the ring, of `hot`
    front: np.uint64  # weights in front of the ring, of `hot`; else 0


def slot_map(
    family: str,
    width: int,
    block: int,
    memory: int,
    seed: int = 0,
    signed: bool = True,
    exact: int = 0,
) -> SlotMap:
    """The map of one array of `memory` weights; ValueError for a block that does not fit.

    exact: rows of `hot` in front of its ring.
    """
    front = front_of(exact, width)
    if width < 1 or not 1 <= block <= memory - front:
        given = f"{width=}, {block=}, {memory=}" + (f" of which {front} are in front" if front else "")
        raise ValueError(f"need width >= 1 and 1 <= block <= memory, not {given}")
    if family == "affine" and memory > P:
        raise ValueError(f"the affine hash reaches {P} weights at most, not {memory}; use the hash `mix`")
    starts = memory - block + 1
    block = width if family == "table" else block
    c, b, a = 0, 0, 0
    if family == "affine":  # as published
        c, b, a = np.random.RandomState(seed % 2**32).randint(0, int(P), 50)[:3]
    with np.errstate(over="ignore"):
        key = mix64(U64(seed % 2**64) + K1)
    return SlotMap(
        family=FAMILIES[family],
        signed=signed,
        key=key,
        a=U64(a),
        b=U64(b),
        c=U64(c),
        width=U64(width),
        block=U64(block),
        block_reciprocal=reciprocal(block),
        memory=U64(memory),
        starts=U64(starts),
        starts_reciprocal=reciprocal(starts),
        exact=U64(exact),
        front=U64(front),
    )


def front_of(exact: int, width: int) -> int:
    """How many weights `exact` rows of `width` take in front of the ring."""
    return -(-exact * width // ALIGNED) * ALIGNED


def reciprocal(divisor: int) -> np.uint64:
    """What `divide` needs beside a divisor from 1 to 2^64 - 1."""
    return U64((2**64 - 1) // divisor)


@register_jitable
def mix64(z):
    """Scramble 64 bits, one to one."""
    z = (z ^ (z >> S30)) * K2
    z = (z ^ (z >> S27)) * K3
    return z ^ (z >> S31)


@register_jitable
def word_of(key, number):
    """64 bits for each number, another sequence for each key."""
    return mix64(key + number * K1)


@register_jitable
def multiply_high(x, y):
    """The high 64 bits of the 128-bit product x * y, from four products of 32-bit halves."""
    x_low, x_high, y_low, y_high = x & LOW32, x >> S32, y & LOW32, y >> S32
    middle = x_high * y_low + ((x_low * y_low) >> S32)
    carry = x_low * y_high + (middle & LOW32)
    return x_high * y_high + (middle >> S32) + (carry >> S32)


@register_jitable
def divide(x, divisor, reciprocal):
    """(x // divisor, x % divisor) without a division, which is slow on GPUs.

    On CPUs, LLVM may widen a division beside `multiply_high` to 128 bits and call a function that is not
    there (__udivti3), so kernels divide 64-bit numbers here only.

    The reciprocal is below 2^64 / divisor by at most 1, so x * reciprocal / 2^64 is below x / divisor by less
    than 1, and its floor is the quotient or one less.
    """
    quotient = multiply_high(x, reciprocal)
    rest = x - quotient * divisor
    over = U64(rest >= divisor)
    return quotient + over, rest - over * divisor


@register_jitable
def block_of(slot_map, token, element):
    """(number of the block an element is in, its position there); the next block has the next number."""
    if slot_map.family == MIX or slot_map.family == HOT:
        index = token * slot_map.width + element
        return divide(index, slot_map.block, slot_map.block_reciprocal)
    if slot_map.family == AFFINE:
        return divide(element, slot_map.block, slot_map.block_reciprocal)
    return ZERO * element, element


@register_jitable
def block_start(slot_map, token, block):
    """(start in memory, sign word) of a block of a row."""
    if slot_map.family == MIX:
        word = word_of(slot_map.key, block)
        return multiply_high(word, slot_map.memory), word
    if slot_map.family == AFFINE:
        # The token is reduced first: the products below then stay under 2^63 for any token.
        _, token_modulo = divide(token, P, P_RECIPROCAL)
        _, start = divide(token_modulo * slot_map.a + block * slot_map.b + slot_map.c, P, P_RECIPROCAL)
        _, start = divide(start, slot_map.starts, slot_map.starts_reciprocal)
        return start, word_of(slot_map.key, token * slot_map.width + block)
    if slot_map.family == HOT:
        word, row = word_of(slot_map.key, block), token & LOW32
        start = slot_map.front + multiply_high(word, slot_map.memory - slot_map.front)
        # Blocks are counted over all tokens, and exact rows lie as if the rows below 2^32 were all.
        own = block * slot_map.block - (token - row) * slot_map.width
        return start + U64(row < slot_map.exact) * (own - start), word
    return token * slot_map.width, ZERO * token


@register_jitable
def locate(slot_map, token, element):
    """The block of one element: (start of the block in memory, its sign word, position in the block)."""
    block, position = block_of(slot_map, token, element)
    start, word = block_start(slot_map, token, block)
    return start, word, position


@register_jitable
def sign_bits(word, position):
    """64 sign bits, those of the positions 64 * (position // 64) and on; a set bit means -1."""
    return mix64(word + (position // WORD_BITS + ONE) * KS)


@register_jitable
def span_at(slot_map, token, element):
    """The longest span of elements from `element` on whose slots are consecutive and share a sign word.

    Returns (slot, length, bits): element + k lies at slot + k and is negated where bit k of `bits` is
    set, for k < length. A span ends with the row, its block, the array (`mix` goes on at slot 0, `hot` where
    its ring begins), or 64 positions of a block.
    """
    start, word, position = locate(slot_map, token, element)
    return span_from(slot_map, start, word, position, element)


@register_jitable
def span_from(slot_map, start, word, position, element):
    """`span_at` for an element that was located."""
    length = slot_map.width - element
    bits = ZERO
    if slot_map.family != TABLE:
        length = min(length, slot_map.block - position)
    slot = start + position
    if slot >= slot_map.memory:
        slot -= slot_map.memory - slot_map.front
    length = min(length, slot_map.memory - slot)
    if slot_map.signed and slot >= slot_map.front:
        bit = position % WORD_BITS
        length = min(length, WORD_BITS - bit)
        bits = sign_bits(word, position) >> bit
    return slot, length, bits


@register_jitable
def flip(value, bits, k):
    """`value` with the sign that bit k of `bits` says."""
    if (bits >> U64(k)) & ONE:
        return -value
    return value


def slots_reference(slot_map: SlotMap, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots (int64) and signs (int8, +1 or -1) of all elements of the rows; both of shape (..., D)."""
    element = np.arange(slot_map.width, dtype=np.uint64)
    start, word, position = locate(slot_map, tokens.astype(np.uint64)[..., None], element)
    slots = start + position
    slots -= (slot_map.memory - slot_map.front) * (slots >= slot_map.memory)
    signs = np.ones(slots.shape, np.int8)
    if slot_map.signed:
        negative = (sign_bits(word, position) >> (position % WORD_BITS)) & ONE == ONE
        signs[negative & (slots >= slot_map.front)] = -1
    return slots.astype(np.int64), signs
