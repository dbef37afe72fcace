from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.dialects import Dictionary, HashIds, Vocabulary, fmix32


def blocks(rng, sizes, highest):
    """Blocks of ids (n, F), small ones more often; those of feature f are below highest[f]."""
    return [(rng.random((n, len(highest))) ** 3 * highest).astype(np.uint32) for n in sizes]


@pytest.mark.parametrize("sizes", [[600], [1] * 50, [7, 500, 1, 40, 300, 3, 200]])
def test_the_dictionary_numbers_values_as_dicts_do(rng, sizes):
    highest = [1, 5, 300, 2**32]
    encoder, numbers = Dictionary(4), [{} for _ in highest]
    for ids in blocks(rng, sizes, highest):
        expected = [
            [known.setdefault(value, len(known) + 1) for value, known in zip(row, numbers, strict=True)]
            for row in ids.tolist()
        ]
        found = encoder.encode(ids, learn=True)
        assert found.dtype == np.uint32
        assert found.tolist() == expected
    assert encoder.describe().dialect == "dictionary"
    assert encoder.describe().exact
    assert encoder.describe().cardinalities == tuple(len(known) + 1 for known in numbers)

    (unseen,) = blocks(rng, [300], [3, 9, 900, 2**32])
    expected = [[known.get(v, 0) for v, known in zip(row, numbers, strict=True)] for row in unseen.tolist()]
    assert encoder.encode(unseen).tolist() == expected
    assert encoder.describe().cardinalities == tuple(len(known) + 1 for known in numbers), "must not learn"
    assert [v.values().tolist() for v in encoder.vocabularies] == [list(known) for known in numbers]


def test_the_runs_of_a_vocabulary_stay_few(rng):
    vocabulary = Vocabulary()
    for values in np.split(rng.permutation(2**16).astype(np.uint32), 512):
        vocabulary.add(values)
        sizes = [values.size for values, _ in vocabulary.runs]
        assert all(a >= Vocabulary.RATIO * b for a, b in pairwise(sizes))
        assert sum(sizes) == vocabulary.size


def test_an_empty_dictionary_knows_nothing():
    assert Dictionary(2).encode(np.ones((3, 2), np.uint32)).tolist() == [[0, 0]] * 3


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
def test_hash_ids_pass_through_and_are_counted(rng, sizes):
    highest = [1, 60, 400, 10**5, 2**32]
    encoder, seen = HashIds(5, k=256), blocks(rng, sizes, highest)
    for ids in seen:
        assert encoder.encode(ids, learn=True) is ids
    distinct = [np.unique(column).size for column in np.concatenate(seen).T]
    described = encoder.describe()
    assert described.dialect == "hash"
    assert not described.exact
    assert described.cardinalities[:2] == tuple(distinct[:2])
    # Five standard errors.
    np.testing.assert_allclose(described.cardinalities, distinct, rtol=5 / 254**0.5)


def test_the_count_is_exact_below_k():
    for distinct, exact in ((255, True), (256, False)):
        encoder = HashIds(1, k=256)
        encoder.encode(np.arange(distinct, dtype=np.uint32)[:, None], learn=False)
        assert encoder.describe().exact is exact
    assert HashIds(1).k == 4096


def test_the_error_of_the_count_is_as_announced(rng):
    """1 / sqrt(k - 2) is 1.6%; over 60 features the root mean square must come within a third of it."""
    encoder = HashIds(60)
    for ids in np.split(rng.integers(0, 2**32, (100_000, 60), dtype=np.uint32), 10):
        encoder.encode(ids, learn=True)
    errors = np.array(encoder.describe().cardinalities) / 100_000 - 1
    assert 0.010 < np.sqrt(np.mean(errors**2)) < 0.021
    assert abs(errors.mean()) < 0.008


def test_the_count_does_not_depend_on_the_blocks(rng):
    (ids,) = blocks(rng, [9000], [300, 10**6])
    results = []
    for parts in (1, 9, 900):
        encoder = HashIds(2, k=512)
        for part in np.split(ids, parts):
            encoder.encode(part, learn=True)
        results.append(encoder.describe())
    assert results[0] == results[1] == results[2]
