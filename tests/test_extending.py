"""docs/extending.md: its code is put where the page says, trained, and held against NumPy."""

import inspect
import re
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
from numba.core.caching import NullCache
from recipes import ROOT, blocks, sections

from robe import checkpoint, model
from robe.backend import select
from robe.checkpoint import Position
from robe.config import (
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    resolve,
)
from robe.convert import convert_embedding
from robe.embeddings import create
from robe.kernels.operations import version
from robe.kernels.workbench import cases, inspection
from robe.model import build
from robe.plan import plan

PAGE = "extending.md"
DATA = DataSpec(3, (40, 5, 12), "dictionary", "", "test")
ROWS = 64


def module_of(path):
    return path.removesuffix(".py").replace("/", ".")


def add_file(monkeypatch, folder, path, code):
    """Import the code as the module that it would be at `path`."""
    assert not (ROOT / path).exists(), "the page's example has a name that is taken"
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    spec = spec_from_file_location(module_of(path), file)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    with pytest.MonkeyPatch.context() as uncached:
        # The cache knows the kernels by the sources in robe/kernels, to which this file does not belong.
        uncached.setattr("numba.core.dispatcher.FunctionCache", lambda function: NullCache())
        spec.loader.exec_module(module)


def add_rows(monkeypatch, path, name, code):
    """Put rows into the dictionary `name` of a file, or into the one that its function `name` returns."""
    module = import_module(module_of(path))
    if isinstance(vars(module)[name], dict):
        for key, value in eval(f"{{{code}}}", vars(module)).items():
            monkeypatch.setitem(vars(module)[name], key, value)
        return
    head, tail = inspect.getsource(vars(module)[name]).split("\n    return {\n")
    changed = dict(vars(module))
    exec(f"{head}\n    return {{\n{code}{tail}", changed)
    for user in (module, inspection):
        monkeypatch.setattr(user, name, changed[name])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The package with all that the page adds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for path, code in blocks(PAGE, "file"):
            add_file(monkeypatch, tmp_path_factory.mktemp("page"), path, code)
        for path, code in blocks(PAGE, "line"):
            name = code.split()[-1]
            exec(code, imported := {})
            monkeypatch.setattr(import_module(module_of(path)), name, imported[name], raising=False)
        for where, code in blocks(PAGE, "row"):
            add_rows(monkeypatch, *where.split(), code)
        yield


def settings(method="full", optimizer="sgd", interaction="dot", **embedding):
    return resolve(
        TrainConfig(
            model=ModelConfig(width=8, bottom=(8,), top=(8,), interaction=interaction),
            embedding=EmbeddingConfig(method, **embedding),
            optimizer=OptimizerConfig(optimizer, 0.1),
            batch=ROWS,
        )
    )


def trained(chosen, steps=30):
    """The model of a configuration, and its mean loss in the first step and the last."""
    made, rng, losses = build(chosen, DATA, select("cpu")), np.random.default_rng(0), []
    dense = rng.random((ROWS, 3), np.float32)
    ids = rng.integers(0, DATA.cardinalities, (ROWS, 3)).astype(np.uint32)
    label = (ids[:, 0] % 4 < 2).astype(np.float32)  # which two ids in turn have in common
    for _ in range(steps):
        losses.append(float(made.step(label, dense, ids, 0.1).mean()))
    return made, losses[0], losses[-1]


