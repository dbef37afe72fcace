"""Folders of rows that all test: `prepare --split 0,0,1`."""

import re

import numpy as np
import polars as pl
import pytest

from data_pipeline.manifest import Manifest
from data_pipeline.schema import DataError
from data_pipeline.splits import split
from robe import cli

TINY = "--bottom 8 --width 4 --top 8 --block 4 --weights 40 --batch 32 --backend reference".split()


def call(*words):
    cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run on all rows of a log, and these rows again in a folder where all test."""
    folder, rng = tmp_path_factory.mktemp("test_rows"), np.random.default_rng(0)
    pl.DataFrame({"click": rng.integers(2, size=300), "user": rng.integers(9, size=300)}).write_csv(
        folder / "log.csv"
    )
    (folder / "own.toml").write_text('label = "click"\n[categorical]\nuser = "integer"\n')
    log = ["prepare", folder / "log.csv", "--schema", folder / "own.toml"]
    call(*log, "--split", "0.8,0.1,0.1", "--out", folder / "data")
    call("train", "--data", folder / "data", *TINY, "--out", folder / "run")
    call(*log, "--split", "0,0,1", "--out", folder / "tests")
    return folder


def test_a_run_is_evaluated_on_them(made, capsys):
    assert [Manifest.load(made / "tests").rows(name) for name in ("train", "validation", "test")] == [
        0,
        0,
        300,
    ]
    call("evaluate", made / "run", "--split", "all")
    call("evaluate", made / "run", "--data", made / "tests")
    learned, alone = re.findall(r'"auc": ([\d.]+)', capsys.readouterr().out)
    assert learned == alone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--data", "tests", *TINY, "--out", "no"],
            "tests: has no row for train; prepare it with an",
        ),
        (
            ["evaluate", "run", "--data", "tests", "--split", "validation"],
            "tests: has no row for validation;",
        ),
        (
            "prepare log.csv --schema own.toml --split 0,0,1 --ids dictionary --out no".split(),
            "--split 0,0,1: no row trains, as dictionaries, zscore",
        ),
        (
            "prepare log.csv --schema own.toml --split 0,0,1 --keep-negatives 0.5 --out no".split(),
            "--split 0,0,1: no row trains, as dictionaries, zscore",
        ),
    ],
)
def test_what_needs_other_rows_is_refused_in_a_line(made, monkeypatch, capsys, words, message):
    monkeypatch.chdir(made)
    with pytest.raises(SystemExit):
        call(*words)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (made / "no").exists()


def test_rows_that_were_asked_for_have_to_be_there():
    with pytest.raises(DataError, match="leaves no row to train"):
        split([1], "0.2,0.2,0.6")
    for how in ("0,0,1", "test=0-1"):
        parts, _ = split([3, 4], how)
        assert parts == {"train": (), "test": ((0, 0, 3), (1, 0, 4)), "validation": ()}
