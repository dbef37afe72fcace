"""Weights by the names of the DLRM: PyTorch loads them, `import` makes the same model of them."""

import dataclasses
import sys

import numpy as np
import pytest
from recipes import blocks
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
