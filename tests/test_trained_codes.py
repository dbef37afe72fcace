"""Training in codes: which groups are quantised again, what gradients change, and what is kept of it."""

import dataclasses

import numba
import numpy as np
import pytest
from conftest import each_version
from test_convert import METHODS
from test_embeddings import HASHED, NUMBERED
from test_embeddings import settings as embedding_settings
from test_train import DATA, rows, train
from test_train import config as train_config

from robe import checkpoint, metrics
from robe.backend import select
from robe.config import ConfigError, require_trainable
from robe.convert import convert, converted_config
from robe.embeddings import create
from robe.kernels.operations import version
from robe.kernels.parts.groups import GROUP, expanded, form_of
from robe.kernels.parts.half import rounding_key
from robe.kernels.parts.hashing import slots_reference
from robe.kernels.quantise import quantise_reference
from robe.kernels.workbench.cases import CASES, calls
from robe.model import build
from robe.plan import plan
from robe.report import plan_text
from robe.train import predict


def requantised(embedding):
    """The codes of all master weights of an ArrayEmbedding."""
    form, memory = form_of(embedding.memory, embedding.slot_map), np.zeros_like(embedding.memory)
    numbers = np.arange(len(memory), dtype=np.uint32)
    quantise_reference(embedding.master, numbers, rounding_key(0, 0), form, memory)
    return memory


@pytest.mark.kernels
@each_version("quantise_touched")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_touched_groups_alone_are_quantised(case, run):
    arguments = calls(case)["quantise_touched"].copy()
    weights, memory = arguments["weights"], arguments["memory"]
    expected, form = np.zeros_like(memory), form_of(memory, case.slot_map())
    quantise_reference(weights, np.arange(len(memory), dtype=np.uint32), rounding_key(0, 0), form, expected)
    slots, _ = slots_reference(case.slot_map(), case.base() + case.draw_ids().astype(np.uint64))
    touched = np.isin(np.arange(len(memory)), slots // weights.shape[1])
    expected[~touched] = 0
    run(*arguments.values())
    np.testing.assert_array_equal(memory, expected)


def test_codes_do_not_depend_on_the_number_of_threads():
    """Of more groups than are remembered as seen, many of them named again and again."""
    case = next(c for c in CASES if c.memory_type == "int3")._replace(rows=3000, memory=2_000_000)
    call = calls(case)["quantise_touched"]
    assert len(call.arguments["weights"]) > 2**14
    expected, available = call.copy(), numba.get_num_threads()
    version("quantise_touched", "reference")(*expected.values())
    try:
        for threads in range(1, available + 1):
            numba.set_num_threads(threads)
            found = call.copy()
            version("quantise_touched", "cpu")(*found.values())
            np.testing.assert_array_equal(found["memory"], expected["memory"])
    finally:
        numba.set_num_threads(available)


@pytest.mark.parametrize("memory", ["int8", "int3", "int1"])
@pytest.mark.parametrize("method", ["robe", "full", "quotient_remainder"])
def test_a_step_moves_the_master_weights_down_the_gradient_by_the_codes(method, memory, rng):
    """With a rate of 1, SGD subtracts the derivative of the loss by what the codes stand for: by central
    differences of a model in float64, whose weights are these numbers."""
    config = embedding_settings("sgd", method=method, memory=memory, **METHODS[method])
    model = build(config, NUMBERED, select("cpu"))
    plain = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, memory="fp32"))
    exact = build(plain, NUMBERED, select("cpu"), np.float64)
    exact.dense_parameters[:] = model.dense_parameters
    ids = rng.integers(0, NUMBERED.cardinalities, (20, 3)).astype(np.uint32)
    dense, label = rng.random((20, 13)), (rng.random(20) < 0.5).astype(np.float64)
    parts = list(zip(model.embedding.parts.values(), exact.embedding.parts.values(), strict=True))
    before = []
    for part, floats in parts:
        part.master += rng.standard_normal(part.master.shape).astype(np.float32) * np.float32(0.1)
        part._fill_up()
        part.memory[:] = requantised(part)
        floats.memory[:] = part.read(0, part.weights)
        before.append(part.stepped.copy())

    def loss():
        logits = exact.forward(dense, ids)
        exact.backend.kernels.binary_cross_entropy(logits, label, exact.losses[:20], exact.d_logits[:20])
        return exact.losses[:20].mean()

    model.step(label.astype(np.float32), dense.astype(np.float32), ids, 1.0)
    for (part, floats), old in zip(parts, before, strict=True):
        moved = old.astype(np.float64) - part.stepped
        assert np.count_nonzero(moved) > 20
        for slot in np.argsort(-abs(moved))[:6]:
            losses = []
            for step in (1e-5, -1e-5):
                floats.memory[slot] += step
                losses.append(loss())
                floats.memory[slot] -= step
            assert moved[slot] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-3)
        np.testing.assert_array_equal(part.memory, requantised(part))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("memory", ["int4", "int2"])
