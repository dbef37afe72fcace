"""A quick look: training on the first rows alone, from JSON lines to an AUC."""

import json

import numpy as np
import polars as pl
import pytest

from data_pipeline.batches import Rows
from data_pipeline.manifest import Manifest
from robe import cli

TINY = ["--bottom", "8", "--width", "4", "--top", "8", "--block", "4", "--compression", "1", "--lr", "0.1"]


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of three days, of which the last tests; users click as their number says."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "own.toml").write_text('label = "click"\n[categorical]\nuser = "integer"\n')
    for day in range(3):
        user = rng.integers(4, size=200)
        click = (rng.random(200) < 0.1 + 0.25 * user) * 1
        pl.DataFrame({"click": click, "user": user}).write_ndjson(folder / f"day_{day}.jsonl")
    run("prepare", *sorted(folder.glob("*.jsonl")), "--schema", folder / "own.toml", "--out", folder / "data")
    return folder / "data"


@pytest.mark.parametrize(("most", "count"), [(1, 1), (200, 200), (330, 330), (1000, 400), (None, 400)])
def test_the_first_rows_are_taken_in_their_order(data, most, count):
    rows = Rows(Manifest.load(data), "train", block_rows=32)
    every = np.concatenate([batch.ids for batch in rows.batches(64)])
    assert 0 < rows.base_rate < 1
    few = rows.first(most)
    assert (few.count, few.steps(64)) == (count, -(-count // 64))
    np.testing.assert_array_equal(np.concatenate([batch.ids for batch in few.batches(64)]), every[:count])
    seeded = np.concatenate([batch.ids for batch in few.batches(64, seed=1)])
    np.testing.assert_array_equal(np.sort(seeded, axis=0), np.sort(every[:count], axis=0))
    labels = np.concatenate([batch.label for batch in few.batches(64)])
    assert few.base_rate == labels.mean()
    assert rows.count == 400


def test_a_limited_training_gets_to_an_auc_and_goes_on_where_it_stopped(data, tmp_path):
    train = ["train", "--data", data, "--backend", "reference", "--limit-rows", "300", "--batch", "50"]
    train += ["--epochs", "4", *TINY]
    run(*train, "--out", tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["config"]["limit_rows"] == 300
    assert whole["steps"] == 4 * 300 // 50
    assert whole["test"]["rows"] == 100
    assert whole["test"]["auc"] > 0.7  # the law's best is 0.81, with a standard error of 0.05 of 100 rows
    run(*train, "--out", tmp_path / "parts", "--max-steps", "9")
    run("train", "--resume", tmp_path / "parts")
    parts = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert (parts["steps"], parts["test"]) == (whole["steps"], whole["test"])


def test_a_limit_has_to_be_positive(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("train", "--data", data, "--limit-rows", "0", "--out", tmp_path / "run")
    assert "--limit-rows must be positive, not 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
