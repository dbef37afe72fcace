"""Models as ONNX graphs: ONNX Runtime reads the weights that the kernels read, and computes the model's own
probabilities."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import resolved
from recipes import blocks

from data_pipeline.folders import open_folder
from robe import checkpoint, export, run_folder
from robe.backend import select
from robe.bags import Bags
from robe.checkpoint import Position
from robe.cli import main
from robe.config import ConfigError, DataSpec
from robe.embeddings import create
from robe.estimator import predict
from robe.model import build

HASHED = DataSpec(4, (1000, 10, 300), "hash", "", "test")
NUMBERED = DataSpec(4, (1000, 10, 300), "dictionary", "", "test")
MEMORY = ("fp32", "fp16", "int8", "int4", "int3", "int2", "int1")
EDGES = np.array([[0, 0, 0], [2**32 - 1] * 3, [2**31, 1, 2**31 - 1]])


def settings(memory="fp32", width=16, **others):
    """The configuration of a model that is stored in that memory and not trained."""
    model = {
        name: others.pop(name) for name in ("interaction", "cross_layers", "cross_rank") if name in others
    }
    model |= {"width": width, "bottom": (5,), "top": (7, 6)}
    return resolved(model, {"memory": memory, **others}, {"optimizer": "none"})


def filled(embedding, rng):
    """The embedding, with weights that signs and rounding show in."""
    embedding.write(0, rng.standard_normal(embedding.weights, np.float32))
    return embedding


def ids_of(data, rng, rows=30):
    most = [2**32] * 3 if data.dialect == "hash" else data.cardinalities
    return np.concatenate([EDGES % most, rng.integers(0, most, (rows, 3))])


def computed(graph, found, **given):
    """What a value of a graph becomes, of arrays by the names of its inputs."""
    helper = onnx.helper
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in given.items()
    ]
    outputs = [helper.make_tensor_value_info(found.name, graph.types.FLOAT, [None] * 3)]
    body = helper.make_graph(graph.nodes, "look-up", inputs, outputs, graph.constants)
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", export.OPSET)], ir_version=export.IR
    )
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)[0]


def looked_up(embedding, ids):
    """Vectors (B, F, D) from the nodes of a look-up alone."""
    graph = export.Graph(onnx)
    return computed(graph, export.look_up(graph, embedding, export.Value(graph, "ids")), ids=ids)


def require_same_vectors(config, data, rng):
    embedding = filled(create(config, data, select("reference")), rng)
    ids = ids_of(data, rng)
    expected = np.empty((len(ids), 3, embedding.width), np.float32)
    embedding.lookup(ids.astype(np.uint32), expected)
    np.testing.assert_array_equal(looked_up(embedding, ids), expected)


# Each length of a block, and each width, with several memories; the last ones do not divide one another.
SHAPES = [*itertools.product((1, 8, 16, 32, 128), (16, 64, 128)), (5, 12), (96, 80)]


@pytest.mark.parametrize(
    "family", [{}, {"sign": False}, {"hash": "affine", "sign": False}, {"hash": "affine"}]
)
def test_an_array_is_read_where_it_is_read_by_the_kernels(family, rng):
    """To the bit: what is added up for a weight is added up in the same order."""
    for (block, width), memory in zip(SHAPES, itertools.cycle(MEMORY)):
        require_same_vectors(settings(memory, width, weights=777, block=block, **family), HASHED, rng)


@pytest.mark.parametrize("memory", MEMORY)
def test_all_memory_of_an_array_that_blocks_wrap_around_in(memory, rng):
    require_same_vectors(settings(memory, 32, weights=150, block=128), HASHED, rng)
    require_same_vectors(settings(memory, 12, weights=150, block=150), HASHED, rng)


@pytest.mark.parametrize("method", ["full", "hashing", "frequency", "hot"])
def test_tables_are_read_row_by_row(method, rng):
    size = {} if method == "full" else {"compression": 3}
    for memory, width in zip(MEMORY, (16, 8, 13, 12, 9, 10, 11), strict=True):  # few end with a byte
        require_same_vectors(settings(memory, width, method=method, **size), NUMBERED, rng)


def bags_of(data, rng, rows=30):
    """Bags of 0 to 3 ids, none in the first and the last row, with weights but where the maximum counts."""
    most = np.array([2**32] * 3 if data.dialect == "hash" else data.cardinalities)
    lengths = rng.integers(0, 4, (rows, 3))
    lengths[[0, -1]] = 0
    owners = np.tile(np.arange(3), rows).repeat(lengths.reshape(-1))
    values = rng.integers(0, most[owners])
    values[:20] = most[owners[:20]] - 1
    by_max = np.array(data.pooling)[owners] == "max"
    weights = np.where(by_max, 1, rng.standard_normal(len(values))).astype(np.float32)
    return Bags(values, np.append(0, lengths.cumsum()), weights)


@pytest.mark.parametrize(
    ("pooling", "data", "changes"),
    [
        (("sum", "max", "mean"), HASHED, {"weights": 777, "memory": "int4"}),
        (("mean", "sum", "sum"), NUMBERED, {"weights": 777, "hash": "affine", "memory": "fp16"}),
        (("max", "max", "max"), NUMBERED, {"method": "full"}),
        (("mean", "max", "sum"), NUMBERED, {"method": "hashing", "compression": 3, "memory": "int8"}),
        (("max", "mean", "mean"), NUMBERED, {"method": "frequency", "compression": 3}),
        (("sum", "max", "mean"), NUMBERED, {"method": "hot", "compression": 3}),
    ],
)
def test_bags_are_pooled_as_by_the_kernels(pooling, data, changes, rng):
    data = dataclasses.replace(data, pooling=pooling)
    model = build(settings(**changes), data, select("reference"))
    filled(model.embedding, rng)
    bags = bags_of(data, rng)
    expected = model.interaction.look_up(bags._replace(values=bags.values.astype(np.uint32)))[:, 1:]
    graph = export.Graph(onnx)
    inputs = (export.Value(graph, name) for name in bags._fields)
    found = computed(graph, export.pooled(graph, model.embedding, pooling, *inputs), **bags._asdict())
    assert not found[[0, -1]].any()
    # Sums of up to three float32, which other threads may add up in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_graph_of_bags_gives_the_probabilities_of_its_model(rng):
    data, config = dataclasses.replace(HASHED, pooling=("sum", "max", "mean")), settings(weights=999)
    model = build(config, data, select("reference"))
    filled(model.embedding, rng)
    session = onnxruntime.InferenceSession(export.to_onnx(model, config, data, {})[0])
    for rows in (30, 1, 0):
        bags = (
            bags_of(data, rng, rows) if rows else Bags(np.empty(0, int), np.zeros(1, int), np.empty(0, "f"))
        )
        dense = rng.standard_normal((rows, data.dense), np.float32)
        for weights in (bags.weights, None):
            given = bags._replace(weights=np.empty(0, np.float32) if weights is None else weights)
            (found,) = session.run(None, {"dense": dense, **given._asdict()})
            expected = predict(model, data, dense, bags._replace(weights=weights))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert found.shape == (0,)


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (HASHED, {"weights": 999}),
        (HASHED, {"weights": 999, "memory": "int4", "interaction": "none"}),
        (NUMBERED, {"weights": 999, "memory": "fp16", "hash": "affine", "interaction": "cross"}),
        (NUMBERED, {"method": "full", "memory": "int3"}),
        (DataSpec(0, (1000, 10, 300), "hash", "", "test", kept_negatives=0.125), {"weights": 999}),
    ],
)
def test_a_graph_gives_the_probabilities_of_its_model(data, changes, rng):
    config = settings(**changes)
    model = build(config, data, select("reference"))
    filled(model.embedding, rng)
    content, _ = export.to_onnx(model, config, data, {})
    ids, session = ids_of(data, rng), onnxruntime.InferenceSession(content)
    dense = rng.standard_normal((len(ids), data.dense), np.float32)
    expected = predict(model, data, dense, ids)
    assert expected.std() > 0.02
    for rows in (slice(None), slice(1), slice(0)):
        (found,) = session.run(None, {"dense": dense[rows], "ids": ids[rows]})
        # Products of float32 of some tens of terms, in another order.
        np.testing.assert_allclose(found, expected[rows], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run as a training begins it."""
    folder = tmp_path_factory.mktemp("export")
    rows = "".join(f"{i % 2},u{i % 7},{i},c{i % 3}\n" for i in range(60))
    (folder / "log.csv").write_text("click,user,price,city\n" + rows)
    (folder / "own.toml").write_text(
        "label='click'\ndense=['price']\n[categorical]\nuser='string'\ncity='string'\n"
    )
    main(["prepare", f"{folder}/log.csv", "--schema", f"{folder}/own.toml", "--out", f"{folder}/data"])
    return begun(folder, "run")


