"""Metrics against brute force."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robe import metrics


def auc_oracle(label, score):
    """Every pair of a click and a non-click."""
    pairs = [
        (p > n) + (p == n) / 2
        for p, y in zip(score, label, strict=True)
        if y
        for n, z in zip(score, label, strict=True)
        if not z
    ]
    return sum(pairs) / len(pairs)


@given(st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=2, max_size=60))
def test_auc_with_ties(rows):
    label, score = np.array([y for y, _ in rows], np.float32), np.array([s for _, s in rows], np.float32)
    if 0 < label.sum() < len(label):
        assert metrics.auc(label, score) == pytest.approx(auc_oracle(label, score), abs=1e-15)
    else:
        assert math.isnan(metrics.auc(label, score))


def test_auc_tells_close_scores_apart():
    """Neighbouring float32 numbers are no tie."""
    one = np.float32(1)
    assert metrics.auc(np.array([1, 0]), np.array([np.nextafter(one, np.float32(2)), one])) == 1
    assert metrics.auc(np.array([0, 1]), np.array([np.nextafter(one, np.float32(2)), one])) == 0


def test_auc_of_a_nan_is_nan():
    assert math.isnan(metrics.auc(np.array([1, 0, 0]), np.array([0.5, np.nan, 0.1])))


def test_auc_counts_more_pairs_than_float32_holds(rng):
    """3 * 10^9 pairs: the count must stay exact, and equal the rank-sum formula of SciPy."""
    from scipy.stats import rankdata

    label = rng.random(110_000) < 0.4
    score = (rng.standard_normal(label.size) + label).round(3).astype(np.float32)
    positives = int(label.sum())
    rank_sum = rankdata(score)[label].sum() - positives * (positives + 1) / 2
    assert metrics.auc(label, score) == pytest.approx(
        rank_sum / positives / (label.size - positives), abs=1e-14
    )


def test_log_loss_survives_extreme_logits_and_chunks(monkeypatch):
    logits = np.array([0, 2, -2, 200, -200, 200], np.float32)
    label = np.array([1, 1, 0, 1, 0, 0], np.uint8)
    expected = (math.log(2) + 2 * math.log1p(math.exp(-2)) + 200) / 6
    monkeypatch.setattr(metrics, "CHUNK", 4)
    assert metrics.log_loss(label, logits) == pytest.approx(expected, rel=1e-12)


def test_summary():
    label, logits = np.array([1, 0, 0, 0], np.uint8), np.log(np.array([1, 1, 1, 1], np.float32) / 3)
    result = metrics.summary(label, logits)
    assert result["base_rate"] == 0.25
    assert result["rows"] == 4
    assert result["auc"] == 0.5
    # Predicting the base rate for every row is what normalised entropy 1 means; logits are float32.
    assert result["normalised_entropy"] == pytest.approx(1, abs=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=60))
def test_grouped_auc_is_the_weighted_mean_of_those_of_the_groups(rows):
    label, score, group = (np.array(column) for column in zip(*rows, strict=True))
    found = metrics.grouped_auc(label, score.astype(np.float32), group.astype(np.uint32))
    sums, weights, groups = 0.0, 0, 0
    for number in set(group.tolist()):
        part = group == number
        if 0 < label[part].sum() < part.sum():
            sums += part.sum() * auc_oracle(label[part], score[part])
            weights, groups = weights + part.sum(), groups + 1
    assert (found["rows"], found["groups"]) == (weights, groups)
    assert found["groups_of_one_class"] == len(set(group.tolist())) - groups
    assert found["auc"] == (pytest.approx(sums / weights, abs=1e-14) if groups else None)


def test_grouped_auc_of_a_nan_is_none_and_of_one_group_the_auc(rng):
    label, score = rng.integers(0, 2, 500), rng.standard_normal(500).round(1).astype(np.float32)
    one = np.zeros(500, np.uint32)
    assert metrics.grouped_auc(label, score, one)["auc"] == pytest.approx(
        metrics.auc(label, score), abs=1e-15
    )
    score[3] = np.nan
    assert metrics.grouped_auc(label, score, one)["auc"] is None


def test_a_weight_of_n_counts_a_row_n_times(rng):
    """Whole weights, so that rows can be repeated; sums of other numbers differ by rounding alone."""
    label, group = (rng.random(400) < 0.3).astype(np.uint8), rng.integers(0, 40, 400)
    logits = rng.integers(-5, 6, 400).astype(np.float32) / 4  # eleven of them: parts of a curve are these
    weight = rng.integers(0, 4, 400).astype(np.float32)
    repeated = np.repeat(np.arange(400), weight.astype(int))
    found = metrics.summary(label, logits, weight)
    assert found.pop("rows") == 400
    expected = metrics.summary(label[repeated], logits[repeated])
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-12)
    assert found["auc"] != pytest.approx(metrics.auc(label, logits), abs=1e-3)
    grouped = metrics.grouped_auc(label, logits, group, weight)
    expected = metrics.grouped_auc(label[repeated], logits[repeated], group[repeated])
    assert grouped["auc"] == pytest.approx(expected["auc"], rel=1e-12)
    assert grouped["groups"] == expected["groups"] > 10
    parts, expected = (
        metrics.reliability(label, logits, weight),
        metrics.reliability(label[repeated], logits[repeated]),
    )
    assert len(parts) == len(expected) == 11
    for part, same in zip(parts, expected, strict=True):
        assert part["probability"] == pytest.approx(same["probability"], rel=1e-12)
        assert part["base_rate"] == pytest.approx(same["base_rate"], rel=1e-12)
    assert sum(part["rows"] for part in parts) == 400
    assert math.isnan(metrics.auc(label, logits, np.where(label, 0, weight)))


def test_reliability_tells_what_was_predicted_and_what_came(rng, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 1000)
    probability = rng.uniform(0.01, 0.6, 20_001)
    label = (rng.random(probability.size) < probability**2).astype(np.uint8)  # that the model tells too high
    logits = np.log(probability / (1 - probability)).astype(np.float32)
    parts = metrics.reliability(label, logits)
    assert [part["rows"] for part in parts] == pytest.approx([1000] * 20, abs=1)
    order = np.argsort(logits)
    start = 0
    for part in parts:
        rows = order[start : start + part["rows"]]
        assert part["probability"] == pytest.approx(probability[rows].mean(), rel=1e-6)
        assert part["base_rate"] == pytest.approx(label[rows].mean(), abs=1e-12)
        start += part["rows"]
    assert start == label.size
    summary = metrics.summary(label, logits)
    assert summary["calibration"] == pytest.approx(probability.mean() / label.mean(), rel=1e-6)
    assert 2 < summary["calibration"] < 3
    # Rows of one prediction are of one part; and what is not finite has no curve.
    (alike,) = metrics.reliability(np.array([0, 1, 1, 0]), np.zeros(4, np.float32))
    assert alike == {"probability": 0.5, "base_rate": 0.5, "rows": 4}
    assert metrics.reliability(label[:2], np.array([0, np.inf], np.float32)) == []


def test_one_class_alone_has_no_auc():
    """JSON has no NaN, so what is not defined is None."""
    result = metrics.summary(np.zeros(3, np.uint8), np.zeros(3, np.float32))
    assert result["auc"] is None
    assert result["normalised_entropy"] is None
    assert result["calibration"] is None
    assert result["log_loss"] == pytest.approx(math.log(2))


class TestTrouble:
    """What makes predictions useless; `summary` of labels and logits."""

    LABEL = np.array([1, 0, 0, 0] * 5)

    def of(self, logits, label=LABEL):
        return metrics.trouble(metrics.summary(np.asarray(label), np.asarray(logits, np.float32)))

    def test_useful_predictions_are_in_none(self):
        assert self.of(self.LABEL - 1.0) is None

    @pytest.mark.parametrize("logit", [0.0, -1.0, 90.0, -1e20])
    def test_one_probability(self, logit):
        assert "every row gets the probability" in self.of(np.full(20, logit))
        assert "every row gets the probability" in self.of(logit + 1e-4 * np.arange(20) / 20)

    def test_small_probabilities_that_differ_are_not_one(self):
        assert metrics.all_alike(1e-4, 1.5e-4) is False
        assert metrics.all_alike(1 - 1.5e-4, 1 - 1e-4) is False
        assert metrics.all_alike(1e-4, 1.00001e-4) is True
        assert metrics.all_alike(1 - 1e-12, 1) is True

    def test_no_better_than_the_base_rate(self):
        assert "no better than the 0.5623 of predicting the base rate 0.2500" in self.of(-self.LABEL - 1.0)

    @pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
    def test_logits_that_are_not_finite(self, odd):
        logits = self.LABEL - 1.0
        logits[[0, 1]] = odd
        assert self.of(logits) == "some predictions are not finite"
        json.dumps(metrics.summary(self.LABEL, logits.astype(np.float32)), allow_nan=False)

    def test_one_class_and_one_row_are_no_trouble(self):
        assert self.of([0, 1, 2], [0, 0, 0]) is None
        assert self.of([3], [1]) is None
        assert self.of([3, 3], [1, 1]) is not None

    def test_evaluations_of_older_runs(self):
        older = metrics.summary(self.LABEL, np.zeros(20, np.float32))
        del older["lowest_probability"], older["highest_probability"]
        assert "no better than" in metrics.trouble(older)
