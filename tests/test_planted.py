"""Rows of a planted law: the same in every version, and as the law says; and what is fitted to real rows."""

from unittest import mock

import numpy as np
import pytest
from conftest import VERSIONS
from test_inspection import needs_compiler

from analysis import fitted_law, planted
from analysis.planted import HELD_OUT, SPREAD, Drawn, LawConfig, law_of
from data_pipeline.synthetic import sigmoid
from robe.backend import select, simulator
from robe.kernels.workbench import inspection

WHOLE = LawConfig(tuple(0.7 + 0.05 * f for f in range(26)), decay=0.2, base_rate=0.2)
ROWS = 24 if simulator() else 3000


@pytest.fixture(scope="module")
def law():
    """That of the published cardinalities."""
    return law_of(WHOLE)


def first_rows(law, backend="reference", count=ROWS, batch=None, **options):
    """Label, dense, ids and logits of the first rows, each in one array."""
    drawn = Drawn(law, select(backend), count, **options).drawn(batch or count)
    batches = [[array.copy() for array in batch] for batch in drawn]
    return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


@pytest.mark.kernels
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("first", [0, HELD_OUT + 12345])
def test_every_version_draws_the_same_rows(version, first, law):
    """Ids and counts exactly. Logits are sums of 45 numbers up to 6, in float32: some 1e-6 each."""
    label, dense, ids, logits = first_rows(law, first=first)
    found = first_rows(law, version, first=first)
    np.testing.assert_array_equal(found[1], dense)
    np.testing.assert_array_equal(found[2], ids)
    np.testing.assert_allclose(found[3], logits, rtol=0, atol=3e-5)
    np.testing.assert_array_equal(found[0], label)


def test_rows_do_not_depend_on_how_they_are_asked_for(law):
    label, dense, ids, logits = first_rows(law, count=100)
    for other, expected in zip(
        first_rows(law, count=100, batch=32), (label, dense, ids, logits), strict=True
    ):
        np.testing.assert_array_equal(other, expected)
    late = next(Drawn(law, select("reference"), 100).batches(32, seed=5, start_step=3))
    for other, expected in zip(late, (label, dense, ids), strict=True):
        np.testing.assert_array_equal(other, expected[96:])
    assert len(np.unique(ids[:, 0])) > 30
    assert (first_rows(law, count=100, first=100)[2] != ids).any(axis=1).all()