def begun(folder, name, **others):
    """A run with weights that signs show in."""
    manifest = open_folder(folder / "data")
    config, data = resolved({"width": 16}, {"weights": 200}, **others), DataSpec.of(manifest)
    run_folder.create(folder / name, config, manifest, baseline=False)
    model = build(config, data, select("reference"))
    filled(model.embedding, np.random.default_rng(0))
    checkpoint.save(folder / name, model, config, data, Position())
    return folder / name


def exported(run, out, capsys):
    """(exit code, what it says) of the command."""
    capsys.readouterr()
    try:
        main(["export", str(run), "--to", "onnx", "--out", str(out)])
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, "".join(capsys.readouterr())


def test_the_command_writes_a_file_of_standard_operators(run, tmp_path, capsys):
    code, said = exported(run, tmp_path / "model.onnx", capsys)
    assert code == 0
    size = (tmp_path / "model.onnx").stat().st_size
    assert f"model.onnx: {size:,} B, " in said
    assert float(said.rpartition(" ")[2]) < 1e-6
    model = onnx.load(tmp_path / "model.onnx")
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    told = {one.key: one.value for one in model.metadata_props}
    assert (told["dialect"], told["method"], told["memory"]) == ("hash", "robe", "fp32")
    assert json.loads(told["dense"]) == ["price"]
    assert json.loads(told["categorical"]) == ["user", "city"]
    assert json.loads(told["cardinalities"]) == [7, 3]


