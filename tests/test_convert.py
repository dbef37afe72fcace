"""Arrays of codes, and runs converted for inference: what is read, what is lost, and what is refused."""

import dataclasses
import errno
import json
import math

import numpy as np
import pytest
from test_embeddings import HASHED, NUMBERED
from test_embeddings import settings as embedding_settings
from test_run import folder as folder
from test_run import run
from test_run import trained as trained

from data_pipeline.batches import Rows
from data_pipeline.manifest import Manifest
from robe import checkpoint, run_folder
from robe import cli as command_line
from robe.backend import select
from robe.config import ConfigError, DataSpec, require_trainable, resolve
from robe.convert import (
    Difference,
    convert_embedding,
    converted_config,
    expected_loss,
    table_rows,
)
from robe.embeddings import create
from robe.interaction import Interaction
from robe.kernels.parts.codes import scale_at
from robe.kernels.parts.groups import expanded, form_of
from robe.model import build
from robe.plan import plan
from robe.train import predict

METHODS = {
    "robe": {"weights": 1001},  # the last group is not full
    "full": {},
    "hashing": {"compression": 3},
    "hot": {"weights": 251, "block": 4, "init_bound": 0.1},  # else a group would hold rows of several laws
    "frequency": {"compression": 3},
    "compositional": {"compression": 3, "chunks": 2},
    "quotient_remainder": {"compression": 2},
    "tensor_train": {"compression": 2},
    "mixed_dimension": {"compression": 2},
    "cce": {"compression": 3},
}
each_method = pytest.mark.parametrize("method", METHODS)
each_memory = pytest.mark.parametrize("memory", ["fp16", "int8", "int4", "int3", "int2", "int1"])
LOST = {"fp16": 1e-3, "int8": 0.02, "int4": 0.2, "int3": 0.3, "int2": 0.5, "int1": 0.7}


def made(method, memory="fp32", **changes):
    optimizer = "none" if memory != "fp32" else "adagrad"
    config = embedding_settings(
        optimizer, method=method, memory=memory, **(METHODS.get(method, {}) | changes)
    )
    return config, create(config, NUMBERED, select("cpu"))


def arrays(embedding):
    return list(embedding.parts.values())


def vectors(embedding, rows=50):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, NUMBERED.cardinalities, (rows, 3)).astype(np.uint32)
    out = np.empty((rows, 3, 8), np.float32)
    embedding.lookup(ids, out)
    first = rng.standard_normal((rows, 8)).astype(np.float32)
    return out, Interaction(embedding, rows, embedding.backend).predict(first, ids)


@each_method
@each_memory
def test_a_converted_embedding_reads_what_its_weights_stand_for(method, memory):
    """Look-ups equal those of floats that are what the codes stand for, bit for bit; each weight is the
    nearest of what can be stored; and what is made of the codes is these floats."""
    _, source = made(method)
    _, target = made(method, memory)
    seen = []
    lost = convert_embedding(source, target, NUMBERED, lambda *counts: seen.append(counts))
    total = source.describe()["embedding_parameters"]
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    _, floats = made(method)
    largest = 0.0
    for before, stored, plain in zip(arrays(source), arrays(target), arrays(floats), strict=True):
        weights = stored.read(0, stored.weights)
        if memory == "fp16":
            np.testing.assert_array_equal(stored.memory, before.memory.astype(np.float16))
            off = np.spacing(abs(stored.memory)).astype(np.float32) / 2
        else:
            form = form_of(stored.memory, stored.slot_map)
            rows = np.arange(len(stored.memory))
            np.testing.assert_array_equal(
                weights, expanded(stored.memory, rows, form).ravel()[: stored.weights]
            )
            scale, bias = (
                end.repeat(int(form.width))[: stored.weights] for end in scale_at(stored.memory, rows, form)
            )
            levels = bias + scale * np.arange(2**form.bits, dtype=np.float32)[:, None]
            off = abs(levels - before.memory).min(axis=0)
            if form.bits > 2:  # none of the weights is cut off
                assert (off <= scale / 2 + 1e-6).all()
        # Sums in float32 are off by some ulp of the weights, which are below 2.
        assert (abs(weights - before.memory) <= off + 1e-6).all()
        largest = max(largest, abs(weights - before.memory).max())
        plain.memory[:] = weights
    assert lost["largest_error"] == pytest.approx(largest)
    assert 0 < lost["relative_rms_error"] < LOST[memory]
    for found, expected in zip(vectors(target), vectors(floats), strict=True):
        np.testing.assert_array_equal(found, expected)
    _, widened = made(method)
    convert_embedding(target, widened, NUMBERED)
    for plain, back in zip(arrays(floats), arrays(widened), strict=True):
        np.testing.assert_array_equal(back.memory, plain.memory)