def test_after_every_step_the_codes_are_those_of_the_master_weights(memory, optimizer, method, rng):
    config = embedding_settings(optimizer, method=method, memory=memory, **METHODS[method])
    embedding = create(config, NUMBERED, select("cpu"))
    for _ in range(3):
        before = [part.memory.copy() for part in embedding.parts.values()]
        ids = rng.integers(0, NUMBERED.cardinalities, (20, 3)).astype(np.uint32)
        embedding.update(ids, rng.standard_normal((20, 3, 8)).astype(np.float32), 0.1)
        for part, codes in zip(embedding.parts.values(), before, strict=True):
            np.testing.assert_array_equal(part.memory, requantised(part))
            assert (part.memory != codes).any()
    out = np.empty((20, 3, 8), np.float32)
    embedding.lookup(ids, out)
    if method == "full":
        read = expanded(part.memory, slice(None), form_of(part.memory, part.slot_map))
        np.testing.assert_array_equal(out, read[ids + np.array([0, 1000, 1010])])


@pytest.mark.kernels
def test_all_backends_train_the_same_codes(backend, reference, rng):
    """Of integers, whose sums are exact in any order."""
    ids = rng.integers(0, NUMBERED.cardinalities, (2, 3)).astype(np.uint32)
    gradient = rng.integers(-4, 5, (2, 3, 8)).astype(np.float32)
    config = embedding_settings("sgd", weights=203, memory="int3")
    one, other = (create(config, NUMBERED, each) for each in (backend, reference))
    before = one.memory.copy()
    for each in (one, other):
        each.update(ids, gradient, 0.125)
    np.testing.assert_array_equal(one.master, other.master)
    np.testing.assert_array_equal(one.memory, other.memory)
    assert (one.memory != before).any()
    with_adagrad = create(embedding_settings("adagrad", weights=203, memory="int3"), NUMBERED, backend)
    with_adagrad.update(ids, gradient, 0.125)
    np.testing.assert_array_equal(with_adagrad.memory, requantised(with_adagrad))


@pytest.mark.parametrize("method", METHODS)
def test_bytes_in_training_and_of_what_is_kept(method):
    """The plan is what is allocated; what is converted to the same bits takes the bytes of its codes."""
    config = embedding_settings("adagrad", method=method, memory="int3", **METHODS[method])
    model = build(config, NUMBERED, select("cpu"))
    planned, parts = plan(config, NUMBERED, 1), model.embedding.parts.values()
    for item, size in model.embedding.bytes().items():
        assert planned["memory"][item] == size, item
    assert planned["checkpoint"]["weights and optimizer state"] == sum(
        a.nbytes for a in model.state().values()
    )
    stored = sum(part.memory.nbytes for part in parts)
    assert planned["memory"]["embedding weights"] == stored
    stored += planned["memory"].get("embedding index", 0)
    assert stored == model.embedding.describe()["embedding_bytes"]
    assert planned["memory"]["embedding master weights"] == sum(part.master.nbytes for part in parts)
    assert planned["memory"]["embedding optimizer state"] == 4 * sum(part.weights for part in parts)
    in_training = sum(size for item, size in model.embedding.bytes().items())
    assert (
        f"the embedding takes {in_training:,} B in training; `convert --to int3` keeps the {stored:,} B"
    ) in plan_text(planned, config, NUMBERED)
    new = converted_config(config, NUMBERED, "int3", None, None)
    kept = plan(new, NUMBERED, 1)
    assert kept["memory"]["embedding weights"] + kept["memory"].get("embedding index", 0) == stored
    assert "embedding master weights" not in kept["memory"]
    assert kept["memory"]["embedding optimizer state"] == kept["memory"]["embedding gradient scratch"] == 0


