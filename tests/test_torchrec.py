"""Folders in the layout of TorchRec's Criteo tools, both ways."""

import json
import re

import numpy as np
import pytest

from data_pipeline.bags import Bags
from data_pipeline.batches import Rows
from data_pipeline.folders import open_folder, verify
from data_pipeline.schema import DataError
from robe import cli as command_line

TABLES = ["--bottom", "8", "--width", "4", "--top", "8", "--batch", "64"]
TINY = [*TABLES, "--block", "4"]
ROWS = 201  # of each of three days


def run(*arguments):
    command_line.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    run("synth", "--out", folder / "raw", "--rows", 3 * ROWS, "--days", 3)
    return folder / "raw"


def theirs(raw, folder, ids=np.int32):
    """What TorchRec's tools leave of a log, written by nothing of ours; but dense values as ours are."""
    folder.mkdir()
    for day in range(3):
        rows = [line.split("\t") for line in (raw / f"day_{day}").read_text().splitlines()]
        labels = np.array([[int(row[0])] for row in rows], np.int32)
        counts = np.array([[int(text or 0) for text in row[1:14]] for row in rows], float)
        sparse = np.array([[int(text or "0", 16) for text in row[14:]] for row in rows])
        sparse = sparse if ids is np.int64 else sparse.astype(np.uint32).view(np.int32)
        np.save(folder / f"day_{day}_labels.npy", labels)
        np.save(folder / f"day_{day}_dense.npy", np.log1p(np.maximum(counts, 0)).astype(np.float32))
        np.save(
            folder / f"day_{day}_sparse.npy",
            sparse.astype(np.uint32).view(ids) if ids is np.int32 else sparse,
        )
    return folder


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("ids", [np.int32, np.int64])
def test_a_folder_of_torchrec_trains_as_ours_of_the_same_rows(raw, tmp_path, capsys, ids):
    data = theirs(raw, tmp_path / "theirs", ids)
    run("prepare", raw, "--out", tmp_path / "ours", "--split", "torchrec")
    for name in ("theirs", "ours"):
        run("train", "--data", tmp_path / name, "--out", tmp_path / f"run_{name}", *TINY)
    out = capsys.readouterr().out
    assert re.search(r"theirs: TorchRec data; .* validation is the first half of the last day, test", out)
    found, expected = (summary(tmp_path / f"run_{name}") for name in ("theirs", "ours"))
    for part in ("test", "validation"):
        assert found[part] == expected[part]
    assert [found["rows_trained"], found["validation"]["rows"], found["test"]["rows"]] == [402, 101, 100]

    # Everything that takes a prepared folder takes this one.
    ours, manifest = open_folder(tmp_path / "ours"), open_folder(data)
    assert manifest.ids == ours.ids
    assert [day.sha256 for day in manifest.days] == [day.sha256 for day in ours.days]
    assert verify(data) == manifest
    run("evaluate", tmp_path / "run_theirs")
    run("predict", tmp_path / "run_theirs", data, "--out", tmp_path / "p")
    assert len((tmp_path / "p").read_text().splitlines()) == 3 * ROWS
    run("train", "--resume", tmp_path / "run_theirs")
    run("doctor", "--data", data)


def test_ours_load_as_torchrec_loads(raw, tmp_path):
    """Two-dimensional arrays of the same names and types, which its loader takes by np.load."""
    run("prepare", raw, "--out", tmp_path / "ours")
    folder = theirs(raw, tmp_path / "theirs")
    for path in folder.iterdir():
        array, expected = np.load(tmp_path / "ours" / path.name), np.load(path)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_a_model_of_a_folder_of_torchrec_takes_no_raw_log(raw, tmp_path, capsys):
    run("train", "--data", theirs(raw, tmp_path / "theirs"), "--out", tmp_path / "run", *TINY)
    with pytest.raises(SystemExit):
        run("predict", tmp_path / "run", raw / "day_0", "--out", tmp_path / "p")
    assert "do not say how they are made of a log; give such a folder" in capsys.readouterr().err
    run("prepare", raw, "--out", tmp_path / "ours")
    with pytest.raises(SystemExit):
        run("predict", tmp_path / "run", tmp_path / "ours", "--out", tmp_path / "p")
    assert "its columns or ids do not mean what they meant" in capsys.readouterr().err


def test_ids_without_gaps_serve_tables(tmp_path):
    """As sparse_to_contiguous leaves them: from 1 on, 1 for rare values, in Fortran's order."""
    rng = np.random.default_rng(0)
    tops = [3, 50, 7]
    for day in range(3):
        ids = [rng.permutation(np.arange(ROWS) % top) + 1 for top in tops]
        np.save(tmp_path / f"day_{day}_sparse.npy", np.array(ids, np.int32).T)
        np.save(tmp_path / f"day_{day}_dense.npy", rng.random((ROWS, 2), np.float32))
        np.save(tmp_path / f"day_{day}_labels.npy", rng.integers(0, 2, (ROWS, 1), dtype=np.int32))
    manifest = open_folder(tmp_path)
    assert (manifest.ids.dialect, manifest.ids.cardinalities) == ("dictionary", (4, 51, 8))
    assert verify(tmp_path) == manifest
    run("train", "--data", tmp_path, "--out", tmp_path / "run", "--method", "full", *TABLES)
    assert summary(tmp_path / "run")["embedding_parameters"] == (4 + 51 + 8) * 4
    batch = next(Rows(manifest, "test").batches(10))
    np.testing.assert_array_equal(batch.ids, np.load(tmp_path / "day_2_sparse.npy")[101:111])


