"""The runs of a batch, found once and listed, for kernels that go over them again and again.

A row of `runs` is (slot, length, sign bits, element): the weights from `slot` on belong to the elements from
`element` on, of the F * D that a row of the batch has; see `span_at` in hashing.py.
"""

import numpy as np
from numba.extending import register_jitable

from robe.kernels.parts.hashing import ONE, TABLE, ZERO, SlotMap, block_of, block_start, span_from
from robe.kernels.parts.lanes import prefetch_span

LIST_BYTES = 2**23


def most_spans(slot_map: SlotMap) -> int:
    """An upper bound of the runs in one row of one feature.

    Its elements lie in at most `blocks` blocks. A run ends with its block, with the array (once a block,
    which is no longer than the array), or with a sign word (every 64 positions of a block).
    """
    width, block = int(slot_map.width), int(slot_map.block)
    blocks = 1 if slot_map.family == TABLE else (width + block - 2) // block + 1
    return min(width, 2 * blocks + width // 64 + 1)


@register_jitable
def room_for_spans(rows, most):
    """(lists of up to `most` runs for some rows of a batch, room for their lengths).

    A batch goes through in parts whose lists take LIST_BYTES: the fewer parts, the fewer times threads are
    woken, but what is much larger the system takes back and hands out anew, page by page, at every call.
    """
    size = max(1, min(rows, LIST_BYTES // (32 * max(most, 1))))
    return np.empty((size, most, 4), np.uint64), np.empty(size, np.int64)


@register_jitable
def find_spans(ids, base, slot_map, runs):
    """List the runs of one row of the batch, ids (F,), in `runs` (n, 4); returns how many there are."""
    n = 0
    for f in range(ids.size):
        token, element = base[f] + np.uint64(ids[f]), ZERO
        block, position = block_of(slot_map, token, element)
        start, word = block_start(slot_map, token, block)
        while True:
            slot, length, bits = span_from(slot_map, start, word, position, element)
            runs[n, 0], runs[n, 1], runs[n, 2] = slot, length, bits
            runs[n, 3] = np.uint64(f) * slot_map.width + element
            n += 1
            element += length
            position += length
            if element >= slot_map.width:
                break
            if position == slot_map.block:
                block, position = block + ONE, ZERO
                start, word = block_start(slot_map, token, block)
    return n


@register_jitable
def own_spans(runs, count, low, high, array, mine):
    """List which of `count` runs touch the slots low .. high - 1 of `array`, in order, and prefetch them."""
    n = 0
    for r in range(count):
        slot, length = runs[r, 0], runs[r, 1]
        mine[n] = r  # no branch, which would be mispredicted half of the time
        n += (slot < high) & (slot + length > low)
    for r in range(n):
        prefetch_span(array, runs[mine[r], 0], runs[mine[r], 1])
    return n
