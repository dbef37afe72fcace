"""docs/own_data.md, run as it stands there, and schemas of other numbers of columns on the way to a model."""

import csv
import json
import re

import numpy as np
import polars as pl
import pytest
from recipes import ROOT, blocks, shell

import robe
from data_pipeline.batches import Rows
from data_pipeline.manifest import Manifest
from robe import cli as command_line
from robe.metrics import auc

PAGE = "own_data.md"
FORMATS = ["own.csv", "own.parquet", "own.arrow", "own.jsonl"]
TINY = ["--bottom", "8", "--width", "4", "--top", "8", "--batch", "64", "--block", "4", "--compression", "1"]


def run(*arguments):
    command_line.main([str(argument) for argument in arguments])


def test_the_example_gets_from_a_csv_file_to_an_auc_and_to_python(tmp_path):
    """And docs/python.md, as it stands there, goes on with its run."""
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    ((name, text),) = blocks(PAGE, "file")
    (tmp_path / name).write_text(text)
    outputs = []
    for _, commands in blocks(PAGE, "run"):
        done = shell(commands, tmp_path)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    ((name, text),) = blocks(PAGE, "shown")
    assert (tmp_path / name).read_text() == text
    found = float(re.search(r"test AUC (0\.\d+)", outputs[1])[1])
    assert abs(found - 0.85) < 0.01  # about 0.85, says the page; 6,000 rows have a standard error of 0.005
    # The rows of the test split are the last of the table, and its predictions say the same.
    probabilities = np.loadtxt(tmp_path / "liked.txt")
    with open(tmp_path / "ratings.csv") as file:
        liked = np.array([float(row["rating"]) >= 4 for row in csv.DictReader(file)])
    assert len(probabilities) == len(liked) == 60_000
    assert auc(liked[-6000:], probabilities[-6000:]) == pytest.approx(found, abs=1e-4)

    parts = [code for _, code in blocks("python.md", "python")]
    assert len(parts) == (ROOT / "docs" / "python.md").read_text().count("```python")
    (tmp_path / "page.py").write_text("\n".join(parts))
    done = shell("python -W error page.py", tmp_path)
    assert done.returncode == 0, done.stderr
    # What the page says is printed.
    assert "(2, 16)" in (lines := done.stdout.splitlines())
    assert "ids, row 1, column 1: is 300, but must be from 0 to 299" in lines
    before, after = map(float, re.search(r"loss (\S+) -> (\S+)", done.stdout).groups())
    assert after < before - 0.1


def test_cells_of_several_ids_get_to_an_auc(tmp_path):
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    ((name, text),) = blocks(PAGE, "bags file")
    (tmp_path / name).write_text(text)
    ((_, commands),) = blocks(PAGE, "bags run")
    done = shell(commands, tmp_path)
    assert done.returncode == 0, done.stderr
    ((name, text),) = blocks(PAGE, "bags shown")
    assert (tmp_path / name).read_text() == text
    found = float(re.search(r"test AUC (0\.\d+)", done.stdout)[1])
    assert abs(found - 0.78) < 0.01  # about 0.78, says the page; 3,000 rows have a standard error of 0.009


def test_a_table_is_made_of_libffm(tmp_path, monkeypatch):
    ((_, program),) = blocks(PAGE, "libffm")
    (tmp_path / "train.ffm").write_text("0 2:57:1 3:91:1\n1 2:8:1\n")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    expected = {"label": ["0", "1"], "field_2": ["57", "8"], "field_3": ["91", None]}
    assert pl.read_parquet("train.parquet").to_dict(as_series=False) == expected