def test_a_table_of_a_log_has_the_probabilities_of_predict_table(run, tmp_path, capsys):
    """As docs/serving.md reads the rows."""
    assert exported(run, tmp_path / "model.onnx", capsys)[0] == 0
    model, table = run_folder.load(run, "cpu"), {"user": ["u1", "new"], "price": [3, 4], "city": ["c0", "c9"]}
    dense, ids = model.read_table(table)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(["probability"], {"dense": dense, "ids": ids.astype(np.int64)})
    np.testing.assert_allclose(found, model.predict_table(table), rtol=0, atol=1e-6)


def test_a_log_of_bags_has_the_probabilities_of_predict_table(tmp_path, capsys):
    tags = ("", "t0:1", "t1:0.5|t2:2")
    rows = "".join(f"{i % 2},u{i % 7},{i},{tags[i % 3]}\n" for i in range(60))
    (tmp_path / "log.csv").write_text("click,user,price,tags\n" + rows)
    (tmp_path / "own.toml").write_text(
        "label='click'\ndense=['price']\n[categorical]\nuser='string'\ntags='string'\n"
        "[bags]\ntags={pooling='mean',weights=true}\n"
    )
    words = ["--schema", f"{tmp_path}/own.toml", "--out", f"{tmp_path}/data"]
    main(["prepare", f"{tmp_path}/log.csv", *words])
    run, file = begun(tmp_path, "run"), tmp_path / "model.onnx"
    code, said = exported(run, file, capsys)
    assert (code, float(said.rpartition(" ")[2]) < 1e-6) == (0, True)
    told = {one.key: json.loads(one.value) for one in onnx.load(file).metadata_props if one.key == "pooling"}
    assert told == {"pooling": ["sum", "mean"]}
    model, table = (
        run_folder.load(run, "cpu"),
        {"user": ["u1", "u2"], "price": [3, 4], "tags": ["t0:2|t1:3", ""]},
    )
    names = {"np": np, "onnxruntime": onnxruntime, "model": model, "table": table, "file": file}
    exec(blocks("serving.md", "bags")[0][1], names)
    np.testing.assert_allclose(names["probability"], model.predict_table(table), rtol=0, atol=1e-6)


def test_a_run_in_another_precision_is_exported_in_float32(run, tmp_path, capsys):
    begun(run.parent, "short", precision="bf16")
    assert exported(run.parent / "short", tmp_path / "short.onnx", capsys)[0] == 0
    assert exported(run, tmp_path / "model.onnx", capsys)[0] == 0
    short, full = (onnx.load(tmp_path / name).graph for name in ("short.onnx", "model.onnx"))
    assert short.SerializeToString() == full.SerializeToString()


def test_a_graph_that_computes_something_else_gets_no_name(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "sign_bits", lambda word, position: word)
    code, said = exported(run, tmp_path / "model.onnx", capsys)
    assert code == 1
    assert "the graph gives other probabilities than the model" in said
    assert list(tmp_path.iterdir()) == []


def test_no_probability_is_so_certain_that_any_would_do(tmp_path, monkeypatch, rng):
    model = build(settings(weights=500), HASHED, select("reference"))
    filled(model.embedding, rng)
    model.embedding.memory *= 30
    monkeypatch.setattr(export, "sign_bits", lambda word, position: word)
    (tmp_path / "model.onnx").write_bytes(export.to_onnx(model, settings(weights=500), HASHED, {})[0])
    with pytest.raises(export.ExportError, match="gives other probabilities"):
        export.difference(tmp_path / "model.onnx", model, HASHED)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_who_lacks_the_extra_is_told_its_name(package, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    code, said = exported(run, tmp_path / "model.onnx", capsys)
    assert code == 2
    assert said.startswith(f"error: --to onnx needs {package}: pip install")
    assert said.rstrip().endswith("[onnx]'")


def test_what_cannot_be_exported_is_named(run, tmp_path, monkeypatch, capsys):
    for data, changes in (
        (NUMBERED, {"method": "compositional", "compression": 3}),
        (NUMBERED, {"method": "quotient_remainder", "compression": 3}),
        (NUMBERED, {"method": "mixed_precision"}),
        (NUMBERED, {"method": "none"}),
        (HASHED, {"method": "hot", "compression": 3}),  # whose rows a sketch gives away
    ):
        config = settings(**changes)
        with pytest.raises(ConfigError, match=f"--method {changes['method']}`; it is for robe, full"):
            export.exportable(build(config, data, select("reference")), config)
    monkeypatch.setattr(export, "LARGEST_FILE", 1000)
    code, said = exported(run, tmp_path / "model.onnx", capsys)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "an ONNX file has less than 2 GB" in said
