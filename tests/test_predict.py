"""`predict` on what people have: several files, patterns, standard input, tables out, rows that are bad."""

import io
import json
import sys

import numpy as np
import polars as pl
import pytest

from robe.cli import main
from robe.metrics import auc

ROWS = [f"u{i % 7},{i},c{i % 3}\n" for i in range(60)]
HEADER = "user,price,city\n"
SCHEMA = "label='click'\ndense=['price']\n[categorical]\nuser='string'\ncity='string'\n"
RAW = ["\t".join([str(i % 2)] + [str(i)] * 13 + [f"{i % 5:x}"] * 26) + "\n" for i in range(60)]
TINY = "--weights 200 --batch 16 --bottom 16 --width 8 --top 16 --block 8 --lr 0.1".split()


def call(*words):
    main([str(word) for word in words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a table and of a raw log, these, and what `predict` says of each."""
    folder = tmp_path_factory.mktemp("runs")
    labelled = [f"{i % 2},{row}" for i, row in enumerate(ROWS)]
    (folder / "train.csv").write_text("click," + HEADER + "".join(labelled))
    (folder / "own.toml").write_text(SCHEMA)
    (folder / "own.csv").write_text(HEADER + "".join(ROWS))
    (folder / "logs").write_text("".join(RAW))
    for name, log, schema in (("own", "train.csv", ["--schema", folder / "own.toml"]), ("raw", "logs", [])):
        call("prepare", folder / log, *schema, "--split", "0.8,0.1,0.1", "--out", folder / f"{name}-data")
        call("train", "--data", folder / f"{name}-data", *TINY, "--out", folder / name)
    call("predict", folder / "own", folder / "own.csv", "--out", folder / "own.txt")
    call("predict", folder / "raw", folder / "logs", "--out", folder / "raw.txt")
    return folder


def refused(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(*words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_files_and_patterns_are_read_one_behind_the_other(runs, tmp_path):
    """By the numbers in their names, and batches reach over their ends."""
    for i, start in enumerate(range(0, 60, 5)):
        (tmp_path / f"part_{i}.csv").write_text(HEADER + "".join(ROWS[start : start + 5]))
    expected = (runs / "own.txt").read_bytes()
    assert len(set(expected.split())) > 50
    call("predict", runs / "own", tmp_path / "part_*.csv", "--out", tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == expected
    named = [tmp_path / f"part_{i}.csv" for i in range(12)]
    call("predict", runs / "own", *named[6:], *named[:6], "--out", tmp_path / "p")
    # Where in a batch a row stands may move the last digit of a product.
    np.testing.assert_allclose(np.loadtxt(tmp_path / "p"), np.roll(expected.split(), -30).astype(float), 1e-6)


@pytest.mark.parametrize(("run", "file"), [("own", "own.csv"), ("raw", "logs")])
def test_minus_is_standard_input(runs, tmp_path, monkeypatch, run, file):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((runs / file).read_bytes())))
    call("predict", runs / run, "-", "--out", tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == (runs / f"{run}.txt").read_bytes()


@pytest.mark.parametrize(("name", "read"), [("p.parquet", pl.read_parquet), ("p.ARROW", pl.read_ipc)])
def test_tables_are_written_where_the_name_says_so(runs, tmp_path, name, read):
    call("predict", runs / "own", runs / "own.csv", "--out", tmp_path / name)
    table = read(tmp_path / name)
    assert table.schema == {"probability": pl.Float64}
    assert [f"{p:.9g}" for p in table["probability"]] == (runs / "own.txt").read_text().split()


@pytest.mark.parametrize("run", ["own", "raw"])
def test_bad_rows_have_no_probability_and_the_others_their_lines(runs, tmp_path, capsys, run):
    bad = {"own": "u1,much,c1\n", "raw": RAW[0].replace("\t0", "\tword")}[run]
    rows, header = {"own": (ROWS, HEADER), "raw": (RAW, "")}[run]
    broken = [0, 1, 17, 30, 59]
    rows = [bad if i in broken else row for i, row in enumerate(rows)]
    files = [tmp_path / f"part_{i}{'.csv' if run == 'own' else ''}" for i in range(2)]
    for file, part in zip(files, (rows[:30], rows[30:]), strict=True):
        file.write_text(header + "".join(part))
    line = refused(capsys, "predict", runs / run, *files, "--out", tmp_path / "p")
    assert "probabilities of such" in line
    assert "with --bad-rows skip" in line
    assert not (tmp_path / "p").exists()
    call("predict", runs / run, *files, "--bad-rows", "skip", "--out", tmp_path / "p")
    expected = (runs / f"{run}.txt").read_text().split()
    expected = ["nan" if i in broken else p for i, p in enumerate(expected)]
    assert (tmp_path / "p").read_text().split() == expected
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"warning: {files[0]}, row 1: ")
    assert said[-1] == "warning: 5 of 60 rows were bad, and got no probability"
    call("predict", runs / run, *files, "--bad-rows", "skip", "--out", tmp_path / "p.parquet")
    assert pl.read_parquet(tmp_path / "p.parquet")["probability"].is_null().arg_true().to_list() == broken


def test_a_schema_tells_how_these_files_are_written(runs, tmp_path, capsys):
    (tmp_path / "gaps.csv").write_text(HEADER + "".join(ROWS).replace("c1", ""))
    (tmp_path / "nulls.csv").write_text(HEADER + "".join(ROWS).replace("c1", "NULL"))
    (tmp_path / "nulls.toml").write_text("missing=['NULL']\n" + SCHEMA)
    (tmp_path / "other.toml").write_text(SCHEMA.replace("user='string'\n", ""))
    call("predict", runs / "own", tmp_path / "gaps.csv", "--out", tmp_path / "gaps")
    schema = "--schema", tmp_path / "nulls.toml"
    call("predict", runs / "own", tmp_path / "nulls.csv", *schema, "--out", tmp_path / "nulls")
    assert (tmp_path / "gaps").read_bytes() == (tmp_path / "nulls").read_bytes()
    call("predict", runs / "own", tmp_path / "nulls.csv", "--out", tmp_path / "texts")
    assert (tmp_path / "gaps").read_bytes() != (tmp_path / "texts").read_bytes()
    other = "--schema", tmp_path / "other.toml"
    line = refused(capsys, "predict", runs / "own", runs / "own.csv", *other, "--out", tmp_path / "p")
    assert "has other columns, kinds or transforms than the model was trained on" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the files to predict for, or - for standard input"),
        (["{runs}/day_*"], "day_*: no file matches; check the path"),
        (["{runs}/own.csv", "{runs}/own-data"], "own-data: is a folder; name logs or tables"),
        (["{runs}/own-data", "--bad-rows", "skip"], "own-data: is prepared; --schema and --bad-rows are for"),
    ],
)
def test_what_it_cannot_read_is_named(runs, tmp_path, capsys, words, message):
    words = [word.format(runs=runs) for word in words]
    assert message in refused(capsys, "predict", runs / "own", *words, "--out", tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_all_rows_of_a_folder_are_evaluated(runs, capsys):
    capsys.readouterr()
    call("evaluate", runs / "own", "--split", "all")
    found = json.loads(capsys.readouterr().out)
    labels, probabilities = np.arange(60) % 2, np.loadtxt(runs / "own.txt")
    assert (found["split"], found["rows"], found["base_rate"]) == ("all", 60, 0.5)
    assert found["auc"] == pytest.approx(auc(labels, probabilities))