@each_method
@each_memory
def test_bytes_are_those_of_the_arrays_and_weights_are_counted(method, memory):
    config, embedding = made(method, memory)
    _, floats = made(method)
    said, expected = embedding.describe(), floats.describe()
    stored = sum(array.memory.nbytes for array in arrays(embedding))
    sizes = embedding.bytes()
    assert stored == sizes["embedding weights"]
    assert said["embedding_bytes"] == stored + sizes.get("embedding index", 0)
    assert said["embedding_parameters"] == expected["embedding_parameters"]
    assert stored < expected["embedding_bytes"]
    planned = plan(config, NUMBERED, 1)
    for item, size in embedding.bytes().items():
        assert planned["memory"][item] == size, item
    assert embedding.bytes()["embedding optimizer state"] == 0
    state = build(config, NUMBERED, select("cpu")).state()
    assert planned["checkpoint"]["weights and optimizer state"] == sum(a.nbytes for a in state.values())


def test_codes_of_a_table_take_a_row_and_two_halves():
    _, eight = made("full", "int8")
    _, four = made("full", "int4")
    _, array = made("robe", "int8")
    assert eight.memory.shape == (1310, 8 + 4)
    assert four.memory.shape == (1310, 4 + 4)
    assert made("full", "int3")[1].memory.shape == (1310, 3 + 4)
    assert made("robe", "int3")[1].memory.shape == (16, 24 + 4)
    assert array.memory.shape == (16, 64 + 4)  # of 1,001 weights
    assert array.weights == 1001


def mixed(bits, cache=0.1):
    """A mixed-precision table after some steps, so that rows are in its cache and others have left it."""
    embedding = create(
        embedding_settings("none", method="mixed_precision", bits=bits, cache=cache), NUMBERED, select("cpu")
    )
    rng = np.random.default_rng(1)
    for _ in range(10):
        ids = rng.integers(0, NUMBERED.cardinalities, (60, 3)).astype(np.uint32)
        embedding.update(ids, rng.standard_normal((60, 3, 8)).astype(np.float32), 0.05)
    return embedding


@pytest.mark.parametrize(("bits", "memory"), [(8, "int8"), (4, "int4")])
def test_a_mixed_precision_table_of_the_same_bits_is_flushed(bits, memory):
    source, before = mixed(bits), mixed(bits)
    _, target = made("full", memory)
    lost = convert_embedding(source, target, NUMBERED)
    for name, array in before.state().items():
        np.testing.assert_array_equal(source.state()[name], array)  # the source is only read
    size = before.table.size // before.table.shape[1] * 8
    unflushed = before.read(0, size)
    before.flush()
    assert target.memory.tobytes() == before.table.tobytes()
    for found, expected in zip(vectors(target), vectors(before), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert lost["largest_error"] == abs(target.read(0, size) - unflushed).max() > 0


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("memory", ["fp32", "fp16", "int8", "int4"])
def test_rows_of_a_mixed_precision_table_are_read_where_they_are(bits, memory):
    source, target = mixed(bits), made("full", memory)[1]
    lost = convert_embedding(source, target, NUMBERED)
    expected, found = vectors(source)[0], vectors(target)[0]
    assert (lost["relative_rms_error"] == 0) == (memory == "fp32")
    if memory == "fp32":
        np.testing.assert_array_equal(found, expected)
    most = {"fp32": 1e-30, "fp16": 1e-3, "int8": 0.02, "int4": 0.3}[memory]
    assert abs(found - expected).max() <= lost["largest_error"] < most


def test_halves_saturate():
    _, target = made("full", "fp16")
    target.write(0, np.array([1e6, -1e6, 65504, 1], np.float32))
    np.testing.assert_array_equal(target.memory[:4].astype(float), [65504, -65504, 65504, 1])


@pytest.mark.parametrize(("compression", "block"), [(10, 16), (1, 4), (3, 24)])
def test_a_table_loses_to_an_array_what_the_formula_says(compression, block):
    """Independent weights; and no array nearby is better."""
    data = DataSpec(13, (3000, 1500), "dictionary", "", "test")
    lost, seen = [], []
    for seed in range(8):
        full = dataclasses.replace(embedding_settings("none", method="full"), seed=seed)
        config = converted_config(full, data, "robe", compression, block)
        config = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, hash_seed=seed))
        source, target = create(full, data, select("cpu")), create(config, data, select("cpu"))
        source.memory[:] = np.random.default_rng(seed).standard_normal(source.memory.size)
        seen.clear()
        found = convert_embedding(source, target, data, lambda *counts: seen.append(counts))
        assert seen == sorted(seen)
        assert seen[-1] == (2 * source.weights, 2 * source.weights)
        lost.append(found["energy_share_lost"])
        assert found["relative_rms_error"] == pytest.approx(math.sqrt(lost[-1]))
    expected = expected_loss(target)
    assert found["expected_energy_share_lost"] == expected
    error = np.std(lost, ddof=1) / math.sqrt(len(lost))
    assert abs(np.mean(lost) - expected) < 5 * error
    assert error < 0.01

    def residual(memory):
        total = 0.0
        for rows, x in table_rows(source, target, data):
            found = np.empty_like(x)
            target.backend.kernels.gather(memory, *rows, target.slot_map, found)
            total += float(((x - found) ** 2).sum(dtype=np.float64))
        return total

    in_order = [x.ravel() for _, x in table_rows(source, target, data)]
    np.testing.assert_array_equal(np.concatenate(in_order), source.memory)
    change = np.float32(0.01) * np.random.default_rng(0).standard_normal(target.weights, np.float32)
    assert residual(target.memory) < min(residual(target.memory + change), residual(target.memory - change))