def test_a_robe_array_is_filled_up_as_by_converting():
    """The last group holds copies of the last weight, which are not trained by themselves."""
    embedding = create(embedding_settings(weights=1001, memory="int8"), HASHED, select("cpu"))
    assert embedding.master.shape == (16, int(GROUP))
    assert (embedding.master.ravel()[1001:] == embedding.master.ravel()[1000]).all()
    floats = create(embedding_settings(weights=1001), HASHED, select("cpu"))
    np.testing.assert_array_equal(embedding.stepped, floats.memory)
    for step in range(200):  # until the last weight is touched
        embedding.update(np.full((1, 3), step, np.uint32), np.ones((1, 3, 8), np.float32), 0.1)
    assert embedding.stepped[-1] != floats.memory[-1]
    assert (embedding.master.ravel()[1001:] == embedding.stepped[-1]).all()
    np.testing.assert_array_equal(embedding.memory, requantised(embedding))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_what_training_evaluates_is_what_the_saved_codes_give(optimizer, tmp_path):
    """Bit for bit: the checkpoint of the training, and the codes alone that are kept of it."""
    settings = train_config(memory="int3", epochs=1)
    settings = dataclasses.replace(
        settings, optimizer=dataclasses.replace(settings.optimizer, optimizer=optimizer)
    )
    data = rows()
    model = build(settings, DATA, select("cpu"))
    summary = train(settings, DATA, data, tmp_path / "run")
    assert summary["embedding_bytes"] == 24 + 4  # of 40 weights, in a group of 64
    loaded, *_ = checkpoint.load_model(tmp_path / "run", "cpu")
    assert (loaded.embedding.memory != model.embedding.memory).any()
    np.testing.assert_array_equal(loaded.embedding.memory, requantised(loaded.embedding))
    new = converted_config(settings, DATA, "int3", None, None)
    found = convert(tmp_path / "run", new, tmp_path / "kept")
    assert found["largest_error"] == 0
    kept, *_ = checkpoint.load_model(tmp_path / "kept", "cpu")
    assert kept.embedding.memory.tobytes() == loaded.embedding.memory.tobytes()
    for one in (loaded, kept):
        label, logits = predict(one, data["test"])
        np.testing.assert_array_equal(logits, predict(loaded, data["test"])[1])
        assert metrics.summary(label, logits) == summary["test"]
    size = (checkpoint.latest(tmp_path / "kept") / checkpoint.WEIGHTS).stat().st_size
    arrays = sum(array.nbytes for array in kept.state().values())
    assert "embedding.master" not in kept.state()
    assert 0 < size - arrays < 2000  # what names the arrays
    with pytest.raises(ConfigError, match="stored in int3 already"):
        converted_config(new, DATA, "int3", None, None)


def test_fp16_of_tables_alone_is_not_trained():
    for method in METHODS:
        require_trainable(embedding_settings(method=method, memory="int1", **METHODS[method]))
    with pytest.raises(ConfigError, match="--memory fp16 of --method hashing is for inference"):
        require_trainable(embedding_settings(method="hashing", memory="fp16"))
