"""Rows without a click that are dropped by chance: which these are, and what becomes of predictions."""

import dataclasses
import json
from functools import partial

import numpy as np
import polars as pl
import pytest
from test_model import batch, settings

import robe
from data_pipeline import parse_days
from data_pipeline.batches import Rows
from data_pipeline.folders import verify
from data_pipeline.logs import read_log
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.schema import DataError, load_schema
from robe import checkpoint, run_folder
from robe.backend import select
from robe.cli import main
from robe.errors import RobeError
from robe.metrics import probability
from robe.model import build

TINY = "--weights 800 --block 4 --bottom 4 --width 4 --top 4 --lr 0.02 --epochs 3 --batch 64".split()
TOML = 'label = "click"\nweight = "worth"\ndense = ["number"]\n[transform]\nnumber = "none"\n'
TOML += '[categorical]\nuser = "integer"\ntags = "string"\n[bags]\ntags = {}\n'
KEPT, SEED, ROWS, DAYS = 0.25, 3, 400, 4


@pytest.fixture
def log(tmp_path):
    """A table whose numbers are those of its rows, with bags and weights."""
    rng = np.random.default_rng(0)
    tags = ["|".join(rng.choice(list("abcd"), n, replace=False)) for n in rng.integers(0, 4, ROWS)]
    columns = {"click": (rng.random(ROWS) < 0.2) * 1, "worth": rng.integers(1, 4, ROWS)}
    columns |= {"number": np.arange(ROWS), "user": rng.integers(9, size=ROWS), "tags": tags}
    pl.DataFrame(columns).write_csv(tmp_path / "log.csv")
    (tmp_path / "log.toml").write_text(TOML)
    return pl.DataFrame(columns)


def prepared(folder, name="data", **options):
    told = {"blocks": DAYS, "keep_negatives": KEPT, "seed": SEED, "dense": "none"} | options
    schema = load_schema(folder / "log.toml")
    return prepare(PrepareConfig((folder / "log.csv",), folder / name, schema=schema, **told))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stays(day, line):
    """Whether a row without a click does, by a stream of its own."""
    stream = np.random.PCG64(np.random.SeedSequence(SEED, spawn_key=(day,)))
    return int(stream.advance(line).random_raw()) < KEPT * 2**64