def test_what_cannot_be_converted_is_refused():
    full, robe = (embedding_settings(method=method) for method in ("full", "robe"))
    for config, to, more, message in (
        (full, "int8", {"compression": 10}, "--compression and --block are for --to robe; --to int8 keeps"),
        (full, "int8", {"block": 8}, "--compression and --block are for --to robe"),
        (full, "fp32", {}, "its embedding is stored in fp32 already"),
        (robe, "robe", {}, "--to robe takes tables .*, not --method robe; train --method robe instead"),
        (full, "robe", {"compression": -1.0}, "--compression must be positive"),
        (embedding_settings(method="none"), "int8", {}, "has no embedding to convert"),
    ):
        with pytest.raises(ConfigError, match=message):
            converted_config(config, NUMBERED, to, more.get("compression"), more.get("block"))
    for method, memory in (("full", "fp16"), ("hashing", "fp16")):
        with pytest.raises(ConfigError, match=f"--memory {memory} .* is for inference; .* `robe convert RUN"):
            require_trainable(embedding_settings(method=method, memory=memory))
    require_trainable(embedding_settings(memory="fp16"))
    with pytest.raises(ConfigError, match="--memory int8 is not for --method mixed_precision"):
        embedding_settings(method="mixed_precision", memory="int8")
    with pytest.raises(ConfigError, match="--megabytes does not count --memory int8 of --method hashing"):
        create(embedding_settings(method="hashing", megabytes=0.01, memory="int8"), HASHED, select("cpu"))


def test_as_many_weights_are_kept_as_megabytes_were():
    config = embedding_settings(megabytes=0.004)
    new = converted_config(config, HASHED, "int4", None, None)
    assert create(new, HASHED, select("cpu")).weights == create(config, HASHED, select("cpu")).weights == 1000


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):
    """Runs converted from the trained ones."""
    runs = tmp_path_factory.mktemp("converted")
    for method, to in (("robe", "int8"), ("full", "int4"), ("mixed_precision", "int8"), ("full", "robe")):
        command_line.main(
            ["convert", str(trained / method), "--to", to, "--out", str(runs / f"{method}-{to}")]
        )
    return runs


