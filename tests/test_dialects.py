import math
from bisect import bisect_left
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import dialects
from data_pipeline.dialects import TRANSFORMS, Dictionary, Distinct, Numbers, distinct, fmix32, learn


def blocks(rng, sizes, highest):
    """Blocks of ids (n, F), small ones more often; those of feature f are below highest[f]."""
    return [(rng.random((n, len(highest))) ** 3 * highest).astype(np.uint32) for n in sizes]


def plain(column, modulus, min_count, order):
    """The values of ids 1, 2, ... by a Counter, which keeps the order of first appearance."""
    counts = Counter(value % modulus if modulus else value for value in column)
    kept = [value for value, count in counts.items() if count >= min_count]
    return kept if order == "first" else sorted(kept, key=lambda value: (-counts[value], value)), counts


columns = st.lists(
    st.integers(0, 12) | st.sampled_from([100, 107, 2**31, 2**32 - 8, 2**32 - 1]) | st.integers(0, 2**32 - 1),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(
    columns,
    st.none() | st.integers(1, 20) | st.sampled_from([2**12, 2**31 + 2]),
    st.integers(1, 4),
    st.sampled_from(["first", "count"]),
    st.integers(1, 60),
)
def test_a_dictionary_is_that_of_plain_python(column, modulus, min_count, order, size):
    """Thresholds and ties come up all the time: most values are few, and seen once or twice."""
    pieces = [np.array(column[i : i + size], np.uint32) for i in range(0, len(column), size)]
    learned = learn(lambda: iter(pieces), len(column), modulus, min_count, order)
    values, counts = plain(column, modulus, min_count, order)
    assert learned.values.dtype == np.uint32
    assert learned.values.tolist() == values
    falling = sorted(counts.values(), reverse=True)
    assert learned.report == {
        "distinct": len(counts),
        "kept": len(values),
        "rare_rows": sum(count for count in falling if count < min_count),
        "coverage": {
            str(n): pytest.approx(sum(falling[:n]) / len(column), abs=1e-6)
            for n in (1, 10, 100)
            if n <= len(falling)
        },
    }
    other = [*column, 3, 2**32 - 2, 10**9, 0]
    known = {value: number for number, value in enumerate(values, 1)}
    expected = [known.get(value % modulus if modulus else value, 0) for value in other]
    found = Numbers(learned.values, modulus).find(np.array(other, np.uint32))
    assert found.dtype == np.uint32
    assert found.tolist() == expected


def test_counts_that_do_not_fit_in_32_bits():
    pieces = lambda: iter([np.array([7, 7, 9], np.uint32)])  # noqa: E731
    assert learn(pieces, 3, 10, 2).values.tolist() == [7]
    assert learn(pieces, 2**32, 10, 2).values.tolist() == [7]


@pytest.mark.parametrize("cached", [0, 10**9])
def test_places_among_many_keys(rng, monkeypatch, cached):
    monkeypatch.setattr(dialects, "CACHED", cached)
    keys = np.unique(rng.integers(0, 2**32, 5000, dtype=np.uint32))
    values = np.concatenate([rng.integers(0, 2**32, 3000, dtype=np.uint32), keys[::3], [0, 2**32 - 1]])
    values = rng.permutation(values.astype(np.uint32))
    expected = [bisect_left(keys, value) for value in values]
    assert dialects._search(keys, values).tolist() == expected


@pytest.mark.parametrize("largest", [1, 30, 5000])
def test_distinct_values_of_many_pieces(rng, monkeypatch, largest):
    monkeypatch.setattr(dialects, "SORTED", largest)
    pieces = [column[:, 0] for column in blocks(rng, [600, 1, 300, 7, 2000, 40], [2**32])]
    pieces.append(pieces[0])
    assert distinct(iter(pieces)).tolist() == sorted(set(np.concatenate(pieces).tolist()))
    assert distinct(iter([])).size == 0


def test_a_dictionary_encodes_all_features(rng):
    (ids,) = blocks(rng, [300], [3, 900, 2**32])
    values = [np.unique(column)[:50] for column in ids.T]
    known = [{value: number for number, value in enumerate(part.tolist(), 1)} for part in values]
    expected = [[known[f].get(value, 0) for f, value in enumerate(row)] for row in ids.tolist()]
    encoded = Dictionary(values, None).encode(ids)
    assert encoded.dtype == np.uint32
    assert encoded.flags.c_contiguous
    assert encoded.tolist() == expected


def test_an_empty_dictionary_knows_nothing():
    empty = np.empty(0, np.uint32)
    for modulus in (None, 5):
        assert Dictionary([empty, empty], modulus).encode(np.ones((3, 2), np.uint32)).tolist() == [[0, 0]] * 3


def test_fmix32_is_murmur3_and_one_to_one():
    # The finalizer of MurmurHash3_x86_32 in exact arithmetic.
    def plain(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    x = np.array([0, 1, 2, 0x12345678, 2**31, 2**32 - 1], np.uint32)
    assert fmix32(x).tolist() == [plain(int(v)) for v in x]
    assert fmix32(x)[1] == 0x514E28B7
    assert np.unique(fmix32(np.arange(10**5, dtype=np.uint32))).size == 10**5


@pytest.mark.parametrize("sizes", [[5000], [1, 300, 5, 4000, 694]])
def test_distinct_ids_are_counted(rng, sizes):
    highest = [1, 60, 400, 10**5, 2**32]
    counter, seen = Distinct(5, k=256), blocks(rng, sizes, highest)
    for ids in seen:
        counter.add(ids)
    exact = [np.unique(column).size for column in np.concatenate(seen).T]
    assert not counter.exact()
    assert counter.counts()[:2] == tuple(exact[:2])
    # Five standard errors.
    np.testing.assert_allclose(counter.counts(), exact, rtol=5 / 254**0.5)


def test_the_count_is_exact_below_k():
    for count, exact in ((255, True), (256, False)):
        counter = Distinct(1, k=256)
        counter.add(np.arange(count, dtype=np.uint32)[:, None])
        assert counter.exact() is exact
    assert Distinct(1).k == 4096


def test_the_first_id_of_a_slot_is_counted():
    """No hash may be taken for one just seen before any was: not even those that fill the slots at first."""
    for value in (0, 1, 2**32 - 1):
        counter = Distinct(1)
        counter.add(np.array([[value]], np.uint32))
        assert counter.counts() == (1,)


def test_the_error_of_the_count_is_as_announced(rng):
    """1 / sqrt(k - 2) is 1.6%; over 60 features the root mean square must come within a third of it."""
    counter = Distinct(60)
    for ids in np.split(rng.integers(0, 2**32, (100_000, 60), dtype=np.uint32), 10):
        counter.add(ids)
    errors = np.array(counter.counts()) / 100_000 - 1
    assert 0.010 < np.sqrt(np.mean(errors**2)) < 0.021
    assert abs(errors.mean()) < 0.008


def test_the_estimate_is_right_on_average(rng):
    """k / fraction in place of (k - 1) / fraction would be a seventh too much where k is 8."""
    counter = Distinct(2000, k=8)
    counter.add(rng.integers(0, 2**32, (1000, 2000), dtype=np.uint32))
    # The standard error of one is 1 / sqrt(6), so that of the mean of 2,000 is 0.9%; four of them.
    assert abs(np.mean(counter.counts()) / 1000 - 1) < 0.037


def test_neither_blocks_nor_merging_change_the_count(rng):
    (ids,) = blocks(rng, [9000], [300, 10**6])
    results = []
    for parts in (1, 9, 900):
        counter = Distinct(2, k=512)
        for part in np.split(ids, parts):
            counter.add(part)
        results.append(counter.counts())
        merged = Distinct(2, k=512)
        for half in np.split(ids, 2):
            counter = Distinct(2, k=512)
            counter.add(half)
            merged.merge(counter.to_array())
        results.append(merged.counts())
    assert set(results) == {results[0]}


def test_dense_values():
    values = [-(10**18 - 1), -3, 0, 1, 65534, 65535, 65536, 65537, 10**9 + 1, 10**18 - 1]
    array = np.array([values, values[::-1]], np.int64)
    expected = [np.float32(math.log1p(max(value, 0))) for value in values]
    found = TRANSFORMS["log1p"](array)
    assert found.dtype == np.float32
    assert found.tolist() == [expected, expected[::-1]]
    found = TRANSFORMS["none"](array)
    assert found.dtype == np.float32
    assert found.tolist() == [[float(np.float32(value)) for value in row] for row in array.tolist()]
