"""Weights of rows: from a column of a table through shards and batches to gradients and metrics."""

import json
import shutil

import numpy as np
import pytest
from test_model import batch, make
from test_train import DATA, MemoryRows, config, fed_backend, weights_of

import robe
from data_pipeline.batches import Rows
from data_pipeline.folders import verify
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.schema import DataError, Schema, load_schema
from robe import checkpoint, metrics
from robe.backend import select
from robe.cli import main
from robe.errors import ArrayError
from robe.model import build
from robe.train import train

TINY = "--weights 400 --block 4 --batch 16 --bottom 4 --width 4 --top 4 --backend cpu".split()
TOML = 'label = "click"\nweight = "worth"\ndense = ["number"]\n[categorical]\nuser = "integer"\n'
ROW = np.arange(50)[:, None]  # of a day
WORTH = ["1", "0", "2.5", "1e-3", "7"]  # of rows, over and over


def table(folder, rows=150, bad=None):
    """A table of three days to be, the file of its schema, and the weights; `bad` is that of row 8."""
    rng = np.random.default_rng(0)
    worth = [WORTH[row % len(WORTH)] if (row, bad is None) != (7, False) else bad for row in range(rows)]
    users = rng.integers(9, size=rows)
    lines = [
        f"{int(user < 4)},{w},{row % 6},{user}"
        for row, (w, user) in enumerate(zip(worth, users, strict=True))
    ]
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text("\n".join(["click,worth,number,user", *lines]) + "\n")
    (folder / "log.toml").write_text(TOML)
    return worth


def prepared(folder, **options):
    inputs, schema = (folder / "log.csv",), load_schema(folder / "log.toml")
    return prepare(PrepareConfig(inputs, folder / "data", schema=schema, blocks=3, **options))


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    """A prepared folder, a run of it, and the weights of its rows."""
    folder = tmp_path_factory.mktemp("weighted")
    worth = np.array(table(folder), np.float32)
    prepared(folder)
    main([*"train --data".split(), str(folder / "data"), "--out", str(folder / "run"), *TINY])
    return folder, worth


def test_shards_hold_the_weights_and_batches_bring_them(weighted):
    folder, worth = weighted
    manifest = verify(folder / "data")
    assert manifest.schema.weight == "worth"
    shards = [np.load(folder / "data" / f"day_{day}_row_weights.npy") for day in range(3)]
    assert [(shard.shape, shard.dtype) for shard in shards] == [((50, 1), np.float32)] * 3
    np.testing.assert_array_equal(np.concatenate(shards)[:, 0], worth)
    for order in ({}, {"seed": 1}):
        for label, weight, dense, ids in Rows(manifest, "train").batches(7, **order):
            assert (label == (ids[:, 0] < 4)).all()
            # The table repeats after 5 rows in its weights, and after 6 in its numbers: 30 tell the row.
            number = np.rint(np.expm1(dense[:, 0])).astype(int)
            assert {(n, w) for n, w in zip(number, weight.tolist(), strict=True)} <= {
                (row % 6, float(worth[row % 5])) for row in range(30)
            }
        assert weight.dtype == np.float32
    in_order = np.concatenate([found.weight for found in Rows(manifest, None).batches(16)])
    np.testing.assert_array_equal(in_order, worth)


def test_a_schema_without_weights_leaves_no_trace(tmp_path):
    """The manifest is, key for key, what it was before there were any; so fingerprints are, too."""
    table(tmp_path)
    (tmp_path / "log.toml").write_text(TOML.replace('weight = "worth"\n', ""))
    manifest = prepared(tmp_path)
    told = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert "weight" not in told["schema"]
    assert {*told["days"][0]["sha256"]} == {"labels", "dense", "sparse"}
    assert next(Rows(manifest, "train").batches(4))._fields == ("label", "dense", "ids")


