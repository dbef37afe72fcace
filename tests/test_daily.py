"""A new day: `prepare --append` adds it to a folder, `train --start` goes on from a run with its rows."""

import json
import os
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

import robe
from data_pipeline import append, synthetic
from data_pipeline.folders import verify
from data_pipeline.manifest import Manifest
from robe.checkpoint import load_model
from robe.cli import main

ROWS = 300  # of a day
MODEL = "--batch 64 --bottom 4 --width 4 --top 4 --lr 0.05 --optimizer adagrad --backend reference".split()
ROBE = [*MODEL, "--weights", "900", "--block", "4"]


def call(*words):
    main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four days of a log; three of them in the folders `hash` and `dictionary`, and the fourth behind them
    in `hash_4` and `dictionary_4`."""
    folder = tmp_path_factory.mktemp("daily")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "SAMPLE_CHUNKS", 2)
        call("synth", "--rows", 4 * ROWS, "--days", 4, "--out", folder / "raw")
    days = [folder / "raw" / f"day_{day}" for day in range(4)]
    for ids in ("hash", "dictionary"):
        call("prepare", *days[:3], "--ids", ids, "--dense", "zscore", "--out", folder / ids)
        call("prepare", days[3], "--append", folder / ids, "--out", folder / f"{ids}_4")
    call("train", "--data", folder / "hash", *ROBE, "--out", folder / "run")
    return folder


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("day_*.npy")}


def weights(run):
    return (sorted((run / "checkpoints").iterdir())[-1] / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("ids", ["hash", "dictionary"])
def test_an_appended_folder_has_the_days_before_and_the_new_one(folder, ids):
    before, after = Manifest.load(folder / ids), verify(folder / f"{ids}_4")
    assert after.days[:3] == before.days
    assert after.measured == before.measured
    assert after.split["train"] == ((0, 0, ROWS), (1, 0, ROWS), (2, 0, ROWS))
    assert after.split["test"] == ((3, 0, ROWS // 2),)
    linked = folder / ids / "day_0_dense.npy", folder / f"{ids}_4" / "day_0_dense.npy"
    assert os.path.samefile(*linked)
    assert after.synthetic["bayes"] != before.synthetic["bayes"]


def test_ids_by_hash_are_those_of_preparing_all_days(folder, tmp_path):
    call("prepare", folder / "raw", "--dense", "none", "--out", tmp_path / "all")
    call("prepare", *sorted((folder / "raw").glob("day_*"))[:3], "--dense", "none", "--out", tmp_path / "3")
    call("prepare", folder / "raw" / "day_3", "--append", tmp_path / "3", "--out", tmp_path / "4")
    assert shards(tmp_path / "4") == shards(tmp_path / "all")
    at_once, appended = (json.loads((tmp_path / of / "manifest.json").read_text()) for of in ("all", "4"))
    assert appended == at_once  # distinct values and clipped shares of all days included


def test_a_dictionary_grows_and_old_numbers_stay(folder):
    before, after = (np.load(folder / name / "dictionary.npy") for name in ("dictionary", "dictionary_4"))
    old, new = (Manifest.load(folder / name).ids.cardinalities for name in ("dictionary", "dictionary_4"))
    first = more = grown = 0
    for a, b in zip(old, new, strict=True):
        a, b = a - 1, b - 1
        np.testing.assert_array_equal(after[more : more + a], before[first : first + a])
        assert len(np.unique(after[more : more + b])) == b
        first, more, grown = first + a, more + b, grown + b - a
    assert grown > 50
    # All values of the new day have numbers, and the days before have the shards that they had.
    ids = np.load(folder / "dictionary_4" / "day_3_sparse.npy")
    assert (ids > 0).all()
    assert (ids.max(axis=0) < new).all()
    of_day_1 = [(folder / name / "day_1_sparse.npy").read_bytes() for name in ("dictionary", "dictionary_4")]
    assert of_day_1[0] == of_day_1[1]


def test_a_preparation_cut_short_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(append, "_share", lambda source, target: 1 / 0)
    words = "prepare", folder / "raw" / "day_3", "--append", folder / "hash", "--out", tmp_path / "4"
    with pytest.raises(ZeroDivisionError):
        call(*words)
    monkeypatch.undo()
    call(*words)
    assert shards(tmp_path / "4") == shards(folder / "hash_4")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--ids", "dictionary"], "--ids dictionary: not as in .*leave it out"),
        (["--days", "0"], "give days from 3 to 3"),
        (["--keep-negatives", "0.5"], "--append does not go with --keep-negatives"),
    ],
)
def test_settings_are_those_of_the_folder(folder, tmp_path, capsys, words, reason):
    with pytest.raises(SystemExit) as ended:
        call(
            *(
                "prepare",
                folder / "raw" / "day_3",
                "--append",
                folder / "hash",
                *words,
                "--out",
                tmp_path / "x",
            )
        )
    assert ended.value.code
    assert re.search(reason, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_training_goes_on_with_the_new_rows_alone(folder, tmp_path):
    call("train", "--start", folder / "run", "--data", folder / "hash_4", "--out", tmp_path / "run")
    began, _, data, position = load_model(folder / "run", "reference")
    split = Manifest.load(tmp_path / "run" / "data").split
    assert split["train"] == ((2, 0, ROWS),)
    assert split["learned"] == ((0, 0, ROWS), (1, 0, ROWS))
    first = tmp_path / "run" / "checkpoints" / "step_00000000" / "weights.safetensors"
    assert first.read_bytes() == weights(folder / "run")  # sums of squares included
    ended, config, now, position = load_model(tmp_path / "run", "reference")
    assert now == data  # sizes follow the ids that were counted first
    assert (config.batch, position.step) == (64, 5)
    assert np.abs(ended.embedding.memory - began.embedding.memory).max() > 0.01
    # The same as ever for those who use it.
    call("evaluate", tmp_path / "run", "--backend", "reference")
    assert robe.load(tmp_path / "run", "reference").vectors("cat_0", ["ff"]).shape == (1, 4)


def test_a_started_training_resumes_as_if_never_stopped(folder, tmp_path):
    words = "train", "--start", folder / "run", "--data", folder / "hash_4"
    call(*words, "--out", tmp_path / "whole")
    call(*words, "--out", tmp_path / "cut", "--max-steps", 3)
    call("train", "--resume", tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_sums_of_squares_can_begin_anew(folder, tmp_path):
    words = "train", "--start", folder / "run", "--data", folder / "hash_4"
    call(*words, "--fresh-optimizer", "--max-steps", 1, "--out", tmp_path / "fresh")
    call(*words, "--max-steps", 1, "--out", tmp_path / "kept")
    fresh, kept = (load_model(tmp_path / name, "reference")[0].embedding for name in ("fresh", "kept"))
    assert fresh.accumulator.sum() < 0.5 * kept.accumulator.sum()


def test_tables_grow_with_the_dictionary(folder, tmp_path):
    table = "train", *MODEL, "--method", "full", "--data", folder / "dictionary"
    call(*table, "--out", tmp_path / "before")
    call(
        "train", "--start", tmp_path / "before", "--data", folder / "dictionary_4", "--out", tmp_path / "now"
    )
    before, after = (robe.load(tmp_path / name, "reference") for name in ("before", "now"))
    old, new = before.data.cardinalities, after.data.cardinalities
    first = tmp_path / "now" / "checkpoints" / "step_00000000" / "weights.safetensors"
    found = {name: load_file(first)[f"embedding.{name}"].reshape(-1, 4) for name in ("memory", "accumulator")}
    starts = np.cumsum((0, *new))
    for name, rows in found.items():
        theirs = getattr(before.model.embedding, name).reshape(-1, 4)
        for at, known, ours in zip(np.cumsum((0, *old)), old, starts, strict=False):
            np.testing.assert_array_equal(rows[ours : ours + known], theirs[at : at + known])
    added = found["memory"][starts[2] + old[2] : starts[3]]
    assert len(added) > 5
    assert (np.abs(added) <= new[2] ** -0.5).all()  # as drawn
    assert added.any()


@pytest.mark.parametrize(
    ("data", "words", "reason"),
    [
        ("hash", [], "has learned all rows of it that train"),
        ("hash_4", ["--width", "8"], "--width: is 4 in .*leave it out"),
        ("dictionary_4", [], "do not mean what they meant"),
    ],
)
def test_what_cannot_go_on_is_refused(folder, tmp_path, capsys, data, words, reason):
    with pytest.raises(SystemExit):
        call("train", "--start", folder / "run", "--data", folder / data, *words, "--out", tmp_path / "no")
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "no").exists()


def test_rows_of_other_ids_are_no_rows_of_a_dictionary_that_grew(folder, tmp_path, capsys):
    hashing = "train", *MODEL, "--method", "hashing", "--weights", 900, "--data", folder / "dictionary"
    call(*hashing, "--out", tmp_path / "run")
    with pytest.raises(SystemExit):
        call(
            "train", "--start", tmp_path / "run", "--data", folder / "dictionary_4", "--out", tmp_path / "no"
        )
    assert "would read other rows" in capsys.readouterr().err
