"""Which look-ups of a batch are of one and the same row."""

import numpy as np
from numba import njit

from robe.kernels.parts.hashing import mix64


def places_for(count: int) -> int:
    """How many places `number_distinct` takes for so many tokens: a power of two, at most half of it full."""
    return 1 << count.bit_length() + 1


@njit(nogil=True, cache=True)
def number_distinct(tokens, places, found, numbers):
    """Number the distinct ones of tokens (N,) uint64 from 0 on, in the order in which they come.

    found (N,) uint64: gets them; numbers (N,) uint32: gets the number of each token; places (`places_for`,)
    uint32: all 0, and left otherwise. Returns how many there are.
    """
    n, last = 0, len(places) - 1
    for i in range(len(tokens)):
        place = int(mix64(tokens[i])) & last
        while places[place] > 0 and found[places[place] - 1] != tokens[i]:
            place = place + 1 & last
        if places[place] == 0:
            found[n] = tokens[i]
            n += 1
            places[place] = n
        numbers[i] = places[place] - 1
    return n


def distinct(tokens):
    """The distinct ones of tokens (B, F) uint64, in the order in which they come, and (B, F) uint32 which of
    them each is."""
    found, numbers = np.empty(tokens.size, np.uint64), np.empty(tokens.shape, np.uint32)
    places = np.zeros(places_for(tokens.size), np.uint32)
    count = number_distinct(tokens.reshape(-1), places, found, numbers.reshape(-1))
    return found[:count], numbers
