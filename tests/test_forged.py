"""Files that a forger made, or that a disk damaged: refused in one line before a kernel sees them."""

import dataclasses
import hashlib
import json
import os
import shutil

import fuzz_files
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_run import TABLES, run
from test_run import folder as folder
from test_run import trained as trained

from data_pipeline.batches import Rows
from data_pipeline.manifest import SPLITS, Manifest
from data_pipeline.npy import NpyFile
from data_pipeline.schema import DataError
from robe import checkpoint
from robe.checkpoint import CheckpointError
from robe.config import ConfigError, DataSpec, from_json, resolve
from robe.kernels.parts.cache import EMPTY, WAYS, hash_row, set_of
from robe.model import build, state_shapes
from robe.train import Log


@pytest.fixture
def forge(trained, tmp_path):
    """A copy of a run whose newest checkpoint has other arrays or another state."""

    def forged(method, arrays=lambda arrays: None, state=lambda state: None):
        shutil.copytree(trained / method, tmp_path / "forged")
        newest = checkpoint.latest(tmp_path / "forged")
        weights, path = newest / "weights.safetensors", newest / "state.json"
        held, told = load_file(weights), json.loads(path.read_text())
        arrays(held)
        save_file(held, weights)
        state(told)
        told["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        path.write_text(json.dumps(told))
        return tmp_path / "forged"

    return forged


@pytest.fixture
def refused(capsys, tmp_path):
    def check(*arguments, message):
        code, _, err = run(*arguments, capsys=capsys)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert err.startswith("error: ")
        assert message in err
        assert not (tmp_path / "out").exists()

    return check


def readers(run_folder, tmp_path):
    return (
        ["evaluate", run_folder],
        ["train", "--resume", run_folder],
        ["convert", run_folder, "--to", "int8", "--out", tmp_path / "out"],
    )


def first_held(tags):
    return next(zip(*np.nonzero(tags != EMPTY), strict=True))


def beyond(tags):
    tags[first_held(tags)] = 5_000_000


def last_number(tags):
    tags[first_held(tags)] = EMPTY - 1


def elsewhere(tags):
    """The row of one set, in an entry of another."""
    s, way = first_held(tags)
    other = (s + 1) % len(tags)
    tags[other] = EMPTY
    tags[other, 0], tags[s, way] = tags[s, way], EMPTY


def twice(tags):
    s, way = first_held(tags)
    tags[s, (way + 1) % WAYS] = tags[s, way]


@pytest.mark.parametrize(
    ("forgery", "message"),
    [
        (beyond, "its cache holds row 5000000 of a table of"),
        (last_number, "its cache holds row 4294967294 of a table of"),
        (elsewhere, "in a set that is not its own"),
        (twice, "its cache holds a row twice"),
    ],
)
def test_tags_that_no_training_leaves(forgery, message, forge, refused, tmp_path):
    forged = forge("mixed_precision", lambda arrays: forgery(arrays["embedding.tags"]))
    for command in readers(forged, tmp_path):
        refused(*command, message=message)


def test_the_tags_of_a_training_are_fine(trained):
    tags = load_file(checkpoint.latest(trained / "mixed_precision") / "weights.safetensors")["embedding.tags"]
    sets, _ = held = np.nonzero(tags != EMPTY)
    assert len(sets) > 30
    np.testing.assert_array_equal(set_of(hash_row(tags[held]), len(tags)), sets)


@pytest.mark.parametrize(
    ("method", "name", "value", "message"),
    [
        ("full", "embedding.memory", np.nan, "embedding.memory holds a value that is not finite"),
        ("full", "top.0.bias", np.inf, "top.0.bias holds a value that is not finite"),
        ("full", "embedding.accumulator", -1, "a sum of squares that is negative"),
        ("full", "dense.accumulator", -1e-30, "a sum of squares that is negative"),
        ("mixed_precision", "embedding.values", -np.inf, "embedding.values holds a value that is not finite"),
        ("mixed_precision", "embedding.accumulator", -1, "a sum of squares that is negative"),
        ("mixed_precision", "embedding.counters", -1, "it has counted fewer"),
    ],
)
def test_numbers_that_no_training_leaves(method, name, value, message, forge, refused, tmp_path):
    def one(arrays):
        arrays[name].flat[-1] = value

    forged = forge(method, one)
    for command in readers(forged, tmp_path):
        refused(*command, message=message)


@pytest.mark.parametrize(("end", "message"), [(slice(-4, -2), "row 7 of"), (slice(-2, None), "row 7 of")])
def test_scales_and_biases_are_finite(end, message, forge, refused, tmp_path):
    def endless(arrays):
        arrays["embedding.table"][7, end] = [0xFF, 0x7F]

    for command in readers(forge("mixed_precision", endless), tmp_path):
        refused(*command, message=message)


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_scales_of_a_converted_run_are_finite_and_positive(to, trained, refused, tmp_path, capsys):
    assert run("convert", trained / "full", "--to", to, "--out", tmp_path / "c", capsys=capsys)[0] == 0
    newest = checkpoint.latest(tmp_path / "c")
    arrays = load_file(newest / "weights.safetensors")
    arrays["embedding.memory"][3, -3] |= 0x80  # the sign of the scale
    save_file(arrays, newest / "weights.safetensors")
    state = json.loads((newest / "state.json").read_text())
    state["weights_sha256"] = hashlib.sha256((newest / "weights.safetensors").read_bytes()).hexdigest()
    (newest / "state.json").write_text(json.dumps(state))
    refused("evaluate", tmp_path / "c", message="row 3 of its codes")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("data", "cardinalities", 0), -5),
        (("data", "cardinalities", 0), 2**40),
        (("data", "cardinalities"), []),
        (("data", "cardinalities"), 7),
        (("data", "dense"), 2**62),
        (("data", "dialect"), "sorted"),
        (("config", "model", "width"), 2**40),
        (("config", "model", "bottom"), [2**60, 2**60]),
        (("config", "embedding", "method"), ["full"]),
        (("config", "embedding", "init_bound"), 10**400),
        (("config", "batch"), True),
        (("config", "seed"), "7"),
        (("config", "optimizer", "eps"), "NaN"),
        (("position", "step"), -1),
        (("position", "step"), 64),
        (("position", "step"), 2**63),
        (("position", "epoch"), 1.5),
        (("position",), None),
        (("weights_sha256",), None),
        (("version",), {}),
    ],
)
def test_states_that_no_training_leaves(place, value, forge, refused, tmp_path):
    def other(state):
        *path, last = place
        for key in path:
            state = state[key]
        state[last] = value

    forged = forge("full", state=other)
    if place == ("weights_sha256",):  # which `forge` makes good
        path = checkpoint.latest(forged) / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_sha256": value}))
    for command in readers(forged, tmp_path):
        refused(*command, message=str(checkpoint.latest(forged)))


