"""What `doctor` says: fine data are not refused, and spoilt ones are not called fine; and of a GPU."""

import dataclasses
import math

import numpy as np
import pytest

from robe import doctor, metrics
from robe.backend import select
from robe.config import DataSpec
from robe.doctor import attainable, data_set

ROWS = 64
rng = np.random.default_rng(0)
NOISE = rng.random(ROWS) < 0.35
AGES = np.arange(ROWS) % 5
NONE = np.empty((ROWS, 0))
DISTINCT = rng.integers(0, 2**32, (ROWS, 5))
NUMBERS = rng.random((ROWS, 3))


def checks(label, dense, ids, names=None):
    """The checks of a data set of these rows, by name."""
    label, dense = np.asarray(label, np.float32), np.ascontiguousarray(dense, np.float32)
    ids = np.ascontiguousarray(ids, np.uint32)
    data = DataSpec(dense.shape[1], (1000,) * ids.shape[1], "hash", "", "made up")
    names = names or ([f"number {i}" for i in range(data.dense)], [f"id {i}" for i in range(ids.shape[1])])
    rates = dict.fromkeys(("train", "test", "validation"), float(label.mean()))
    return {check.name: check for check in data_set(label, dense, ids, data, *names, rates)}


def overfitted(label, dense, ids):
    return checks(label, dense, ids)["overfits one batch of it"]


@pytest.mark.parametrize(
    ("label", "dense", "ids"),
    [
        (NOISE, NUMBERS, DISTINCT),
        (NOISE, NONE, AGES[:, None]),
        (NOISE, AGES[:, None] % 3, AGES[:, None]),
        (NOISE, np.ones((ROWS, 2)), np.ones((ROWS, 2))),
        (NOISE, NUMBERS[:, :1], AGES[:, None] % 2),
        (NOISE, np.log1p(rng.integers(0, 200, (ROWS, 1))), np.zeros((ROWS, 1))),
        (NOISE[:3], NUMBERS[:3], AGES[:3, None]),
        ([0, 1], NUMBERS[[0, 0]], AGES[[0, 0], None]),
        (NOISE, 1.5e9 + 1e7 * NUMBERS, DISTINCT),
    ],
    ids="distinct coarse coarse-numbers all-equal one-number counts three-rows two-equal times".split(),
)
def test_rows_that_can_be_learned_or_that_none_could_learn(label, dense, ids):
    assert overfitted(label, dense, ids).ok


@pytest.mark.parametrize("scale", [1e6, 1e9, 1e15, 1e30])
@pytest.mark.parametrize("ids", [AGES[:, None], np.zeros((ROWS, 1))], ids=["five", "one"])
def test_a_fall_from_the_absurd_to_the_base_rate_is_no_success(scale, ids):
    check = overfitted(NOISE, scale * NUMBERS, ids)
    assert check.ok is False
    assert "number 0 up to " in check.text
    assert "log1p" in check.text


def test_the_same_fall_of_rows_that_are_all_equal():
    """No model does better here, but this one got there from a loss of millions."""
    assert overfitted(NOISE, np.full((ROWS, 1), 1e9), np.zeros((ROWS, 1))).ok is False


def test_gradients_that_do_not_reach_the_embedding_are_noticed(monkeypatch):
    monkeypatch.setattr(
        "robe.model.Interaction.backward", lambda self, d, ids, rate: self.first(len(ids)) * 0
    )
    check = overfitted(NOISE, NONE, AGES[:, None])
    assert check.ok is False
    assert "report this" in check.text


def test_the_least_loss_is_that_of_the_shares_among_equal_rows():
    label, dense = np.array([0, 1, 1, 1, 0], np.float32), np.array([[0], [-0.0], [0], [2], [2]], np.float32)
    ids = np.array([[7], [7], [7], [7], [8]], np.uint32)
    # Three rows are equal, and two of them are clicks; the others stand alone.
    expected = 3 / 5 * -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert attainable(label, dense, ids) == pytest.approx(expected, rel=1e-12)
    assert attainable(label, dense[:, :0], ids) == pytest.approx(4 / 5 * metrics.entropy(0.75), rel=1e-12)


def test_coarse_rows_are_remarked_upon():
    assert "as some rows differ in the label alone" in overfitted(NOISE, NONE, AGES[:, None]).text
    assert "label alone" not in overfitted(NOISE, NUMBERS, DISTINCT).text


def test_columns_are_told_by_name():
    dense, ids = NUMBERS.copy(), np.stack([AGES, 0 * AGES], axis=1)
    dense[:, 1] = 4
    found = checks(NOISE, dense, ids, (["price", "stock", "age"], ["city", "shop"]))
    assert found["dense values finite"].text == "yes; stock: one value only"
    assert found["ids spread"].text == "1 (shop) to 5 (city) distinct values in 64 rows; shop: one value only"
    assert found["ids spread"].ok


def test_a_single_column_of_one_value_is_no_use():
    check = checks(NOISE, NUMBERS, np.zeros((ROWS, 1)))["ids spread"]
    assert check.ok is False
    assert "--method none" in check.text


def test_labels_of_one_class():
    found = checks(np.ones(ROWS), NUMBERS, DISTINCT)
    assert found["clicks"].ok is False
    assert "all labels to train and test and validation are the same" in found["clicks"].text
    assert found["overfits one batch of it"].ok


def test_a_gpu_is_told_what_its_graphs_hold(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_kernels_agree", lambda: (True, ""))
    monkeypatch.setattr(doctor, "overfits", lambda *batch: (True, ""))
    monkeypatch.setattr(doctor, "cuda_trouble", lambda: None)
    for graph, expected in ((object, {"GPU", "CUDA graphs"}), (None, {"GPU"})):
        card = dataclasses.replace(select("cpu"), description="cuda (a card)", graph=graph)
        monkeypatch.setattr(doctor, "select", lambda name, card=card: card)
        told = {check.name: check.text for check in doctor.installation(tmp_path)}
        assert {"GPU", "CUDA graphs"} & told.keys() == expected
        assert told["GPU"] == "cuda (a card)"
        plain = "not of tensor_train, mixed_dimension, cafe, adaembed"
        assert told.get("CUDA graphs", plain).endswith(plain)
