"""Training of codes alone: what a step makes of a group; that it repeats, resumes, and takes few bytes."""

import dataclasses

import numba
import numpy as np
import pytest
from conftest import each_version, needs_simulator
from test_convert import METHODS
from test_embeddings import HASHED, NUMBERED
from test_embeddings import settings as embedding_settings
from test_train import DATA, Stopped, rows, stopping, train, weights_of
from test_train import config as train_config

from robe import checkpoint
from robe.backend import select
from robe.config import METHODS as ALL_METHODS
from robe.config import ConfigError, OptimizerConfig
from robe.convert import convert, converted_config
from robe.embeddings import create
from robe.kernels.code_step import code_step_cpu
from robe.kernels.operations import version
from robe.kernels.parts.codes import Form, row_bytes
from robe.kernels.parts.groups import expanded, group_length
from robe.kernels.parts.half import rounding_key
from robe.kernels.parts.hashing import slot_map, slots_reference
from robe.kernels.workbench.cases import CASES, calls
from robe.optim import RULES, Rule
from robe.plan import plan
from robe.report import plan_text
from robe.train import predict

LEAN = [name for name in METHODS if "master" in ALL_METHODS[name].options]


@pytest.mark.kernels
@each_version("code_step")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_touched_groups_go_where_their_gradients_lead(case, run):
    """The same bits in all versions; each weight to within a scale of its step, and no other group."""
    call = calls(case)["code_step"]
    expected, found = call.copy(), call.copy()
    version("code_step", "reference")(*expected.values())
    run(*found.values())
    for name in call.outputs:
        assert found[name].tobytes() == expected[name].tobytes(), name
    form, before = (
        call.arguments["form"],
        expanded(call.arguments["memory"], slice(None), call.arguments["form"]),
    )
    slots, signs = slots_reference(case.slot_map(), case.base() + case.draw_ids().astype(np.uint64))
    gradient = np.zeros(before.size)
    np.add.at(gradient, slots, call.arguments["d_vectors"] * signs)
    gradient = gradient.reshape(before.shape)
    touched = np.isin(np.arange(len(before)), slots // int(group_length(case.slot_map())))
    step = 0.125 * gradient
    if case.rows % 2:
        sums = 1 + (gradient**2).mean(1)
        np.testing.assert_allclose(found["accumulator"], sums, rtol=1e-6)
        step /= np.sqrt(sums)[:, None]
    after = expanded(found["memory"], slice(None), form)
    scale = found["memory"][:, -4:-2].copy().view(np.float16).astype(float)
    assert (abs(before - step - after)[touched] < scale[touched] + 1e-5).all()
    np.testing.assert_array_equal(found["memory"][~touched], call.arguments["memory"][~touched])


def a_table(count, form, codes, scale=2.0**-6, bias=-1.5):
    """`count` rows of these codes (D,)."""
    table = np.zeros((count, row_bytes(form)), np.uint8)
    codes = np.asarray(codes, np.uint8)
    table[:, : row_bytes(form) - 4] = codes if form.bits == 8 else codes[::2] | codes[1::2] << 4
    table[:, -4:] = np.array([scale, bias], np.float16).view(np.uint8)
    return table


def stepped(table, form, gradient, rate=1.0, accumulator=(), key=0, run=code_step_cpu):
    """The table after one step, each row by the same gradient (D,) or by its own (count, D)."""
    count, where = len(table), slot_map("table", form.width, 1, len(table) * form.width, signed=False)
    ids, base, sums = (
        np.arange(count, dtype=np.uint32)[:, None],
        np.zeros(1, np.uint64),
        np.float32(accumulator),
    )
    gradient = np.ascontiguousarray(np.broadcast_to(np.float32(gradient), (count, form.width)))[:, None]
    after = table.copy()
    run(gradient, ids, base, where, rate, 1e-8, rounding_key(key, 1), form, sums, after)
    return after


@pytest.mark.parametrize("bits", [8, 4])
def test_what_no_gradient_moves_stays_as_it_is(bits):
    """However often it is stored again, and while other weights of its group are rounded at random."""
    form, levels = Form(bits, True, 16), 2**bits - 1
    codes = np.round(np.linspace(0, levels, 16))
    table = a_table(500, form, codes, scale=0.1, bias=-0.7)  # no product of these is exact
    after = table
    for key in range(20):
        after = stepped(after, form, np.zeros(16), key=key)
    np.testing.assert_array_equal(after, table)
    gradient = np.zeros(16)
    gradient[7] = 0.03
    moved = stepped(table, form, gradient)
    changed = np.flatnonzero(
        (expanded(moved, slice(None), form) != expanded(table, slice(None), form)).any(0)
    )
    np.testing.assert_array_equal(changed, [7])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("share", [1 / 16, 7 / 16, 3 / 4])
def test_steps_smaller_than_a_scale_are_right_on_average(bits, share):
    """The outer weights stay, so the scale does; a weight moves by a code with the chance of its share."""
    form, count, grid = Form(bits, True, 16), 20_000, 2.0**-6
    codes = np.full(16, 7)
    codes[[0, -1]] = 0, 2**bits - 1
    gradient = np.full(16, share * grid)
    gradient[[0, -1]] = 0
    table = a_table(count, form, codes)
    moved = (
        expanded(table, slice(None), form) - expanded(stepped(table, form, gradient), slice(None), form)
    ) / grid
    assert set(np.unique(moved)) == {0, 1}
    assert not moved[:, [0, -1]].any()
    middle = moved[:, 1:-1]
    error = np.sqrt(share * (1 - share) / middle.size)
    assert abs(middle.mean() - share) < 5 * error
    # No two weights, and no two steps, are rounded by the same draw.
    assert abs(np.corrcoef(middle.T) - np.eye(14)).max() < 5 / np.sqrt(count)
    other = expanded(stepped(table, form, gradient, key=1), slice(None), form)
    other = (expanded(table, slice(None), form) - other)[:, 1:-1] / grid
    assert abs(np.corrcoef(other.ravel(), middle.ravel())[0, 1]) < 5 / np.sqrt(middle.size)
    nearest = expanded(stepped(table, form._replace(stochastic=False), gradient), slice(None), form)
    lost = (expanded(table, slice(None), form) - nearest)[:, 1:-1] / grid
    assert (lost == round(share)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("reach", [4.0, 0.1], ids=["grows", "shrinks"])
def test_scales_follow_the_weights(bits, reach):
    """The new scale is as small as the new range allows, with its margin; all are right on average."""
    form, count, levels = Form(bits, True, 16), 20_000, 2**bits - 1
    codes = np.round(np.linspace(0, levels, 16))
    table = a_table(count, form, codes)
    before = expanded(table, slice(None), form)[0].astype(float)
    wanted = before * reach
    after = stepped(table, form, before - wanted)
    scale = float(after[0, -4:-2].copy().view(np.float16)[0])
    assert scale == pytest.approx((wanted.max() - wanted.min()) * 15 / 13 / levels, rel=0.01)
    read = expanded(after, slice(None), form)
    assert abs(read - wanted).max() < scale
    assert (abs(read.mean(0, dtype=float) - wanted) < 5 * scale / 2 / np.sqrt(count) + 1e-6).all()
    # From there on it stays, while a weight at the end wanders by less than the margin, one code or 17.
    gradient = np.zeros(16)
    gradient[0] = 0.3 * scale
    again = after
    for key in range(1 if bits == 4 else 10):
        again = stepped(again, form, gradient, key=key)
    assert (again[:, -4:] == after[:, -4:]).all(1).mean() > 0.95
    assert (again[:, 0] != after[:, 0]).any()


def test_adagrad_counts_by_group():
    form, rng = Form(8, True, 16), np.random.default_rng(0)
    table = a_table(50, form, np.linspace(0, 255, 16).astype(int))
    gradient, sums = rng.standard_normal((50, 16)).astype(np.float32), np.full(50, 0.5, np.float32)
    kept = sums.copy()
    count, where = 50, slot_map("table", 16, 1, 800, signed=False)
    ids, base, after = np.arange(count, dtype=np.uint32)[:, None], np.zeros(1, np.uint64), table.copy()
    code_step_cpu(gradient[:, None], ids, base, where, 0.1, 1e-8, rounding_key(0, 1), form, kept, after)
    np.testing.assert_allclose(kept, sums + (gradient**2).mean(1), rtol=1e-6)
    step = 0.1 * gradient / np.sqrt(kept)[:, None]
    scale = after[:, -4:-2].copy().view(np.float16).astype(float)
    moved = expanded(table, slice(None), form) - expanded(after, slice(None), form)
    assert (abs(moved - step) < scale).all()
    assert abs(step).max() > 5 * scale.max()


def test_codes_do_not_depend_on_the_number_of_threads():
    """Nor do sums of gradients that no order adds up to the same bits."""
    case = next(c for c in CASES if c.memory_type == "int8")._replace(rows=3000, memory=200_000)
    call, available, states = calls(case)["code_step"], numba.get_num_threads(), set()
    d_vectors = np.random.default_rng(0).standard_normal(call.arguments["d_vectors"].shape).astype(np.float32)
    try:
        for threads in range(1, available + 1):
            numba.set_num_threads(threads)
            found = call.copy() | {"d_vectors": d_vectors}
            code_step_cpu(*found.values())
            states.add(found["memory"].tobytes())
    finally:
        numba.set_num_threads(available)
    assert len(states) == 1
    assert (found["memory"] != call.arguments["memory"]).mean() > 0.3
    expected = call.copy() | {"d_vectors": d_vectors}
    version("code_step", "reference")(*expected.values())
    assert (found["memory"] == expected["memory"]).mean() > 0.999  # sums of squares have another order


def test_a_group_that_is_no_longer_finite_reads_as_such():
    form = Form(4, True, 16)
    table = a_table(3, form, np.arange(16))
    gradient = np.zeros((3, 16), np.float32)
    gradient[1, 5] = np.inf
    read = expanded(stepped(table, form, gradient), slice(None), form)
    assert np.isnan(read[1]).all()
    np.testing.assert_array_equal(read[[0, 2]], expanded(table[[0, 2]], slice(None), form))


def settings(optimizer="sgd", method="robe", memory="int8", **changes):
    return embedding_settings(
        optimizer, method=method, memory=memory, master="none", **METHODS[method], **changes
    )


@pytest.mark.parametrize("method", LEAN)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("memory", ["int8", "int4"])
def test_an_embedding_learns_and_its_plan_is_what_it_takes(memory, optimizer, method, rng):
    config = settings(optimizer, method, memory)
    embedding, ids = create(config, NUMBERED, select("cpu")), np.array([[5, 5, 5]], np.uint32)
    floats = create(embedding_settings(optimizer, method=method, **METHODS[method]), NUMBERED, select("cpu"))
    assert embedding.memory.nbytes == embedding.describe()["embedding_bytes"]
    start = embedding.read(0, embedding.weights)
    assert abs(start - floats.memory).max() < 0.07 * abs(floats.memory).max()  # half a scale of 4 bits
    wanted, found = rng.standard_normal((1, 3, 8)).astype(np.float32), np.empty((1, 3, 8), np.float32)
    for _ in range(300):
        embedding.lookup(ids, found)
        embedding.update(ids, found - wanted, 0.2)
    assert abs(found - wanted).mean() < 0.2
    planned, bytes_of = plan(config, NUMBERED, 1)["memory"], embedding.bytes()
    assert {item: planned[item] for item in bytes_of} == bytes_of
    # In bytes of training, and besides what all methods take for a batch.
    width = int(group_length(embedding.slot_map))
    groups = -(-embedding.weights // width)
    codes = width if memory == "int8" else (width + 1) // 2
    assert sum(bytes_of.values()) == groups * (codes + 4 + 4 * (optimizer == "adagrad"))
    assert sum(bytes_of.values()) <= sum(floats.bytes().values()) / (2 if optimizer == "sgd" else 4)
    assert "convert" not in plan_text(plan(config, NUMBERED, 1), config, NUMBERED)


@pytest.mark.kernels
def test_all_backends_train_the_same_codes_alone(backend, reference, rng):
    ids = rng.integers(0, NUMBERED.cardinalities, (2, 3)).astype(np.uint32)
    gradient = rng.integers(-4, 5, (2, 3, 8)).astype(np.float32)
    for optimizer in ("sgd", "adagrad"):
        one, other = (create(settings(optimizer), NUMBERED, each) for each in (backend, reference))
        before = one.memory.copy()
        for each in (one, other):
            each.update(ids, gradient, 0.125)
        np.testing.assert_array_equal(one.memory, other.memory)
        assert (one.memory != before).any()


def test_seeds_steps_and_rounding_change_the_codes():
    def updated(seed=0, steps=0, **changes):
        embedding = create(dataclasses.replace(settings(**changes), seed=seed), HASHED, select("cpu"))
        embedding.memory[:, :-4], embedding.steps = 100, steps
        embedding.memory[:, 0], embedding.memory[:, 1] = 0, 255
        embedding.update(np.zeros((1, 3), np.uint32), np.full((1, 3, 8), 3e-4, np.float32), 1.0)
        assert embedding.steps == steps + 1
        return embedding.memory.tobytes()

    assert updated() == updated()
    assert len({updated(), updated(1), updated(0, 1), updated(rounding="nearest")}) == 4


def test_a_pass_begins_anew():
    config = settings("adagrad", "full")
    embedding, fresh = (create(config, NUMBERED, select("cpu")) for _ in range(2))
    embedding.update(np.zeros((1, 3), np.uint32), np.ones((1, 3, 8), np.float32), 0.1)
    assert (embedding.memory != fresh.memory).any()
    assert embedding.accumulator.any()
    embedding.begin(0)
    np.testing.assert_array_equal(embedding.memory, fresh.memory)
    assert not embedding.accumulator.any()


def lean(optimizer="sgd", **changes):
    base = train_config("int8", **changes)
    embedding = dataclasses.replace(base.embedding, master="none")
    return dataclasses.replace(base, embedding=embedding, optimizer=OptimizerConfig(optimizer, 0.1))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("stop", [4, 17])
def test_a_training_goes_on_to_the_same_bytes(stop, optimizer, tmp_path):
    settings = lean(optimizer)
    whole = train(settings, DATA, rows(), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(settings, DATA, rows() | {"train": stopping(stop)}, tmp_path / "part")
    assert train(settings, DATA, rows(), tmp_path / "part")["test"] == whole["test"]
    assert weights_of(tmp_path / "part") == weights_of(tmp_path / "whole")


def test_what_is_kept_are_the_codes(tmp_path):
    data = rows()
    train(lean("adagrad", epochs=1), DATA, data, tmp_path / "run")
    trained, *_ = checkpoint.load_model(tmp_path / "run", "cpu")
    assert set(trained.embedding.state()) == {"embedding.memory", "embedding.accumulator"}
    new = converted_config(lean("adagrad", epochs=1), DATA, "int8", None, None)
    assert convert(tmp_path / "run", new, tmp_path / "kept")["largest_error"] == 0
    kept, *_ = checkpoint.load_model(tmp_path / "kept", "cpu")
    np.testing.assert_array_equal(predict(kept, data["test"])[1], predict(trained, data["test"])[1])
    for to in ("int3", "fp32"):
        new = converted_config(lean("adagrad", epochs=1), DATA, to, None, None)
        convert(tmp_path / "run", new, tmp_path / to)


def test_an_optimizer_that_its_kernel_does_not_know_is_refused(monkeypatch):
    monkeypatch.setitem(RULES, "other", Rule("sgd", "adagrad_step"))
    config = dataclasses.replace(settings(), optimizer=OptimizerConfig("other", 0.1))
    with pytest.raises(ConfigError, match="--master none"):
        create(config, NUMBERED, select("cpu"))


@needs_simulator
def test_what_a_gpu_takes_besides_is_planned(monkeypatch):
    kept = {}
    monkeypatch.setattr("robe.kernels.parts.scratch._kept", kept)
    config = dataclasses.replace(settings(), backend="cuda")
    embedding = create(config, NUMBERED, select("cuda"))
    embedding.update(np.zeros((1, 3), np.uint32), np.ones((1, 3, 8), np.float32), 0.1)
    planned = plan(config, NUMBERED, 1)["memory"]["embedding gradient scratch"]
    assert planned == sum(array.nbytes for array in kept.values())
