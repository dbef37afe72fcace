"""Which look-ups of a batch are of one and the same row."""

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