def assert_planned_and_saved(made, chosen, tmp_path):
    """Its plan is what is there, and a checkpoint holds all that training changes."""
    planned = plan(chosen, DATA, 1)
    for item, size in made.embedding.bytes().items():
        assert planned["memory"][item] == size, item
    state = made.state()
    assert planned["checkpoint"]["weights and optimizer state"] == sum(a.nbytes for a in state.values())
    folder = checkpoint.save(tmp_path, made, chosen, DATA, Position(30))
    loaded = model.DLRM(chosen, DATA, build(chosen, DATA, made.backend).embedding, made.backend)
    checkpoint.load_weights(folder, loaded)
    for name, array in loaded.state().items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_a_method_is_planned_trained_saved_and_converted(page, tmp_path):
    chosen = settings("paired", "adagrad")
    made, first, last = trained(chosen)
    assert last < 0.95 * first
    assert made.embedding.describe()["embedding_parameters"] == (20 + 3 + 6) * 8
    vectors = np.empty((2, 3, 8), np.float32)
    made.embedding.lookup(np.array([[2, 4, 7], [3, 3, 6]], np.uint32), vectors)
    np.testing.assert_array_equal((vectors[0] == vectors[1]).all(axis=1), [True, False, True])
    assert_planned_and_saved(made, chosen, tmp_path)
    coded = build(settings("paired", "none", memory="int8"), DATA, select("cpu"))
    assert convert_embedding(made.embedding, coded.embedding, DATA)["relative_rms_error"] < 0.02
    with pytest.raises(ConfigError, match="--block 8 is not for --method paired"):
        settings("paired", block=8)


@pytest.mark.kernels
def test_the_kernels_of_an_optimizer_agree_with_numpy_on_all_cases(page, monkeypatch):
    added = {"nesterov": "nesterov", "nesterov_step": "nesterov"}
    assert added.items() <= inspection.OPERATIONS.items()
    monkeypatch.setattr(inspection, "OPERATIONS", added)
    lines = list(inspection.checking())
    assert all(line.startswith("ok ") for line in lines), lines
    assert len(lines) == sum(len(inspection.versions_here(operation)) for operation in added)
    for operation in added:
        call = cases.calls(cases.CASES[0])[operation]
        assert version(operation, "cost")(*call.arguments.values()).bytes_moved > 0


