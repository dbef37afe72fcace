"""Data with bags, from synthetic tables through every command that takes them."""

import asyncio
import json

import numpy as np
import polars as pl
import pytest

import robe
from data_pipeline import synthetic
from data_pipeline.batches import Rows
from data_pipeline.folders import verify
from data_pipeline.manifest import Manifest
from robe.cli import main
from robe.serve import Server

TINY = "--weights 4000 --batch 128 --bottom 16 --width 8 --top 16 --block 8 --lr 0.05 --backend cpu".split()
FEW = 300  # rows of a day


def call(*words):
    main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw tables of three days, prepared with hashed ids, and a run of them."""
    folder = tmp_path_factory.mktemp("bags")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "SAMPLE_CHUNKS", 2)
        call("synth", "--bags", "--rows", 3 * FEW, "--days", 3, "--out", folder / "raw")
    call("prepare", folder / "raw", "--schema", folder / "raw" / "schema.toml", "--out", folder / "data")
    call("train", "--data", folder / "data", *TINY, "--epochs", 3, "--out", folder / "run")
    return folder


def logs(folder):
    return [folder / "raw" / f"day_{day}.tsv" for day in range(3)]


def checkpoint(run):
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    return {path.name: path.read_bytes() for path in newest.iterdir()}


def test_a_prepared_folder_knows_its_best_score(folder):
    manifest = verify(folder / "data")
    bags = json.loads((folder / "data" / "manifest.json").read_text())["schema"]["bags"]
    assert {name: bag["pooling"] for name, bag in bags.items()} == {
        f"cat_{feature}": pooling for feature, pooling in synthetic.BAGS.items()
    }
    figures = json.loads((folder / "raw" / "synthetic.json").read_text())["files"]["day_2.tsv"]
    assert manifest.synthetic["bayes"]["test"] == figures["first_half"]
    assert manifest.synthetic["generator"]["config"]["bags"] is True
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["bayes"]["test"]["auc"] == figures["first_half"]["auc"]
    assert summary["training_loss"] < 0.9 * manifest.synthetic["bayes"]["validation"]["log_loss"] + 0.1


def test_predictions_of_a_log_are_those_of_its_folder(folder, tmp_path):
    call("predict", folder / "run", *logs(folder), "--out", tmp_path / "raw")
    call("predict", folder / "run", folder / "data", "--out", tmp_path / "data")
    assert (tmp_path / "raw").read_bytes() == (tmp_path / "data").read_bytes()
    probability = np.loadtxt(tmp_path / "raw")
    assert len(np.unique(probability)) > 2 * FEW
    table = pl.read_csv(
        logs(folder)[0], separator="\t", schema_overrides={"cat_0": pl.String}, infer_schema=False
    )
    model = robe.load(folder / "run", "cpu")
    np.testing.assert_allclose(model.predict_table(table), probability[:FEW], rtol=1e-6)
    lists = table.with_columns(pl.col(f"cat_{feature}").str.split("|") for feature in synthetic.BAGS)
    np.testing.assert_array_equal(model.predict_table(lists), model.predict_table(table))
    batch = next(Rows(Manifest.load(folder / "data"), None).batches(FEW))
    np.testing.assert_array_equal(model.predict(batch.dense, batch.ids), model.predict_table(table))


def test_vectors_of_a_bag_are_pooled(folder):
    model = robe.load(folder / "run", "cpu")
    single, other, both, none = model.vectors("cat_2", [["ff"], ["a1"], ["ff", "a1"], []])
    np.testing.assert_allclose(both, (single + other) / 2, rtol=1e-6)  # cat_2 takes the mean
    assert not none.any()
    single, other, both = model.vectors("cat_0", ["ff", "a1", "ff|a1"])
    np.testing.assert_allclose(both, single + other, rtol=1e-5, atol=1e-8)  # and cat_0 the sum
    assert model.vectors("cat_1", ["ff"]).shape == (1, 8)


def test_questions_with_lists_are_answered_together(folder):
    model = robe.load(folder / "run", "cpu")
    table = pl.read_csv(logs(folder)[0], separator="\t", infer_schema=False).head(5)
    rows = table.with_columns(
        pl.col(f"cat_{feature}").str.split("|") for feature in synthetic.BAGS
    ).to_dicts()
    server = Server(model, most_rows=10, most_bytes=10**6)

    async def answers():
        asked = (json.dumps({"rows": part}).encode() for part in (rows[:2], rows[2:]))
        return await asyncio.gather(*map(server._predict, asked))

    first, second = asyncio.run(answers())
    np.testing.assert_allclose(first + second, model.predict_table(table), rtol=1e-6)


def test_a_resumed_run_ends_in_the_same_bytes(folder, tmp_path):
    call(
        "train", "--data", folder / "data", *TINY, "--epochs", 3, "--out", tmp_path / "run", "--max-steps", 7
    )
    call("train", "--resume", tmp_path / "run")
    assert checkpoint(tmp_path / "run") == checkpoint(folder / "run")


def test_every_command_takes_bags(folder, tmp_path, capsys):
    for words in (
        ("evaluate", folder / "run"),
        ("evaluate", folder / "run", "--data", folder / "data", "--split", "all"),
        ("describe", folder / "data", "--out", tmp_path / "d.png"),
        ("plan", "--data", folder / "data", *TINY),
        ("doctor", "--data", folder / "data"),
        (
            "train",
            "--data",
            folder / "data",
            *TINY,
            "--teacher",
            folder / "run",
            "--out",
            tmp_path / "taught",
        ),
        ("train", "--data", folder / "data", *TINY[2:6], "--method", "none", "--out", tmp_path / "none"),
    ):
        capsys.readouterr()
        call(*words)
        out = capsys.readouterr().out
        assert "FAIL" not in out
        if words[0] == "describe":
            assert "cat_12" in out.split("pooling")[1]
    assert checkpoint(tmp_path / "taught") != checkpoint(folder / "run")


def test_tables_of_a_dictionary_are_trained_on_bags(folder, tmp_path):
    schema = ["--schema", folder / "raw" / "schema.toml"]
    call(
        "prepare",
        folder / "raw",
        *schema,
        "--ids",
        "dictionary",
        "--min-count",
        2,
        "--out",
        tmp_path / "data",
    )
    table = ["--method", "full", *TINY[2:8], "--lr", "0.05", "--backend", "cpu"]
    call("train", "--data", tmp_path / "data", *table, "--out", tmp_path / "run")
    call("predict", tmp_path / "run", *logs(folder), "--out", tmp_path / "raw")
    call("predict", tmp_path / "run", tmp_path / "data", "--out", tmp_path / "p")
    assert (tmp_path / "raw").read_bytes() == (tmp_path / "p").read_bytes()
    call("convert", tmp_path / "run", "--to", "int8", "--out", tmp_path / "small")
    call("predict", tmp_path / "small", tmp_path / "data", "--out", tmp_path / "q")
    # Codes of 8 bits lose a 500th of the range of a row at most.
    np.testing.assert_allclose(np.loadtxt(tmp_path / "q"), np.loadtxt(tmp_path / "p"), atol=0.02)