def test_a_row_by_the_formulas(law):
    """In Python's own integers and floats: no table but those of bins and counts."""
    *_, ids, logits = first_rows(law, count=3, first=7)

    def mixed(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden, number = 0x9E3779B97F4A7C15, 64 * (7 + 2)
    key = mixed(WHOLE.seed + golden)
    words = [mixed((key + (number + c) * golden) % 2**64) for c in range(40)]
    counts = [float(law.levels[i, words[1 + i] >> 54]) for i in range(13)]
    vectors = []
    for f, n in enumerate(WHOLE.cardinalities):
        edges, below = planted.bins_of(n, WHOLE.exponents[f])
        word = words[14 + f]
        j = max(k for k in range(len(edges) - 1) if int(below[k] * 2**63) <= word >> 1)
        rank = int(edges[j]) + (mixed(word) * int(edges[j + 1] - edges[j]) >> 64)
        assert ids[2, f] == (rank - 1) * int(SPREAD) % n
        bits = mixed((int(law.keys[f]) + rank * golden) % 2**64)
        numbers = [((bits >> 16 * k) % 2**16 - 2**15) / 2**15 for k in range(4)]
        vectors.append([x * float(edges[j]) ** -WHOLE.decay for x in numbers] - law.centre[f])
    bias, of_effects, of_pairs, *of_counts = map(float, law.weights)
    paired = range(0, 26, 4)
    logit = bias + sum(w * c for w, c in zip(of_counts, counts, strict=True))
    logit += of_effects * sum(v[0] for v in vectors)
    logit += of_pairs * sum(float(vectors[f][1:] @ vectors[g][1:]) for f in paired for g in paired if f < g)
    assert logits[2] == pytest.approx(logit, abs=1e-5)  # strengths and the centre are float32


def test_ids_follow_zipfs_law_and_labels_the_logits(law):
    label, _, ids, logits = first_rows(law, count=40_000)
    for f in (0, 2, 7, 13):
        n, exponent = WHOLE.cardinalities[f], WHOLE.exponents[f]
        power = 1 - exponent
        for rank in (1, 2, 3, 10):
            chance = ((rank + 0.5) ** power - (rank - 0.5) ** power) / ((n + 0.5) ** power - 0.5**power)
            hits = (ids[:, f] == (rank - 1) * int(SPREAD) % n).sum()
            assert abs(hits - 40_000 * chance) < 5 * np.sqrt(40_000 * chance), (f, rank)
    assert (ids < np.array(WHOLE.cardinalities)).all()
    assert label.mean() == pytest.approx(WHOLE.base_rate, abs=0.012)  # the bias is a sample's, too
    for part in (logits < np.quantile(logits, 0.3), logits > np.quantile(logits, 0.9)):
        p = sigmoid(logits[part])
        assert abs(label[part].sum() - p.sum()) < 5 * np.sqrt((p * (1 - p)).sum())


def test_truth_is_that_of_the_probabilities(law):
    label, _, _, logits = first_rows(law, count=5000)
    found = Drawn(law, select("reference"), 5000).truth()
    wins = (logits[label > 0][:, None] > logits[label == 0]).mean()
    assert found["best_auc"] == pytest.approx(wins, abs=1e-6)
    assert found["best_log_loss"] == pytest.approx(
        np.logaddexp(0, logits - 2 * label * logits).mean(), abs=1e-6
    )
    assert 0.5 < found["counts_auc"] < found["best_auc"] - 0.1
    assert found["click_rate"] == label.mean()


@needs_compiler
def test_the_cuda_kernel_is_lean(law):
    """As the kernels of models are: few registers, no double precision, no division and no calls."""
    launched = []
    arrays = np.empty(256, np.float32), np.empty((256, 13), np.float32)
    rows = (*arrays, np.empty((256, 26), np.uint32), arrays[0])
    with mock.patch("robe.kernels.parts.launch.start", lambda *arguments: launched.append(arguments)):
        planted.draw_cuda(0, law, *rows)
    ((kernel, shape, arguments),) = launched
    started = inspection.Started(kernel, tuple(map(inspection.typeof, arguments)), shape[1][0], 0)
    used = inspection.resources(started, "9.0")
    assert used.spilled == 0
    assert 0 < used.registers <= 64
    text = inspection.ptx(started, "9.0")
    for unwanted in (".f64", "div.u64", "rem.u64", "div.s64", "rem.s64", "call", ".local"):
        assert unwanted not in text


# What is fitted


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_a_fit_finds_what_was_planted(decay):
    exponents = tuple(0.9 + 0.02 * f for f in range(26))
    config = LawConfig(exponents, decay, base_rate=0.3, scale=1e-3, dense=0.01)
    label, _, ids, _ = first_rows(law_of(config), count=30_000)
    found = fitted_law.fit(ids, label, config.cardinalities)
    # Features with few ids, all of which come, tell their exponents less well.
    large = np.array(config.cardinalities) >= 500
    assert np.abs(np.array(found.exponents) - exponents)[large].max() < 0.05
    low, high = found.decay_interval
    assert low <= found.decay <= high
    assert abs(found.decay - decay) < 0.2  # so few rows tell no more
    assert found.base_rate == label.mean()


def test_distinct_ids_of_a_part_of_the_rows():
    """Against all ways to take two rows of five."""
    assert fitted_law.distinct(np.array([3, 1, 1]), 2) == pytest.approx((3 * 1 + 7 * 2) / 10)
    assert fitted_law.distinct(np.array([3, 1, 1]), 5) == pytest.approx(3)
    assert fitted_law.distinct_of_law(1000, 0.0, 1) == pytest.approx(1)
    assert fitted_law.distinct_of_law(50, 0.0, 100_000) == pytest.approx(50)
