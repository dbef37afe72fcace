"""Weights by the names of the DLRM: PyTorch loads them, `import` makes the same model of them, and FBGEMM's
formula reads rows as the kernels do."""

import dataclasses
import io
import json
import sys

import numpy as np
import pytest
from conftest import resolved
from recipes import blocks
from safetensors import safe_open
from safetensors.numpy import load
from test_export import HASHED, NUMBERED, filled, settings

from data_pipeline.folders import open_folder
from robe import checkpoint, export_weights, run_folder
from robe.backend import select
from robe.checkpoint import Position
from robe.cli import main
from robe.config import ConfigError, DataSpec
from robe.import_weights import imported
from robe.model import build

TABLE = {"user": ["u1", "new", "u3"], "price": [3, 4, 5], "tags": ["t0:2|t1:3", "", "t2:1"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A log, prepared with raw ids and with a dictionary; and with bags."""
    folder = tmp_path_factory.mktemp("weights")
    tags = ("", "t0:1", "t1:0.5|t2:2")
    rows = "".join(f"{i % 2},u{i % 7},{i},{tags[i % 3]}\n" for i in range(60))
    (folder / "log.csv").write_text("click,user,price,tags\n" + rows)
    schema = "label='click'\ndense=['price']\n[categorical]\nuser='string'\ntags='string'\n"
    (folder / "own.toml").write_text(schema)
    (folder / "bags.toml").write_text(schema + "[bags]\ntags={weights=true}\n")
    for name, file, ids in (
        ("hash", "own", "hash"),
        ("counted", "own", "dictionary"),
        ("bags", "bags", "hash"),
    ):
        words = ["--schema", f"{folder}/{file}.toml", "--ids", ids, "--out", f"{folder}/{name}"]
        main(["prepare", f"{folder}/log.csv", *words])
    return folder


def begun(folder, run, **changes):
    """A run with weights that signs show in."""
    manifest = open_folder(folder)
    config, data = settings(**changes), DataSpec.of(manifest)
    run_folder.create(run, config, manifest, baseline=False)
    model = build(config, data, select("reference"))
    filled(model.embedding, np.random.default_rng(0))
    checkpoint.save(run, model, config, data, Position())
    return run


def exported(run, to, file, capsys):
    """(exit code, what it says) of the command."""
    capsys.readouterr()
    try:
        main(["export", str(run), "--to", to, "--out", str(file)])
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hash", {"weights": 200, "hash_seed": 5}),
        ("counted", {"weights": 200, "hash": "affine", "sign": False, "block": 4, "memory": "int8"}),
        ("counted", {"method": "full", "memory": "fp16", "interaction": "none"}),
        ("bags", {"weights": 200}),
    ],
)
def test_a_state_dict_comes_back_as_the_same_model(name, changes, data, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    run, file, new = begun(data / name, tmp_path / "run", **changes), tmp_path / "model.pt", tmp_path / "new"
    code, said = exported(run, "torch", file, capsys)
    tensors = torch.load(file, weights_only=True)
    assert (code, said.split(": ")[1]) == (0, f"{file.stat().st_size:,} B, {len(tensors)} tensors\n")
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    main(["import", str(file), "--data", str(data / name), "--out", str(new)])
    expected, found = (run_folder.load(each, "cpu").predict_table(TABLE) for each in (run, new))
    assert len(set(expected)) == 3
    np.testing.assert_array_equal(found, expected)


def test_modules_of_pytorch_give_the_probabilities_of_a_run(data, tmp_path, monkeypatch, capsys):
    """As docs/serving.md loads them."""
    torch = pytest.importorskip("torch")
    run = begun(data / "hash", tmp_path / "run", weights=200)
    monkeypatch.chdir(tmp_path)
    assert exported(run, "torch", "ratings.pt", capsys)[0] == 0
    model = run_folder.load(run, "cpu")
    dense, ids = model.read_table(TABLE)
    names = {"dense": torch.from_numpy(dense), "ids": torch.from_numpy(ids.astype(np.int64))}
    exec(blocks("serving.md", "torch")[0][1], names)
    # float32 sums of some tens of numbers in another order.
    np.testing.assert_allclose(names["probability"].detach(), model.predict_table(TABLE), rtol=0, atol=1e-6)


def test_a_correction_of_logits_is_in_the_last_bias():
    data = DataSpec(0, (1000, 10, 300), "hash", "", "test", kept_negatives=0.125)
    config = settings(weights=500)
    model = build(config, data, select("reference"))
    tensors, last = export_weights.dense_tensors(model, config), model.parameters["top.2.bias"]
    np.testing.assert_allclose(tensors["top_l.4.bias"], last + np.log(0.125), rtol=1e-6)


def state_dict(changes, data):
    config = settings(**changes)
    return export_weights.state_dict(build(config, data, select("reference")), config, data)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"method": "hashing", "compression": 3},
            "--method hashing`; it is for robe, full and mixed_precision",
        ),
        ({"method": "full", "interaction": "cross"}, "--interaction cross`; --to onnx writes them"),
    ],
)
def test_what_has_no_names_is_refused(changes, why):
    with pytest.raises(ConfigError, match=why):
        state_dict(changes, NUMBERED)


def test_an_array_is_imported_for_the_data_it_was_written_for(data):
    tensors, more = (
        state_dict({"weights": 300}, HASHED),
        dataclasses.replace(HASHED, cardinalities=(2000, 10, 5)),
    )
    imported(tensors, more)  # as many raw values as there may be
    counted = state_dict({"weights": 300}, NUMBERED)
    pooled = dataclasses.replace(HASHED, pooling=("sum",) * 3)
    damaged = tensors | {"robe_settings": tensors["robe_settings"][:-1]}
    for given, spec, why in (
        (tensors, NUMBERED, "robe_settings: hashed is True, but False for these data"),
        (tensors, pooled, "robe_settings: mode is None, but "),
        (
            counted,
            dataclasses.replace(NUMBERED, cardinalities=(1000, 10, 301)),
            "robe_settings: cardinalities is",
        ),
        (damaged, HASHED, "robe_settings: not as `robe export` writes them"),
        (tensors | {"hashed_weight": np.zeros(299, "f")}, HASHED, "robe_settings: weights is 300, but 299"),
    ):
        with pytest.raises(ConfigError, match=why):
            imported(given, spec)
    with pytest.raises(ConfigError, match="--block and --hash-seed are for files that lack robe_settings"):
        imported(tensors, HASHED, block=4)


def test_who_lacks_pytorch_is_told_the_extra(data, tmp_path, monkeypatch, capsys):
    run = begun(data / "hash", tmp_path / "run", weights=200)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, said = exported(run, "torch", tmp_path / "model.pt", capsys)
    assert code == 2
    assert said.startswith("error: --to torch needs torch: pip install")
    assert said.rstrip().endswith("[torch]'")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def dequantised(rows, bits):
    """As FusedNBitRowwiseQuantizedSBHalfToFloatOrHalfRef of FBGEMM's src/QuantUtils.cc: codes, the first in
    the lowest bits of a byte, then scale and bias as halves."""
    per_byte = 8 // bits
    columns = (rows.shape[1] - 4) * per_byte
    scale, bias = rows[:, -4:].copy().view(np.float16).astype(np.float32).T
    column = np.arange(columns)
    codes = rows[:, column // per_byte] >> (column % per_byte * bits).astype(np.uint8) & (1 << bits) - 1
    return scale[:, None] * codes.astype(np.float32) + bias[:, None]


def tables(model, config, data):
    """(tensors of the file, the rows of all tables behind one another)."""
    file = io.BytesIO()
    count = export_weights.to_fbgemm(model, config, data, {}, file)
    tensors = load(file.getvalue())
    assert count == len(tensors)
    assert [tensors[f"emb_l.{f}.weight"].shape[0] for f in range(3)] == list(data.cardinalities)
    return tensors, np.concatenate([tensors[f"emb_l.{f}.weight"] for f in range(3)])


@pytest.mark.parametrize(("bits", "width"), [(8, 13), (4, 16), (2, 12)])
def test_rows_are_read_by_the_formula_of_fbgemm(bits, width):
    config = settings(f"int{bits}", width, method="full")
    model = build(config, NUMBERED, select("reference"))
    filled(model.embedding, np.random.default_rng(0))
    tensors, rows = tables(model, config, NUMBERED)
    assert (rows.dtype, rows.shape[1]) == (np.uint8, width * bits // 8 + 4)
    read = model.embedding.read(0, model.embedding.weights).reshape(-1, width)
    np.testing.assert_array_equal(dequantised(rows, bits), read)
    dense = export_weights.dense_tensors(model, config)
    assert tensors.keys() - dense.keys() == {f"emb_l.{f}.weight" for f in range(3)}
    for name, array in dense.items():
        np.testing.assert_array_equal(tensors[name], array)


def test_rows_of_a_cache_are_rounded_into_the_table(rng):
    settings = {"method": "mixed_precision", "bits": 4, "cache": 0.1}
    config = resolved({"width": 16}, settings, {"optimizer": "adagrad", "lr": 0.1}, batch=8)
    model = build(config, NUMBERED, select("reference"))
    ids = rng.integers(0, NUMBERED.cardinalities, (8, 3)).astype(np.uint32)
    model.embedding.update(ids, rng.standard_normal((8, 3, 16), np.float32), 0.1)
    _, rows = tables(model, config, NUMBERED)
    read, found = model.embedding.read(0, model.embedding.weights).reshape(-1, 16), dequantised(rows, 4)
    cached = np.unique(ids + model.embedding.base.astype(np.uint32))
    others = np.setdiff1d(np.arange(len(rows)), cached)
    np.testing.assert_array_equal(found[others], read[others])
    assert 0 < abs(found[cached] - read[cached]).max()
    scale = rows[:, -4:-2].copy().view(np.float16)[cached]
    assert (abs(found[cached] - read[cached]) < scale).all()


@pytest.mark.parametrize(
    ("bits", "operation"), [(4, "embedding_bag_4bit_unpack"), (2, "embedding_bag_2bit_unpack")]
)
def test_pytorch_unpacks_the_rows(bits, operation):
    """Which has FBGEMM's formats for 4 and 2 bits."""
    torch = pytest.importorskip("torch")
    config = settings(f"int{bits}", 16, method="full")
    model = build(config, NUMBERED, select("reference"))
    filled(model.embedding, np.random.default_rng(0))
    found = getattr(torch.ops.quantized, operation)(torch.from_numpy(tables(model, config, NUMBERED)[1]))
    expected = model.embedding.read(0, model.embedding.weights).reshape(-1, 16)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # a fused multiply and add rounds once


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fbgemm_looks_up_what_the_run_does(bits):
    """As docs/serving.md hands the rows over."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")
    model = build(config := settings(f"int{bits}", 16, method="full"), NUMBERED, select("reference"))
    filled(model.embedding, np.random.default_rng(0))
    tensors = tables(model, config, NUMBERED)[0]
    names = {"tensors": {name: torch.from_numpy(each) for name, each in tensors.items()}}
    names |= {"features": 3, "D": 16, "bits": bits}
    exec(blocks("serving.md", "fbgemm")[0][1], names)
    ids = np.stack([np.arange(5) % n for n in NUMBERED.cardinalities])
    found = names["lookup"](torch.from_numpy(ids.ravel()).int(), torch.arange(ids.size + 1).int())
    expected = np.empty((5, 3, 16), np.float32)
    model.embedding.lookup(ids.T.astype(np.uint32), expected)
    np.testing.assert_array_equal(found.reshape(5, 3, 16), expected)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weights": 300}, "and robe has no row for each id; --to onnx and --to torch write its array"),
        ({"method": "quotient_remainder", "compression": 3}, "and quotient_remainder has no row for each id"),
        (
            {"method": "full"},
            "a row of this run has 16 weights of 32; make them with `robe convert RUN --to int8",
        ),
        ({"method": "full", "memory": "int3"}, "has 16 weights of 3;"),
        ({"method": "full", "memory": "int4", "width": 13}, "has 13 weights of 4;"),
        ({"method": "mixed_precision", "bits": 16}, "has 16 weights of 16;"),
    ],
)
def test_what_has_no_fused_rows_is_refused(changes, why):
    config = settings(**changes)
    with pytest.raises(ConfigError, match=why):
        export_weights.fused_rows(build(config, NUMBERED, select("reference")), config)


def test_the_command_tells_of_what_the_rows_are(data, tmp_path, capsys):
    run = begun(data / "counted", tmp_path / "run", method="full", memory="int8")
    code, said = exported(run, "fbgemm", tmp_path / "tables.safetensors", capsys)
    with safe_open(tmp_path / "tables.safetensors", "numpy") as file:
        facts, names = file.metadata(), list(file.keys())
    assert (code, said.rpartition(", ")[2]) == (0, f"{len(names)} tensors\n")
    assert (facts["memory"], json.loads(facts["categorical"])) == ("int8", ["user", "tags"])
