"""The spans of rows: consecutive weights that belong to consecutive elements.

Those of a batch are found once and listed, for kernels that go over them again and again. A row of the list
is (slot, length, sign bits, element): the weights from `slot` on belong to the elements from `element` on, of
the F * D that a row of the batch has; see `span_at` in hashing.py.
"""

import numpy as np
from numba.extending import register_jitable

from robe.kernels.parts.hashing import ONE, TABLE, ZERO, SlotMap, block_of, block_start, span_from
from robe.kernels.parts.lanes import prefetch_span

LIST_BYTES = 2**23


def most_spans(slot_map: SlotMap) -> int:
    """An upper bound of the spans in one row of one feature.

    Its elements lie in at most `blocks` blocks. A span ends with its block, with the array (once a block,
    which is no longer than the array), or with a sign word (every 64 positions of a block). A row of a table
    is one.
    """
    width, block = int(slot_map.width), int(slot_map.block)
    if slot_map.family == TABLE and not slot_map.signed:
        return 1
    blocks = (width + block - 2) // block + 1
    return min(width, 2 * blocks + width // 64 + 1)


@register_jitable
def room_for_spans(rows, most):
    """(lists of up to `most` spans for some rows of a batch, room for their lengths).

    A batch is listed in parts of LIST_BYTES. Fewer parts wake the threads less often, but the system takes
    back much larger lists after each call, and hands them out anew, page by page, at the next.
    """
    size = max(1, min(rows, LIST_BYTES // (32 * max(most, 1))))
    return np.empty((size, most, 4), np.uint64), np.empty(size, np.int64)


def row_walk(visit):
    """Function (slot_map, token, state, kept) that goes over the spans of one row of the virtual table.

    visit(state, slot_map, kept, slot, length, bits, element) -> what is kept for the next span, as `span_at`
    names them; the last is returned. Only the first block takes a division: the next ones follow it.
    (A generator would say the same, but look-ups in blocks of 8 take twice as long with one.)
    """

    @register_jitable(forceinline=True)
    def walk(slot_map, token, state, kept):
        element = ZERO
        block, position = block_of(slot_map, token, element)
        start, word = block_start(slot_map, token, block)
        while True:
            slot, length, bits = span_from(slot_map, start, word, position, element)
            kept = visit(state, slot_map, kept, slot, length, bits, element)
            element += length
            position += length
            if element >= slot_map.width:
                return kept
            if position == slot_map.block:
                block, position = block + ONE, ZERO
                start, word = block_start(slot_map, token, block)

    return walk


@register_jitable(forceinline=True)
def _note(state, slot_map, n, slot, length, bits, element):
    listed, first = state
    listed[n, 0], listed[n, 1], listed[n, 2], listed[n, 3] = slot, length, bits, first + element
    return n + 1


_note_row = row_walk(_note)


@register_jitable
def find_spans(ids, base, slot_map, listed):
    """List the spans of one row of the batch, ids (F,), in `listed` (n, 4); returns how many there are."""
    n = 0
    for f in range(ids.size):
        first = np.uint64(f) * slot_map.width
        n = _note_row(slot_map, base[f] + np.uint64(ids[f]), (listed, first), n)
    return n


@register_jitable
def own_spans(listed, count, low, high, array, mine):
    """List which of `count` spans touch the slots low .. high - 1 of `array`, in order, and prefetch them."""
    n = 0
    for r in range(count):
        slot, length = listed[r, 0], listed[r, 1]
        mine[n] = r  # no branch, which would be mispredicted half of the time
        n += (slot < high) & (slot + length > low)
    for r in range(n):
        prefetch_span(array, listed[mine[r], 0], listed[mine[r], 1])
    return n