@pytest.mark.parametrize(
    "line", ["[]", "5", "{}", '{"kind": []}', '{"kind": "train", "step": "x"}', "[" * 100_000]
)
def test_lines_of_a_log_that_are_no_entries_are_left_out(line, tmp_path):
    entries = [
        {"kind": "train", "step": 5, "loss": 0.5, "lr": 0.1, "seconds": 1.5},
        *(json.loads(line) for line in ['{"kind": "train", "step": 6, "loss": NaN, "seconds": 2}']),
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([json.dumps(entries[0]), line, json.dumps(entries[1])]))
    assert [entry["step"] for entry in Log(path, 6).entries] == [5, 6]


def test_a_position_between_the_epochs_of_its_data_is_refused(forge, refused):
    def other(state):
        state["position"]["epoch"] += 1

    refused(
        "train", "--resume", forge("full", state=other), message="where no training of 63 steps per epoch"
    )


@pytest.mark.parametrize("method", ["robe", "full", "mixed_precision"])
def test_arrays_are_known_before_they_are_made(method, trained):
    config, data, _ = checkpoint.read_state(checkpoint.latest(trained / method))
    from robe.backend import select

    state = build(config, data, select("cpu")).state()
    assert state_shapes(config, data) == {name: (a.shape, str(a.dtype)) for name, a in state.items()}


def test_a_model_larger_than_its_file_is_not_made(forge, refused, tmp_path, monkeypatch):
    def larger(state):
        state["data"]["cardinalities"][3] = 2**31

    forged = forge("full", state=larger)
    monkeypatch.setattr("robe.checkpoint.build", lambda *_: pytest.fail("made"))
    refused("evaluate", forged, message="its arrays do not fit the configuration")