@pytest.mark.parametrize("bad", ["", "-1", "nan", "inf", "1e38", "heavy"])
def test_a_bad_weight_is_a_bad_cell(bad, tmp_path):
    table(tmp_path, bad=bad)
    words = rf"log.csv, row 8 \(line 9\): worth is '{bad}', not a weight from 0 to below 1e\+38; correct it"
    with pytest.raises(DataError, match=words):
        prepared(tmp_path)
    manifest = prepared(tmp_path, bad_rows="skip")
    assert [(day.rows, day.rejected) for day in manifest.days] == [(49, 1), (50, 0), (50, 0)]
    assert np.load(tmp_path / "data" / "day_0_row_weights.npy")[6:8, 0].tolist() == [0, np.float32("1e-3")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            'weight = "user"\n',
            "column user must be named once, as label, weight, split, dense or categorical",
        ),
        ("weight = 3\n", "weight must be a text"),
    ],
)
def test_what_a_schema_says_of_weights(lines, message, tmp_path):
    (tmp_path / "s.toml").write_text(lines + TOML.replace('weight = "worth"\n', ""))
    with pytest.raises(DataError, match=message):
        load_schema(tmp_path / "s.toml")


def test_a_raw_log_has_no_weights_and_a_table_needs_its_column(tmp_path):
    table(tmp_path)
    (tmp_path / "log.csv").write_text("click,number,user\n1,2,3\n")
    with pytest.raises(DataError, match=r"log.csv: has no column 'worth'"):
        prepared(tmp_path)
    (tmp_path / "raw").write_text("1\t2\t3\n")
    schema = Schema("own", "click", ("number",), ("user",), weight="worth")
    with pytest.raises(
        DataError, match="integers and hex digits alone, but schema own sets weight; give a table"
    ):
        prepare(PrepareConfig((tmp_path / "raw",), tmp_path / "data", schema=schema))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: np.where(ROW == 3, -1, w), "row 3 .*column worth: -1.0 is not finite and at least 0"),
        (lambda w: np.where(ROW == 3, np.nan, w), "row 3 .*: nan is not finite and at least 0"),
        (lambda w: w[:49], r"holds float32 \(49, 1\), manifest.json says float32 \(50, 1\)"),
        (lambda w: w.astype(float), r"holds float64 \(50, 1\), manifest.json says float32"),
        (lambda w: 0 * w, "column worth gives all 100 rows of a split the weight 0"),
    ],
)  # fmt: skip
def test_forged_weights_are_refused_before_training(change, message, weighted, tmp_path):
    shutil.copytree(weighted[0] / "data", tmp_path / "data")
    for day in (0,) if "all" not in message else (0, 1):
        path = tmp_path / "data" / f"day_{day}_row_weights.npy"
        np.save(path, change(np.load(path)).astype(change(np.load(path)).dtype))
    manifest = Manifest.load(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        Rows(manifest, "train").require_weight()
    with pytest.raises(DataError, match=r"row_weights\.npy: "):
        verify(tmp_path / "data")


COUNTS = np.array([0, 1, 2, 1, 1, 1])  # add up to the number of rows, so that both means divide by it


@pytest.mark.parametrize("more", ["nothing", "mse", "teacher"])
def test_a_weight_of_n_is_that_row_n_times(more):
    """In float64, where only the order of additions differs: 1e-12 of numbers near 1."""
    label, dense, ids = batch()
    repeated = np.repeat(np.arange(6), COUNTS)
    target = np.linspace(0.1, 0.9, 6) if more == "teacher" else None
    one, other = (make("reference") for _ in range(2))
    one.squares = other.squares = more == "mse"
    of_rows = one.step(label, dense, ids, 0.1, target=target, weight=COUNTS.astype(float)).copy()
    target = np.linspace(0.1, 0.9, 6)[repeated] if more == "teacher" else None
    losses = other.step(label[repeated], dense[repeated], ids[repeated], 0.1, target=target)
    assert of_rows[0] == 0
    assert of_rows.sum() == pytest.approx(losses.sum(), rel=1e-12)
    for name, array in other.state().items():
        np.testing.assert_allclose(one.state()[name], array, rtol=1e-12, atol=1e-12, err_msg=name)
    unweighted = make("reference")
    unweighted.step(label, dense, ids, 0.1)
    assert not np.allclose(unweighted.parameters["top.0.weight"], one.parameters["top.0.weight"], atol=1e-6)


class WeightedRows(MemoryRows):
    """Rows of weight 0 and 2, by their number; those of a teacher too, which says 0.3 of each."""

    teaches = False

    def batches(self, batch_size, **order):
        self.weight = np.float32(2) * (np.arange(self.count) % 3 > 0)
        self.dense[:, 2] = self.weight  # by which a batch finds those of its rows
        for label, dense, ids in super().batches(batch_size, **order):
            taught = [np.full_like(label, 0.3)] if self.teaches else []
            yield label, dense[:, 2].copy(), *taught, dense, ids


@pytest.mark.parametrize("teacher", [None, "digest"])
def test_the_loop_hands_weights_to_steps_and_metrics(teacher, tmp_path):
    data = {name: WeightedRows(n, n) for name, n in (("train", 100), ("validation", 40), ("test", 50))}
    data["train"].teaches = teacher is not None
    settings = config(epochs=1, teacher=teacher, teacher_weight=0.5 if teacher else 0.9)
    found, model = {}, build(settings, DATA, select("cpu"))
    for name, backend in (("cpu", select("cpu")), ("fed", fed_backend())):
        one = build(settings, DATA, backend)
        found[name] = train(one, settings, DATA, data, tmp_path / name, weighted=True)
    assert weights_of(tmp_path / "cpu") == weights_of(tmp_path / "fed")
    for label, weight, *taught, dense, ids in data["train"].batches(32, seed=0):
        target = {"target": label + np.float32(0.5) * (taught[0] - label)} if teacher else {}
        model.step(label, dense, ids, settings.optimizer.lr, weight=weight, **target)
    trained = checkpoint.load_model(tmp_path / "cpu", "cpu")[0]
    for name, array in model.state().items():
        np.testing.assert_array_equal(trained.state()[name], array, err_msg=name)
    logits, test = model.predict(data["test"].dense, data["test"].ids).copy(), data["test"]
    assert found["cpu"]["test"] == metrics.summary(test.label, logits, test.weight) == found["fed"]["test"]


def test_a_run_is_evaluated_by_weights_and_predicts_without_them(weighted, tmp_path, capsys):
    folder, worth = weighted
    main(["evaluate", str(folder / "run"), "--split", "all", "--group-by", "user", "--backend", "cpu"])
    found = json.loads(capsys.readouterr().out)
    (tmp_path / "log.csv").write_text((folder / "log.csv").read_text().replace("worth", "other"))
    main(["predict", str(folder / "run"), str(tmp_path / "log.csv"), "--out", str(tmp_path / "p")])
    probability = np.loadtxt(tmp_path / "p")
    label = np.concatenate([found.label for found in Rows(Manifest.load(folder / "data"), None).batches(99)])
    of_what_came = np.where(label, probability, 1 - probability)
    # Probabilities are written with 9 digits, of float32 logits.
    assert found["log_loss"] == pytest.approx(np.average(-np.log(of_what_came), weights=worth), rel=1e-6)
    assert found["base_rate"] == pytest.approx(np.average(label, weights=worth), rel=1e-6)
    rate = np.average(probability, weights=worth)
    assert found["calibration"] == pytest.approx(rate / found["base_rate"], rel=1e-6)
    assert (found["rows"], found["grouped"]["groups"]) == (150, 0)  # a user clicks always or never


def test_arrays_of_ones_own_may_have_weights():
    sizes = {"width": 4, "bottom": (6,), "top": (5,), "weights": 40, "block": 4, "batch": 6, "lr": 0.1}
    label, dense, ids = batch("float32")
    chosen = np.repeat(np.arange(6), COUNTS)
    models = [robe.DLRM((7, 3, 11), 3, optimizer="sgd", backend="cpu", **sizes) for _ in range(2)]
    models[0].fit([(label, COUNTS, dense, ids)] * 5)
    models[1].fit([(label[chosen], dense[chosen], ids[chosen])] * 5)
    # Sums of six float32 products in another order.
    assert models[0].losses == pytest.approx(models[1].losses, rel=1e-5)
    np.testing.assert_allclose(models[0].predict(dense, ids), models[1].predict(dense, ids), rtol=1e-5)
    for weight, message in (
        ([1, 1, 1, 1, 1, -1], "weight, row 5: is -1, but must be finite and at least 0"),
        ([np.nan] * 6, "weight, row 0: is nan, but must be finite and at least 0"),
        ([1e39] * 6, "weight, row 0: is .*, but must be finite"),
        ([1] * 5, r"weight: has shape \(5,\), but must have \(6,\)"),
    ):
        with pytest.raises(ArrayError, match=message):
            models[0].fit([(label, weight, dense, ids)])
    with pytest.raises(ArrayError, match=r"a batch must be .label, dense, ids., and fit takes"):
        models[0].fit([(label, dense, ids), (label, COUNTS, dense, ids)])