def test_clicks_and_rows_by_seed_day_and_line_are_kept(log, tmp_path):
    manifest = prepared(tmp_path)
    verify(tmp_path / "data")
    size = ROWS // DAYS
    click = log["click"].to_list()
    expected = [row for row in range(ROWS) if row >= 300 or click[row] or stays(row // size, row + 1)]
    found = list(Rows(manifest, None).batches(70))
    numbers = np.concatenate([rows.dense[:, 0] for rows in found]).astype(int)
    assert numbers.tolist() == expected
    kept = log[numbers]
    np.testing.assert_array_equal(np.concatenate([rows.label for rows in found]), kept["click"])
    np.testing.assert_array_equal(np.concatenate([rows.weight for rows in found]), kept["worth"])
    lengths = np.concatenate([rows.ids.lengths(2)[:, 1] for rows in found])
    assert lengths.tolist() == [len(set(tags.split("|")) - {""}) for tags in kept["tags"]]
    dropped = [day.dropped for day in manifest.days]
    assert dropped == [*(size - sum(row // size == day for row in expected) for day in range(3)), 0]
    assert manifest.split["train"] == tuple((day, 0, size - dropped[day]) for day in range(3))
    assert (manifest.rows("test"), manifest.rows("validation")) == (50, 50)
    negatives = 300 - sum(click[:300])
    assert sum(dropped) == pytest.approx(0.75 * negatives, abs=4 * (negatives * 3 / 16) ** 0.5)
    told = f"of the rows without a click that train, 0.25 are kept ({sum(dropped)} dropped)"
    assert manifest.describe().endswith(told)


def test_the_bytes_are_the_same_however_the_work_is_cut(log, tmp_path, monkeypatch):
    prepared(tmp_path, "whole")
    assert prepared(tmp_path, "shared", days="2") is None
    assert prepared(tmp_path, "shared", days="0-1") is None
    monkeypatch.setattr(parse_days, "read_log", partial(read_log, block_bytes=100))
    prepared(tmp_path, "shared")
    prepared(tmp_path, "again")
    assert contents(tmp_path / "shared") == contents(tmp_path / "again") == contents(tmp_path / "whole")
    prepared(tmp_path, "other", seed=4)
    assert contents(tmp_path / "other")["day_0_dense.npy"] != contents(tmp_path / "whole")["day_0_dense.npy"]


def test_all_rows_are_kept_as_ever_and_a_bad_one_changes_no_other(log, tmp_path):
    prepared(tmp_path, "all", keep_negatives=1.0, seed=0)
    told = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert "keep_negatives" not in told
    assert told["days"][0].keys() == {"rows", "sha256", "source", "rejected"}
    whole = prepared(tmp_path)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    lines[51] = lines[51].replace(",", ",x", 1)
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    skipped = prepared(tmp_path, "skipped", bad_rows="skip")
    (day, *others), (_, *same) = skipped.days, whole.days
    assert [day.sha256 for day in others] == [day.sha256 for day in same]
    assert (day.rows + day.dropped, day.rejected) == (99, 1)
    numbers = [np.load(tmp_path / name / "day_0_dense.npy")[:, 0].tolist() for name in ("data", "skipped")]
    assert [number for number in numbers[0] if number != 50] == numbers[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split": "0.8,0.1,0.1"},
            "--keep-negatives: has to know which days train .* --split 0.8,0.1,0.1 tells",
        ),
        ({"keep_negatives": 0.0}, "--keep-negatives 0.0: must be above 0, and at most 1"),
        ({"keep_negatives": float("nan")}, "--keep-negatives nan: must be above 0"),
        ({"keep_negatives": 1.0}, "--seed 3: must be at least 0, and is of --keep-negatives"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, message, log, tmp_path):
    with pytest.raises(DataError, match=message) as refused:
        prepared(tmp_path, **options)
    assert "\n" not in str(refused.value)


def test_days_that_were_thinned_are_not_gone_on_with_as_others(log, tmp_path):
    prepared(tmp_path, days="0")
    all_rows = {"keep_negatives": 1.0, "seed": 0}
    for options in ({"keep_negatives": 0.5}, {"split": "test=0,validation=1"}, {"seed": 1}, all_rows):
        with pytest.raises(
            DataError, match=r"\.data\.partial: was begun with .* go on with the same settings"
        ):
            prepared(tmp_path, **options)
    assert prepared(tmp_path).days[0].dropped > 0


def test_the_correction_is_that_of_he_and_others():
    """p / (p + (1 - p) / rate); float32 logits tell probabilities to 1e-6."""
    config, data = settings()
    thinned = dataclasses.replace(data, kept_negatives=0.125)
    _, dense, ids = batch("float32")
    plain, corrected = (build(config, one, select("cpu")) for one in (data, thinned))
    p = probability(plain.predict(dense, ids).copy())
    expected = p / (p + (1 - p) / 0.125)
    np.testing.assert_allclose(probability(corrected.predict(dense, ids)), expected, rtol=1e-6)
    # What is trained is not corrected: its rows are those that were kept.
    np.testing.assert_array_equal(plain.forward(dense, ids).copy(), corrected.forward(dense, ids))
    for kept in (0, -1, 1.5, float("nan")):
        with pytest.raises(RobeError, match="rows are kept with a probability up to 1"):
            dataclasses.replace(data, kept_negatives=kept)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A table of 24,000 rows, a tenth of them clicks, of which the model sees an eighth of the others."""
    folder, rows = tmp_path_factory.mktemp("thinned"), 24_000
    rng = np.random.default_rng(0)
    user = rng.integers(20, size=rows)
    click = (rng.random(rows) < 0.02 + 0.16 * (user / 19)) * 1
    pl.DataFrame({"click": click, "user": user}).write_csv(folder / "log.csv")
    (folder / "log.toml").write_text('label = "click"\n[categorical]\nuser = "integer"\n')
    prepared(folder, keep_negatives=0.125)
    main(["train", "--data", str(folder / "data"), "--out", str(folder / "run"), *TINY])
    return folder, click


def test_a_model_of_thinned_rows_is_calibrated(run, tmp_path):
    """3,000 test rows of 300 clicks tell the rate to 6%, 1,800 clicks and 2,000 others of training to 3%."""
    folder, click = run
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["test"]["base_rate"] == pytest.approx(0.1, abs=0.02)
    for split in ("test", "validation"):
        assert summary[split]["calibration"] == pytest.approx(1, abs=0.2)
    main(["predict", str(folder / "run"), str(folder / "log.csv"), "--out", str(tmp_path / "p")])
    found = np.loadtxt(tmp_path / "p")
    assert found.mean() / click.mean() == pytest.approx(1, abs=0.15)
    # Uncorrected it would be far off: of the rows that were kept about half are clicks.
    uncorrected = found / (found + (1 - found) * 0.125)
    assert uncorrected.mean() / click.mean() > 4
    model = robe.load(folder / "run", "cpu")
    np.testing.assert_allclose(model.predict_table(pl.read_csv(folder / "log.csv")), found, rtol=1e-6)
    # The training loss is of the rows that were kept, where to know nothing costs 0.69.
    assert 0.5 < summary["training_loss"] < 0.7
    assert summary["test"]["log_loss"] < 0.4


def test_the_rate_lives_in_the_run(run, tmp_path):
    folder, _ = run
    state = json.loads((checkpoint.latest(folder / "run") / "state.json").read_text())
    assert state["data"]["kept_negatives"] == 0.125
    main(["convert", str(folder / "run"), "--to", "fp16", "--out", str(tmp_path / "fp16")])
    table = pl.read_csv(folder / "log.csv").head(100)
    one, other = (robe.load(path, "cpu").predict_table(table) for path in (folder / "run", tmp_path / "fp16"))
    np.testing.assert_allclose(one, other, rtol=1e-2)  # 11 bits of each weight
    told = json.loads((tmp_path / "fp16" / "data" / "manifest.json").read_text())
    assert told["keep_negatives"] == 0.125
    for value in (0, 1.5, "x", None):
        (tmp_path / "fp16" / "data" / "manifest.json").write_text(
            json.dumps(told | {"keep_negatives": value})
        )
        with pytest.raises(DataError, match=r"manifest\.json: not a valid manifest"):
            Manifest.load(tmp_path / "fp16" / "data")


def test_a_teacher_tells_students_what_is_so_among_the_rows_kept(run):
    folder, _ = run
    manifest = Manifest.load(folder / "data")
    model = robe.load(folder / "run", "cpu").model
    _, rows = run_folder.taught(folder / "run", manifest, "cpu")
    taught = next(rows.batches(200))
    # What the model was trained to say of these rows; the file holds float32.
    uncorrected = probability(model.forward(taught.dense, taught.ids))
    np.testing.assert_allclose(taught.probability, uncorrected, rtol=1e-5)