@pytest.fixture(scope="module", params=[0, 3])
def own(request, tmp_path_factory):
    """A table in four formats, with so many dense columns; its schema; and a model trained on it."""
    folder, dense, rows = tmp_path_factory.mktemp("own"), request.param, 6000
    rng = np.random.default_rng(0)
    group = rng.integers(4, size=rows)
    columns = {"group": np.array(list("abcd"))[group], "clicked": (rng.random(rows) < 0.05 + 0.3 * group) * 1}
    columns |= {f"number {i}": rng.normal(size=rows) for i in range(dense)}
    frame = pl.DataFrame(columns | {"noise": rng.integers(2**40, size=rows)})
    frame.write_csv(folder / "own.csv")
    frame.write_parquet(folder / "own.parquet")
    frame.write_ipc(folder / "own.arrow")
    frame.write_ndjson(folder / "own.jsonl")
    names = json.dumps([f"number {i}" for i in range(dense)])
    (folder / "own.toml").write_text(
        f'label = "clicked"\ndense = {names}\n[categorical]\nnoise = "integer"\ngroup = "string"\n'
    )
    for name in FORMATS:
        run("prepare", folder / name, "--schema", folder / "own.toml", "--out", folder / f"{name}.data")
    run("train", "--data", folder / "own.csv.data", "--out", folder / "run", "--lr", "0.1", *TINY)
    return folder, dense


def test_a_schema_of_other_columns_trains(own):
    folder, dense = own
    run("describe", folder / "own.csv.data", "--out", folder / "d.png")
    manifest = Manifest.load(folder / "own.csv.data")
    assert (manifest.schema.name, len(manifest.schema.dense)) == ("own", dense)
    assert manifest.ids.cardinalities[1] == 4
    batch = next(Rows(manifest, None).batches(10))
    assert (batch.dense.shape, batch.ids.shape) == ((10, dense), (10, 2))
    summary = json.loads((folder / "run" / "summary.json").read_text())
    # The law's best is 0.87, and 429 rows leave it a standard error of 0.02; the noise is no help.
    assert summary["test"]["auc"] > 0.75


def test_formats_hold_the_same_rows(own):
    folder, _ = own
    manifests = [Manifest.load(folder / f"{name}.data") for name in FORMATS]
    first, *others = ([day.sha256 for day in manifest.days] for manifest in manifests)
    assert others == [first] * 3


@pytest.mark.parametrize("name", FORMATS)
def test_predictions_of_a_table_are_those_of_its_rows(own, name, tmp_path):
    folder, _ = own
    for data, out in ((folder / name, tmp_path / "p"), (folder / "own.csv.data", tmp_path / "q")):
        run("predict", folder / "run", data, "--out", out)
    # float32 matrix products of batches that are cut elsewhere.
    np.testing.assert_allclose(np.loadtxt(tmp_path / "p"), np.loadtxt(tmp_path / "q"), rtol=1e-5)


def test_another_schema_is_other_data(own, tmp_path, capsys):
    folder, _ = own
    text = (folder / "own.toml").read_text().replace('"integer"', '"string"')
    (tmp_path / "other.toml").write_text(text)
    run("prepare", folder / "own.csv", "--schema", tmp_path / "other.toml", "--out", tmp_path / "o")
    with pytest.raises(SystemExit):
        run("evaluate", folder / "run", "--data", tmp_path / "o")
    assert "its columns or ids do not mean what they meant in training" in capsys.readouterr().err


def test_a_split_by_shares_and_by_days(own, tmp_path):
    """Every row is in the part that the split says; a dictionary learns from what trains alone."""
    folder, _ = own
    prepare = ["prepare", folder / "own.csv", "--schema", folder / "own.toml", "--blocks", "3"]
    run(*prepare, "--split", "0.5,0.3,0.2", "--out", tmp_path / "shares")
    manifest = Manifest.load(tmp_path / "shares")
    parts = {name: Rows(manifest, name).count for name in ("train", "validation", "test")}
    assert parts == {"train": 3000, "validation": 1800, "test": 1200}
    run(*prepare, "--split", "test=0,validation=1", "--ids", "dictionary", "--out", tmp_path / "days")
    manifest = Manifest.load(tmp_path / "days")
    assert "test=0,validation=1 (days counted from 0), the others train" in manifest.describe()
    # The noise has a new value in each row, so only the rows of the last day have been learned.
    for name, known in (("test", 0), ("validation", 0), ("train", 2000)):
        ids = np.concatenate([batch.ids for batch in Rows(manifest, name).batches(500)])
        assert np.count_nonzero(ids[:, 0]) == known
    # Shares cut a day, and so does what is learned of it.
    run(*prepare, "--split", "0.5,0.3,0.2", "--ids", "dictionary", "--out", tmp_path / "cut")
    for name, known in (("train", 3000), ("validation", 0), ("test", 0)):
        ids = np.concatenate(
            [batch.ids for batch in Rows(Manifest.load(tmp_path / "cut"), name).batches(500)]
        )
        assert np.count_nonzero(ids[:, 0]) == known


