"""Text in hexadecimal -> numbers, eight digits at once in the bytes of a 64-bit word.

Polars takes 33 ns to make a string of such a field and a number of that; this takes 13.
"""

import numpy as np

STEP = 1 << 17  # so many fields are worked on at a time: fewer calls, and still in the cache


def _bytes(value: int) -> np.uint64:
    return np.uint64(int.from_bytes(bytes([value] * 8), "little"))


U = np.uint64
LOW, ONE, TOP = _bytes(0x0F), _bytes(0x01), _bytes(0x80)
DIGIT, LOWER, LETTER = _bytes(0x30), _bytes(0x20), _bytes(0x60)
# The top bit is set by adding to a byte below 0x80, unless it is below 10, below 7, or 0.
FROM_10, FROM_7, FROM_1 = _bytes(0x80 - 10), _bytes(0x80 - 7), _bytes(0x80 - 1)
PAIRS, FOURS, ALL = U(0x00FF00FF00FF00FF), U(0x0000FFFF0000FFFF), U(0xFFFFFFFF)
# Of a word that ends with a field of so many bytes, those that belong to it.
OWN = np.array([(2**64 - 1) & ~(2 ** (64 - 8 * length) - 1) for length in range(9)], U)


def numbers(text: bytes, before: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """The numbers in fields of an ASCII text, as uint32; no digit is 0. None if a field holds anything but up
    to 8 digits.

    before, ends: (n, columns) int64, of the byte before a field's first and of the one after its last.
    """
    # Room before and after, so that all words can be read whole.
    words = np.zeros(len(text) // 8 + 3, "<u8")
    words.view(np.uint8)[8 : 8 + len(text)] = np.frombuffer(text, np.uint8)
    result = np.empty(ends.shape, np.uint32)
    step = max(1, STEP // max(1, ends.shape[1]))
    for row in range(0, len(ends), step):
        part = slice(row, row + step)
        lengths = ends[part] - before[part] - 1
        if lengths.size and lengths.max() > 8:
            return None
        found = _convert(words, ends[part], OWN.take(lengths, mode="clip"))
        if found is None:
            return None
        result[part] = found
    return result


def _convert(words: np.ndarray, ends: np.ndarray, own: np.ndarray) -> np.ndarray | None:
    """As uint64, the numbers whose last digit stands 8 bytes after `ends` - 1 in `words`, of the bytes `own`.

    In place, where that saves a pass over memory.
    """
    # The 8 bytes up to there, from the two aligned words that they lie in.
    index, shift = ends >> 3, ((ends & 7) << 3).view(U)
    word = words.take(index, mode="clip")
    word >>= shift
    index += 1
    other = words.take(index, mode="clip")
    other <<= U(1)
    other <<= np.subtract(U(63), shift, out=shift)
    word |= other
    word &= own

    no_digit = np.bitwise_xor(word, DIGIT, out=other)
    no_digit += FROM_10
    letter = word | LOWER
    letter ^= LETTER  # 1 to 6 for a to f
    no_letter = ~(letter + FROM_1)
    letter += FROM_7
    no_letter |= letter
    no_digit &= no_letter
    no_digit &= own
    no_digit &= TOP
    if no_digit.any():
        return None

    # The value of each byte; then neighbours are joined: the first digit stands in the lowest byte.
    value = word & LOW
    word >>= U(6)
    word &= ONE
    word *= U(9)
    value += word
    for bits, mask in ((4, PAIRS), (8, FOURS), (16, ALL)):
        np.left_shift(value, U(bits), out=word)
        value >>= U(2 * bits)
        value |= word
        value &= mask
    return value