def test_folders_that_cannot_be_used(raw, tmp_path):
    def fails(match):
        with pytest.raises(DataError, match=match) as error:
            open_folder(folder)
        assert str(error.value).startswith(str(folder))
        assert len(str(error.value).splitlines()) == 1

    folder = theirs(raw, tmp_path / "theirs")

    def spoilt(name, change, match):
        """A file of the folder changed, refused, and put back."""
        path = folder / name
        before = path.read_bytes()
        array = np.load(path)
        changed = change(array)
        if changed is not None:
            np.save(path, changed)
        fails(match)
        path.write_bytes(before)

    def put(value):
        def change(array):
            array = array.astype(np.int64) if value == 2**40 else array
            array[7, -1] = value
            return array

        return change

    spoilt("day_1_labels.npy", put(2), "day_1_labels.npy, row 8, column 1: 2 is not 0 or 1; prepare")
    spoilt("day_1_dense.npy", put(-np.inf), r"row 8, column 13: -inf is not finite \(TorchRec")
    spoilt("day_2_sparse.npy", put(2**40), "row 8, column 26: 1099511627776 is not of 32 bits")
    spoilt(
        "day_2_dense.npy",
        lambda array: array[1:],
        r"dense.npy: is \(200, 13\), but others say",
    )
    spoilt("day_2_sparse.npy", lambda array: array[:, 1:], r"is \(201, 25\), but others say \(201, 26\)")
    spoilt("day_0_dense.npy", lambda array: array.astype(float), r"holds float64 .*, not TorchRec's dense")
    spoilt("day_0_labels.npy", lambda array: array[:, 0], "holds int32 .*, not TorchRec's labels")
    spoilt(
        "day_1_dense.npy",
        lambda array: (folder / "day_1_dense.npy").unlink(),
        "day_1_dense.npy: missing; Tor",
    )
    (folder / "day_2_dense.npy").write_bytes(b"\x93NUMPY")
    fails("day_2_dense.npy: damaged")
    for kind in ("labels", "dense", "sparse"):
        for day in (1, 2):
            (folder / f"day_{day}_{kind}.npy").unlink()
    fails("theirs: --split torchrec: leaves no row to train")


def multi_hot(folder):
    """Ids of three columns on three days, as MLPerf's tools leave them; `dense` is the number of the row."""
    folder.mkdir()
    rng, found = np.random.default_rng(0), []
    for day in range(3):
        np.save(folder / f"day_{day}_labels.npy", rng.integers(2, size=(40, 1), dtype=np.int32))
        np.save(
            folder / f"day_{day}_dense.npy", np.arange(40 * day, 40 * day + 40, dtype=np.float32)[:, None]
        )
        found.append([rng.integers(9, size=(40, size), dtype=np.int32) for size in (1, 3, 2)])
        arrays = {str(column): ids for column, ids in enumerate(found[-1])}
        np.savez(folder / f"day_{day}_sparse_multi_hot.npz", **arrays)
    return np.concatenate([np.concatenate(day, axis=1) for day in found])


def test_multi_hot_ids_are_read_as_they_are(tmp_path):
    expected = multi_hot(tmp_path / "theirs")
    manifest = verify(tmp_path / "theirs")
    assert (manifest.ids.dialect, manifest.ids.cardinalities) == ("dictionary", (9, 9, 9))
    assert manifest.schema.poolings() == ("sum", "sum", "sum")
    for seed in (None, 3):
        for batch in Rows(manifest, None, block_rows=8, window_blocks=3).batches(7, seed=seed):
            assert isinstance(batch.ids, Bags)
            assert batch.ids.weights is None
            rows = batch.dense[:, 0].astype(int)
            np.testing.assert_array_equal(batch.ids.values, expected[rows].ravel())
            np.testing.assert_array_equal(np.diff(batch.ids.offsets), np.tile([1, 3, 2], len(rows)))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, ids: np.savez_compressed(path, **ids), "is packed, which rows cannot be read from"),
        (
            lambda path, ids: np.savez(path, **{"0": ids["0"], "2": ids["2"]}),
            "does not hold arrays 0, 1, ...",
        ),
        (
            lambda path, ids: np.savez(path, **{n: a.astype(float) for n, a in ids.items()}),
            "does not hold arrays",
        ),
        (lambda path, ids: np.savez(path, **ids | {"1": ids["1"][1:]}), "does not hold 3 arrays of 40 rows"),
        (lambda path, ids: path.write_bytes(path.read_bytes()[:900]), "damaged"),
    ],
)
def test_multi_hot_ids_that_cannot_be_read_are_refused(tmp_path, write, message):
    multi_hot(tmp_path / "theirs")
    path = tmp_path / "theirs" / "day_1_sparse_multi_hot.npz"
    with np.load(path) as archive:
        ids = dict(archive)
    write(path, ids)
    with pytest.raises(DataError, match=message) as error:
        open_folder(tmp_path / "theirs")
    assert len(str(error.value).splitlines()) == 1