def test_columns_have_rules_of_their_own(tmp_path, capsys):
    """Negative numbers, and texts that mean missing in one column alone, reach model and predictions."""
    rng = np.random.default_rng(1)
    z, debt, small = rng.normal(size=(3, 600))
    frame = pl.DataFrame({"click": (z > 0) * 1, "z": z, "debt": debt, "some": np.where(small < -2.7, -1, 1)})
    frame = frame.with_columns(
        land=pl.Series(["NA", "DE", "-"] * 200), age=pl.Series(["NA", "30", "-1"] * 200)
    )
    frame.write_csv(tmp_path / "own.csv")
    frame.with_columns(z=-z).write_csv(tmp_path / "other.csv")
    (tmp_path / "own.toml").write_text(
        'label = "click"\ndense = ["z", "debt", "age", "some"]\ncategorical.land = "string"\n'
        'missing_in.age = ["NA"]\n[transform]\nz = "none"\nage = "none"\n'
    )
    prepare = ["prepare", tmp_path / "own.csv", "--schema", tmp_path / "own.toml", "--out", tmp_path / "d"]
    run(*prepare)
    out = capsys.readouterr().out
    assert "dense: log1p, 2 by schema none; ids" in out
    share = (debt < 0).mean()
    warning = (
        f'warning: debt: {share:.1%} of its values are below 0 and became 0; debt = "none" under [transform]'
    )
    assert [line[: len(warning)] for line in out.splitlines() if "became 0" in line] == [warning]
    manifest = Manifest.load(tmp_path / "d")
    assert manifest.clipped == {"debt": share, "some": (small < -2.7).mean()}
    assert 0 < manifest.clipped["some"] < 0.01
    (batch,) = Rows(manifest, None).batches(600)
    columns = [z, np.log1p(np.maximum(debt, 0)), [0, 30, -1] * 200]
    np.testing.assert_array_equal(batch.dense[:, :3].T, np.array(columns, np.float32))
    assert len(set(batch.ids[:, 0].tolist()) - {0}) == 3
    # A prediction from the file, from a table in memory and from the shards is the same, and minds the sign.
    run("train", "--data", tmp_path / "d", "--out", tmp_path / "r", "--lr", "0.1", "--epochs", "3", *TINY)
    for file in ("own.csv", "d", "other.csv"):
        run("predict", tmp_path / "r", tmp_path / file, "--out", tmp_path / f"p_{file}")
    own, shards, other = (np.loadtxt(tmp_path / f"p_{file}") for file in ("own.csv", "d", "other.csv"))
    np.testing.assert_allclose(own, shards, rtol=1e-5)
    np.testing.assert_allclose(robe.load(tmp_path / "r").predict_table(frame), own, rtol=1e-6)
    assert auc(z > 0, own) > 0.9 > 0.1 > auc(z > 0, other)


def test_a_manifest_of_before_there_were_rules_of_columns(own):
    folder, _ = own
    path = folder / "own.csv.data" / "manifest.json"
    now, data = Manifest.load(path.parent), json.loads(path.read_text())
    for old in (data, data["schema"]):
        for key in ("clipped", "missing_in", "transforms"):
            old.pop(key, None)
    path.write_text(json.dumps(data))
    then = Manifest.load(path.parent)
    assert (then.fingerprint(), then.schema) == (now.fingerprint(), now.schema)
    now.save(path.parent)


def test_bad_options_are_refused_in_a_line(own, tmp_path, capsys):
    folder, _ = own
    schema = ["--schema", folder / "own.toml"]
    for options, message in (
        (["--schema", "no.toml"], "no.toml: No such file or directory; check the path"),
        ([], "own.csv: has no column 'label'"),
        ([*schema, "--split", "x"], "--split x: give mlperf, torchrec, kaggle, or"),
        ([*schema, "--split", "test=1"], "leaves no row to validation"),
    ):
        with pytest.raises(SystemExit) as exit:
            run("prepare", folder / "own.csv", "--out", tmp_path / "out", *options)
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