@pytest.mark.parametrize("name", ["robe-int8", "full-int4", "mixed_precision-int8", "full-robe"])
def test_a_converted_run_evaluates_and_predicts_as_floats_of_its_weights_would(
    name,
    converted,
    folder,
    trained,
    tmp_path,
    capsys,
):
    made_of, _ = name.split("-")
    loaded = run_folder.load(converted / name, "cpu")
    model, spec = loaded.model, loaded.data
    config, _, position = checkpoint.read_state(checkpoint.latest(converted / name))
    source = run_folder.load(trained / made_of, "cpu").model
    np.testing.assert_array_equal(model.dense_parameters, source.dense_parameters)
    if made_of == "mixed_precision":
        source.embedding.steps = position.step
        source.embedding.flush()
        assert source.embedding.table.tobytes() == model.embedding.memory.tobytes()
    floats = build(
        resolve(dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, memory="fp32"))),
        spec,
        select("cpu"),
    )
    floats.dense_parameters[:] = model.dense_parameters
    floats.embedding.memory[:] = model.embedding.read(0, model.embedding.weights)
    data = folder / ("hash" if made_of == "robe" else "dictionary")
    test = Rows(Manifest.load(data), "test")
    np.testing.assert_array_equal(predict(model, test)[1], predict(floats, test)[1])
    code, out, err = run("evaluate", converted / name, capsys=capsys)
    assert code == 0, err
    summary = json.loads((converted / name / "summary.json").read_text())
    assert json.loads(out)["auc"] == summary["test"]["auc"]
    assert summary["converted_from"] == str(trained / made_of)
    assert summary["test_before"] == json.loads((trained / made_of / "summary.json").read_text())["test"]
    assert summary["embedding_bytes"] == model.embedding.memory.nbytes
    code, _, err = run("predict", converted / name, data, "--out", tmp_path / "p", capsys=capsys)
    assert code == 0, err
    logits = predict(model, test)[1].astype(float)
    found = np.loadtxt(tmp_path / "p")[-2000:][:1000]
    # Nine digits, of products in float32 of batches of other sizes.
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_what_a_conversion_says(trained, tmp_path, capsys):
    code, out, _ = run("convert", trained / "full", "--to", "robe", "--out", tmp_path / "r", capsys=capsys)
    assert code == 0
    lines = out.splitlines()
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    full = json.loads((trained / "full" / "summary.json").read_text())
    assert f"embedding full fp32 {full['embedding_bytes']:,} B -> robe fp32" in lines[0]
    assert lines[1] == (
        f"weights: relative RMS error {summary['relative_rms_error']:.3g}, largest error "
        f"{summary['largest_error']:.3g}"
    )
    assert "share of the energy of the table that is lost: 0.9" in lines[2]
    assert lines[3].startswith("warning: ")
    assert lines[3].endswith("train --method robe instead")
    assert f"AUC {summary['test_before']['auc']:.4f} -> {summary['test']['auc']:.4f}" in lines[4]


@pytest.mark.parametrize("hidden", ["hash", "hash/manifest.json"])
def test_without_its_data_a_run_is_converted_and_not_evaluated(hidden, folder, trained, tmp_path, capsys):
    data = folder / hidden
    data.rename(f"{data}.away")
    try:
        code, out, err = run(
            "convert", trained / "robe", "--to", "int4", "--out", tmp_path / "r", capsys=capsys
        )
    finally:
        (data.parent / f"{data.name}.away").rename(data)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith(f"not evaluated: {folder / 'hash'}")
    code, _, err = run("evaluate", tmp_path / "r", capsys=capsys)
    assert code == 0, err


def test_what_is_refused_leaves_nothing(converted, trained, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "empty").mkdir()
    for source, to, out, message in (
        (tmp_path / "empty", "int8", "a", "no checkpoint here; give the folder of a run"),
        (trained / "full", "int8", "there", "exists and is not an empty folder"),
        (trained / "robe", "robe", "a", "--to robe takes tables"),
        (trained / "robe" / "without_categories", "int8", "a", "error: .*"),
    ):
        code, _, err = run("convert", source, "--to", to, "--out", tmp_path / out, capsys=capsys)
        assert code == 2
        assert err.startswith("error: ")
        assert message in err or message == "error: .*"
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "a").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "there"]
    for name in ("full-int4", "full-robe"):
        code, _, err = run("train", "--resume", converted / name, capsys=capsys)
        assert code == 2
        assert "is for inference" in err
        assert not (converted / name / "metrics.jsonl").exists()
        assert not (converted / name / ".lock").exists()
    code, _, err = run(
        "train", "--method", "hashing", "--memory", "fp16", "--out", tmp_path / "t", capsys=capsys
    )
    assert code == 2
    assert "--memory fp16 of --method hashing is for inference" in err
    assert not (tmp_path / "t").exists()


def test_a_run_appears_with_its_scores(trained, tmp_path, monkeypatch, capsys):
    evaluate, seen = command_line.watched_evaluation, []

    def look(*arguments):
        seen.append((tmp_path / "a").exists())
        return evaluate(*arguments)

    monkeypatch.setattr(command_line, "watched_evaluation", look)
    assert run("convert", trained / "full", "--to", "int8", "--out", tmp_path / "a", capsys=capsys)[0] == 0
    assert seen == [False, False]
    assert {"test", "test_before"} <= json.loads((tmp_path / "a" / "summary.json").read_text()).keys()


def test_a_full_disk_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, err = run("convert", trained / "full", "--to", "int8", "--out", tmp_path / "a", capsys=capsys)
    assert code == 2
    assert "No space left on device" in err
    assert err.rstrip().endswith("make room, then convert again")
    assert list(tmp_path.iterdir()) == []


def test_errors_add_up():
    found = Difference()
    found.add(np.array([3, 0], np.float32), np.array([3, 1], np.float32))
    found.add(np.array([4], np.float32), np.array([2], np.float32))
    assert found.summary() == {
        "relative_rms_error": pytest.approx(math.sqrt(5 / 25)),
        "largest_error": 2,
        "energy_share_lost": pytest.approx(0.2),
    }