@pytest.mark.parametrize("file", ["config.json", "state.json", "manifest.json"])
def test_files_of_a_run_that_contradict_each_other(file, forge, refused, tmp_path):
    """Each of them alone could be meant."""
    forged = forge("robe")
    path = next(forged.rglob(file))
    if file == "manifest.json":
        told = json.loads(path.read_text())
        told["ids"]["cardinalities"][0] += 1
        told["features"][0]["distinct"] += 1
    else:
        path = forged / file if file == "config.json" else checkpoint.latest(forged) / file
        told = json.loads(path.read_text())
        told["config"]["embedding"]["hash_seed"] += 1
    path.write_text(json.dumps(told))
    for command in (["evaluate", forged], ["convert", forged, "--to", "int8", "--out", tmp_path / "out"]):
        refused(*command, message="than the newest checkpoint")


BEST = {"rows": 1, "auc": 0.5, "log_loss": 0.5, "base_rate": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "Expected `object`, got `null` - at `$.ids`"),
        ({"days": [{"rows": "5"}]}, "got `str` - at `$.days[0].rows`"),
        ({"split": {"train": [[-1, 0, 5]], "test": [], "validation": []}}, "rows 0 to 5 of day -1"),
        ({"split": {"train": [[0, 0, 1]]}}, "a split is missing"),
        ({"split": {key: [] for key in SPLITS}}, "train has no row, or one twice"),
        (
            {"split": {key: [[1, 5, 9], [0, 0, 5], [1, 8, 9]] for key in SPLITS}},
            "train has no row, or one twice",
        ),
        ({"features": [{}] * 26}, "missing required field `distinct`"),
        ({"synthetic": {"bayes": {"test": 0.5}}}, "at `$.synthetic.bayes.test`"),
        ({"synthetic": {"bayes": {"test": BEST}}}, "missing required field `validation`"),
        ({"colour": "red"}, "unknown: colour"),
        ({"schema_fingerprint": 7}, "got `int` - at `$.schema_fingerprint`"),
        ({"schema_fingerprint": "7"}, "the columns do not match their fingerprint"),
    ],
)
def test_manifests_that_prepare_does_not_write(changes, message, folder, refused, tmp_path):
    shutil.copytree(folder / "hash", tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused("train", "--data", tmp_path / "data", "--out", tmp_path / "out", message=message)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"cardinalities": [3] * 26}, "not those of the features"),
        ({"cardinalities": [3] * 25}, "25 cardinalities of 26"),
        ({"cardinalities": [0] * 26}, "from 1 to 2^32 - 1 ids"),
        ({"dialect": "modulo", "modulus": None}, "cardinalities that are not the modulus"),
        ({"dialect": "roman"}, "Invalid enum value 'roman'"),
        ({"modulus": 0}, "a modulus or a least count"),
    ],
)
def test_ids_that_no_shard_has(ids, message, folder, refused, tmp_path):
    shutil.copytree(folder / "dictionary", tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    told = json.loads(path.read_text())
    told["ids"] |= ids
    path.write_text(json.dumps(told))
    refused("train", "--data", tmp_path / "data", "--out", tmp_path / "out", message=message)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "", "NaN", '"\\ud800"'])
@pytest.mark.parametrize("file", ["config.json", "state.json", "manifest.json"])
def test_texts_that_are_no_json(file, text, forge, refused):
    forged = forge("full")
    path = checkpoint.latest(forged) / file if file == "state.json" else next(forged.rglob(file))
    path.write_text(text)
    refused("train", "--resume", forged, message=str(path))


@pytest.mark.parametrize("ids", ["hash", "dictionary"])
def test_ids_of_a_shard_are_below_their_cardinality_before_a_kernel_reads(ids, folder, trained, tmp_path):
    shutil.copytree(folder / ids, tmp_path / "data")
    for path in (tmp_path / "data").glob("*_sparse.npy"):
        shard = np.load(path)
        shard[5, 2] = -2  # as uint32 the last but one
        np.save(path, shard)
    manifest = Manifest.load(tmp_path / "data")
    method = "robe" if ids == "hash" else "mixed_precision"
    model, *_ = checkpoint.load_model(trained / method, "cpu")
    found = next(Rows(manifest, "train").batches(64))
    if ids == "hash":  # any 32 bits have a row
        model.embedding.check(found.ids)
    else:
        with pytest.raises(ConfigError, match=r"feature 2 has \d+ rows, but an id of the data is 4294967294"):
            model.embedding.check(found.ids)