@pytest.mark.kernels
@pytest.mark.parametrize("case", cases.CASES[:6], ids=lambda c: c.name)
def test_a_walk_steps_each_touched_slot_once_and_clears_its_gradient(page, case):
    call = cases.calls(case)["nesterov_step"]
    before, touched = call.arguments, call.arguments["gradient"] != 0
    for name in ("reference", *inspection.versions_here("nesterov_step")):
        found = call.copy()
        version("nesterov_step", name)(*found.values())
        assert not found["gradient"].any()
        velocity = before["velocity"] / 2 + before["gradient"]
        np.testing.assert_array_equal(found["velocity"], np.where(touched, velocity, before["velocity"]))
        stepped = before["out"] - np.float32(0.1) * (velocity / 2 + before["gradient"])
        # A product may be fused with the difference: an ulp of what is subtracted.
        np.testing.assert_allclose(
            found["out"], np.where(touched, stepped, before["out"]), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("method", ["full", "robe"])
def test_an_optimizer_is_planned_trained_and_saved(page, method, tmp_path):
    chosen = settings(method, "nesterov", **({"compression": 2, "block": 4} if method == "robe" else {}))
    made, first, last = trained(chosen)
    assert last < 0.95 * first
    assert {"embedding.velocity", "dense.velocity"} <= made.state().keys()
    assert (made.embedding.velocity != 0).any()
    assert made.embedding.gradient.size == made.embedding.memory.size
    assert made.embedding.accumulator.size == 0
    assert_planned_and_saved(made, chosen, tmp_path)


@pytest.mark.parametrize(
    ("method", "few_bits"), [("robe", {"compression": 2, "memory": "fp16"}), ("mixed_precision", {})]
)
def test_an_optimizer_that_does_not_round_is_refused_where_weights_are_rounded(page, method, few_bits):
    with pytest.raises(ConfigError, match=r"--optimizer nesterov cannot .* choose of sgd, adagrad$"):
        build(settings(method, "nesterov", **few_bits), DATA, select("cpu"))


def test_an_interaction_is_planned_trained_saved_and_predicts_what_it_was_trained_on(page, tmp_path):
    chosen = settings("full", "adagrad", "pooled")
    made, first, last = trained(chosen)
    assert last < 0.95 * first
    assert made.top.parameters[0][0].shape == (8, 8)
    assert_planned_and_saved(made, chosen, tmp_path)
    numbers = plan(chosen, DATA, 1)["memory"]["activations and their gradients"]
    mlps = (3 + 8) + (8 + 8) + (8 + 8) + (8 + 1)
    assert numbers == 4 * 2048 * (mlps + 2 * 4 * 8 + 8 + 2)
    rng = np.random.default_rng(1)
    dense, ids = rng.random((4, 3), np.float32), np.zeros((4, 3), np.uint32)
    kept = made.forward(dense, ids).copy()
    np.testing.assert_array_equal(made.predict(dense, ids), kept)


@pytest.mark.parametrize("method", ["full", "robe"])
def test_the_gradient_of_an_interaction_is_that_of_its_forward_pass(page, method):
    chosen = settings(method, **({"compression": 2, "block": 4} if method == "robe" else {}))
    embedding = create(chosen, DATA, select("cpu"), "float64")
    layer = model.INTERACTIONS["pooled"](embedding, 5, select("cpu"), "float64")
    rng = np.random.default_rng(2)
    ids = rng.integers(0, DATA.cardinalities, (5, 3)).astype(np.uint32)
    first, d_out = rng.normal(size=(2, 5, 8))

    def slopes(array):
        """d (d_out . forward) / d array, by central differences."""
        found = np.empty(array.size)
        for i in range(array.size):
            kept, sides = array.flat[i], []
            for moved in (1e-4, -1e-4):
                array.flat[i] = kept + moved
                layer.first(5)[...] = first
                sides.append(np.vdot(d_out, layer.forward(ids)))
            array.flat[i], found[i] = kept, (sides[0] - sides[1]) / 2e-4
        return found

    expected_first, expected_memory = slopes(first).reshape(5, 8), slopes(embedding.memory)
    assert (expected_memory != 0).sum() > 20
    layer.first(5)[...] = first
    layer.forward(ids)
    before = embedding.memory.copy()
    d_first = layer.backward(d_out, ids, 1.0)  # SGD of rate 1 subtracts the gradient
    np.testing.assert_allclose(d_first, expected_first, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(before - embedding.memory, expected_memory, rtol=1e-7, atol=1e-7)


def test_what_a_change_costs_is_counted():
    texts = sections(PAGE)
    table = texts.pop("What a change costs")
    told = re.findall(r"^\| (An? .*?) \| `(.*?)` \| (\d+) \| (\d+) \| (\d+) \|$", table, re.MULTILINE)
    counted = []
    for title, text in texts.items():
        for path, code in blocks(PAGE, "file", text):
            rows = [(where.split()[0], row) for where, row in blocks(PAGE, "row", text)]
            rows += [(file, row) for files, row in blocks(PAGE, "line", text) for file in files.split()]
            lines = sum(row.count("\n") for _, row in rows)
            counted.append(
                (title, path, *map(str, (code.count("\n"), lines, len({file for file, _ in rows}))))
            )
    assert told == counted
    assert len(told) == 3


def test_the_page_names_files_that_exist():
    text = (ROOT / "docs" / PAGE).read_text()
    added = {path for path, _ in blocks(PAGE, "file")}
    named = set(re.findall(r"`((?:robe|tests|analysis)/[\w/]+\.\w+)`", text)) - added
    assert len(named) > 6
    assert [path for path in named if not (ROOT / path).exists()] == []
    for path, names in {
        "robe/kernels/parts/hashing.py": ("FAMILIES", "block_of", "block_start"),
        "analysis/hash_quality.py": ("FAMILIES",),
    }.items():
        assert path in named
        assert all(re.search(rf"^(def )?{name}\b", (ROOT / path).read_text(), re.MULTILINE) for name in names)
