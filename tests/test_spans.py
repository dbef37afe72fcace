"""The runs of a batch: they cover every element once, where the hash says, and never more than foreseen."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from robe.kernels.parts.hashing import front_of, slot_map, slots_reference
from robe.kernels.parts.spans import find_spans, most_spans


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_runs_are_the_slot_map_and_no_more_than_foreseen(data):
    width = data.draw(st.integers(1, 200))
    block = data.draw(st.integers(1, 300))
    memory = data.draw(st.integers(block, block + 40) | st.integers(block, 5000))
    family = data.draw(st.sampled_from(["mix", "affine", "hot"]))
    exact = data.draw(st.integers(0, 5)) if family == "hot" else 0
    seed, signed = data.draw(st.integers(0, 9)), data.draw(st.booleans())
    where = slot_map(family, width, block, front_of(exact, width) + memory, seed, signed, exact)
    ids = np.array([data.draw(st.integers(0, 2**32 - 1) | st.integers(0, 5)) for _ in range(2)], np.uint32)
    base = np.array([0, 2**32], np.uint64)

    most = 2 * most_spans(where)
    # Room for more than there may be, to see a run too many.
    runs = np.full((most + 2 * width, 4), 2**63, np.uint64)
    count = find_spans(ids, base, where, runs)
    assert count <= most

    slots, signs = slots_reference(where, base + ids)
    found, negative, element = [], [], 0
    for slot, length, bits, first in runs[:count].tolist():
        assert first == element
        element += length
        found += range(slot, slot + length)
        negative += [bits >> k & 1 for k in range(length)]
    np.testing.assert_array_equal(found, slots.ravel())
    np.testing.assert_array_equal(negative, signs.ravel() < 0)