class TestNpy:
    @pytest.fixture
    def shard(self, tmp_path):
        array = np.arange(3000, dtype=np.int64).reshape(1000, 3) * 2654435761
        np.save(tmp_path / "c.npy", array)
        np.save(tmp_path / "f.npy", np.asfortranarray(array))
        return array

    def open(self, path):
        return NpyFile(path, missing="missing", remedy="write it again")

    @pytest.mark.parametrize("name", ["c.npy", "f.npy"])
    def test_rows_are_the_same_in_either_order(self, name, shard, tmp_path):
        file, out = self.open(tmp_path / name), np.empty((7, 3), np.uint32)
        np.testing.assert_array_equal(file.part(10, 20), shard[10:20])
        np.testing.assert_array_equal(np.asarray(file), shard)
        file.read(33, out)
        np.testing.assert_array_equal(out, shard[33:40].astype(np.uint32))

    @pytest.mark.parametrize("name", ["c.npy", "f.npy"])
    def test_a_file_cut_short_meanwhile_is_named(self, name, shard, tmp_path):
        file = self.open(tmp_path / name)
        os.truncate(tmp_path / name, 500)
        with pytest.raises(DataError, match=rf"{name}: has become shorter; write it again"):
            file.part(900, 1000)

    @pytest.mark.parametrize(
        "change",
        [
            {"shape": (2**40, 3)},
            {"shape": (-1000, 3)},
            {"shape": (2**63, 2**63)},
            {"descr": "|O"},
            {"descr": "x"},
            {"descr": [("a", "<i8")]},
            {"shape": "x"},
            {"colour": 5},
        ],
    )
    def test_headers_that_lie(self, change, shard, tmp_path):
        header = {"descr": "<i8", "fortran_order": False, "shape": (1000, 3)} | change
        with (tmp_path / "c.npy").open("r+b") as file:
            text = f"{header}\n".encode()
            file.write(b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text)
        if change == {"descr": [("a", "<i8")]}:  # another type, which whoever opens it refuses
            assert self.open(tmp_path / "c.npy").dtype != np.int64
            return
        with pytest.raises(DataError, match=r"c.npy: damaged \(.*write it again") as caught:
            self.open(tmp_path / "c.npy")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", [b"(" * 9000, b"[" * 60000, b"{'descr': " * 500, b"\xff" * 80, b""])
    def test_headers_that_are_none(self, text, tmp_path):
        (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text)
        with pytest.raises(DataError, match=r"x.npy: damaged \(") as caught:
            self.open(tmp_path / "x.npy")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("dtype", [">i4", "<f8", "<i2"])
    def test_other_types_are_refused(self, dtype, folder, trained, refused, tmp_path):
        shutil.copytree(folder / "hash", tmp_path / "data")
        path = tmp_path / "data" / "day_0_sparse.npy"
        np.save(path, np.load(path).astype(dtype))
        train = ["train", "--data", tmp_path / "data", "--out", tmp_path / "out", *TABLES]
        refused(*train, message=f"{path}: holds {np.dtype(dtype)}")


def test_settings_of_other_types_are_refused():
    config = dataclasses.asdict(
        resolve(from_json({part: {} for part in ("model", "embedding", "optimizer")}))
    )
    for change, message in (
        ({"batch": "64"}, r"Expected `int.*`, got `str` - at `\$.batch`"),
        ({"model": config["model"] | {"colour": 1}}, "unknown: colour"),
        ({"embedding": None}, r"got `null` - at `\$.embedding`"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_json(json.loads(json.dumps(config | change)))
    with pytest.raises(ConfigError, match="from 1 to 2"):
        DataSpec(13, (5, 2**32), "hash", "", "")
    with pytest.raises(CheckpointError, match="missing or unknown: step"):
        checkpoint_of({"epoch": 0, "epoch_step": 0})


def checkpoint_of(position):
    from robe.checkpoint import Position, _exactly, _reading

    with _reading(fuzz_files.Path("state.json")):
        return _exactly(Position, position)


def test_a_sample_of_the_fuzz(tmp_path):
    fuzz_files.make_subjects(tmp_path, ("mixed", "robe"))
    trouble, counts = fuzz_files.fuzz(tmp_path, seed=0, sample=60)
    assert trouble == []
    assert counts["refused"] > 60
    assert counts["same"] > 5
