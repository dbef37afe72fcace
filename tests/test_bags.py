"""Bags: features that hold any number of ids, pooled; against EmbeddingBag and models of single ids."""

import dataclasses
from typing import get_args

import numpy as np
import pytest
from conftest import EVERY, VERSIONS, each_version, needs_simulator, resolved
from recorder import recording

import robe
from data_pipeline import schema
from robe import checkpoint
from robe.backend import select
from robe.bags import Bags, cut, modes
from robe.checkpoint import Position
from robe.config import ConfigError, DataSpec, Pooling
from robe.embeddings import create
from robe.errors import ArrayError
from robe.interaction import Interaction
from robe.kernels.pool import POOLINGS
from robe.model import build
from robe.plan import plan
from robe.train import fed

CARDINALITIES = (60, 3, 11)
DATA = DataSpec(2, CARDINALITIES, "dictionary", "", "test")
POOLED = dataclasses.replace(DATA, pooling=("sum", "mean", "max"))
WIDTH, B, F = 8, 6, len(CARDINALITIES)
# Several features of each size, so that parts of a method have more than one.
TABLES = DataSpec(2, (60, 3, 60, 11, 60, 11), "dictionary", "", "test")
SIZES = {"weights": 600}
METHODS = {
    "robe": {"method": "robe", "block": 3, **SIZES},
    "robe, hash of the published code": {"method": "robe", "hash": "affine", "sign": False, **SIZES},
    "robe, fp16": {"method": "robe", "memory": "fp16", **SIZES},
    "robe, int3": {"method": "robe", "memory": "int3", **SIZES},
    "robe, int8 alone": {"method": "robe", "memory": "int8", "master": "none", **SIZES},
    "full": {"method": "full"},
    "hashing": {"method": "hashing", **SIZES},
    "frequency": {"method": "frequency", **SIZES},
    "compositional": {"method": "compositional", "chunks": 2, **SIZES},
    "hot": {"method": "hot", "block": 4, **SIZES},
    "hot, online": {"method": "hot", "block": 4, "online": True, "weights": 1200},
    "cafe": {"method": "cafe", "weights": 700, "hot_share": 0.6},
    "adaembed": {"method": "adaembed", "weights": 700},
    "mixed_precision": {"method": "mixed_precision", "cache": 0.5},
    "mixed_precision, no cache": {"method": "mixed_precision", "cache": 0.0, "bits": 4},
    "quotient_remainder": {"method": "quotient_remainder", **SIZES},
    "tensor_train": {"method": "tensor_train", **SIZES},
    "mixed_dimension": {"method": "mixed_dimension", **SIZES},
    "cce": {"method": "cce", **SIZES},
}
# Whose vectors are products of matrices, which add up in another order for single rows.
BY_MATMUL = {"tensor_train", "mixed_dimension"}
# Each by the reference; and where other kernels see tokens for ids, compiled or in the simulator.
COMPILED = ("robe", "hot, online", "mixed_precision")
RUNS = [(method, name) for name in EVERY for method in (METHODS if name == "reference" else COMPILED)]


def settings(method, optimizer="adagrad", **others):
    model = {"width": WIDTH, "bottom": (5,), "top": (6,)}
    return resolved(model, METHODS[method], {"optimizer": optimizer, "lr": 0.1}, batch=B, **others)


def draw_ids(rng, cardinalities=CARDINALITIES):
    return np.stack([rng.integers(0, n, B) for n in cardinalities], axis=1).astype(np.uint32)


def draw_bags(rng, weighted=True, rows=B):
    """Bags of 0 to 3 ids, with weights but for the features that are pooled by max."""
    lengths = rng.integers(0, 4, rows * F)
    lengths[:3], lengths[3:6] = 2, 0
    of = np.arange(rows * F).repeat(lengths) % F
    values = (rng.integers(0, 1000, len(of)) % np.array(CARDINALITIES)[of]).astype(np.uint32)
    weights = np.where(of == 2, 1, rng.uniform(-1, 2, len(of))).astype(np.float32)
    return Bags(values, np.cumsum((0, *lengths)), weights if weighted else None)


def of_one_id(ids):
    """Bags that hold what ids (B, F) name."""
    return Bags(ids.ravel(), np.arange(ids.size + 1), None)


def batch(rng, dtype="float32"):
    return rng.integers(0, 2, B).astype(dtype), rng.standard_normal((B, 2)).astype(dtype)


def embedding_bag(rows, bags, pooling):
    """Vectors (B, F, D) of rows (N, D) by the formulas of torch.nn.EmbeddingBag, and what makes a gradient by
    the rows of one by the vectors."""
    n, width = rows.shape
    weights = np.ones(n) if bags.weights is None or not len(bags.weights) else bags.weights.astype(float)
    vectors, count = np.zeros((len(bags.offsets) - 1, width)), len(pooling)
    share = np.zeros((len(vectors), n, width))  # of each element of each row in its vector
    for k, (first, last) in enumerate(zip(bags.offsets[:-1], bags.offsets[1:], strict=True)):
        if first == last:
            continue
        if pooling[k % count] == "max":
            for i in range(width):
                share[k, first + int(rows[first:last, i].argmax()), i] = 1
        else:
            over = last - first if pooling[k % count] == "mean" else 1
            share[k, first:last] = weights[first:last, None] / over
    vectors = np.einsum("kni,ni->ki", share, rows)
    return vectors.reshape(-1, count, width), lambda d: np.einsum("kni,ki->ni", share, d.reshape(-1, width))


def test_all_sides_pool_alike():
    """The kernels number what settings and schemas name, which do without each other."""
    assert get_args(Pooling) == get_args(schema.Pooling) == POOLINGS


@pytest.mark.kernels
@pytest.mark.parametrize("weighted", [True, False])
@each_version("pool")
def test_pooling_is_that_of_embedding_bag(run, weighted, rng):
    bags = draw_bags(rng, weighted)
    rows = rng.standard_normal((len(bags.values), WIDTH)).astype(np.float32)
    wide = np.full((B, 1 + F, WIDTH), np.nan, np.float32)
    weights = bags.weights if weighted else np.empty(0, np.float32)
    run(rows, bags.offsets, weights, modes(POOLED.pooling), wide[:, 1:])
    expected = embedding_bag(rows, bags, POOLED.pooling)[0]
    np.testing.assert_allclose(wide[:, 1:], expected, rtol=1e-6, atol=1e-6)  # sums of up to three numbers
    assert np.isnan(wide[:, 0]).all()
    assert not wide[1, 1:].any()  # whose bags are empty


@pytest.mark.kernels
@pytest.mark.parametrize("weighted", [True, False])
@each_version("pool_backward")
def test_the_gradient_is_the_adjoint(run, weighted, rng):
    """<d, pool(x)> = <pool_backward(d), x> for sums and means; and each number by EmbeddingBag's formulas."""
    bags = draw_bags(rng, weighted)
    rows, d = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((len(bags.values), WIDTH), (B, 1 + F, WIDTH))
    )
    d_rows, weights = np.full_like(rows, np.nan), bags.weights if weighted else np.empty(0, np.float32)
    run(d[:, 1:], rows, bags.offsets, weights, modes(POOLED.pooling), d_rows)
    vectors, gradient = embedding_bag(rows, bags, POOLED.pooling)
    np.testing.assert_allclose(d_rows, gradient(d[:, 1:]), rtol=1e-6)
    np.testing.assert_allclose((d_rows * rows).sum(), (d[:, 1:] * vectors).sum(), rtol=1e-5)


@pytest.mark.kernels
@each_version("pool_backward")
def test_of_equal_largest_rows_the_first_gets_the_gradient(run):
    rows = np.float32([[1, 5], [3, 5], [3, 2]])
    d_rows = np.full_like(rows, np.nan)
    run(np.float32([[[7, 9]]]), rows, np.array([0, 3]), np.empty(0, np.float32), modes(("max",)), d_rows)
    np.testing.assert_array_equal(d_rows, [[0, 9], [7, 0], [0, 0]])


@pytest.mark.kernels
@pytest.mark.parametrize(("method", "name"), RUNS)
def test_a_look_up_by_features_is_that_of_whole_rows(method, name, rng):
    """Of ids in any order, each with its feature; and bags of one id are stepped as whole rows are."""
    backend, features = select(name), len(TABLES.cardinalities)
    whole, single = (create(settings(method), TABLES, backend) for _ in range(2))
    exact = name != "cuda" and method not in BY_MATMUL  # there sums are atomic, in no fixed order
    for _ in range(3):
        ids = draw_ids(rng, TABLES.cardinalities)
        vectors = np.full((B, features, WIDTH), np.nan, np.float32)
        whole.lookup(ids, vectors)
        order = rng.permutation(B * features)
        found = np.full((B * features, 1, WIDTH), np.nan, np.float32)
        whole.lookup(ids.reshape(-1, 1)[order], found, order % features)
        # Products of another shape may add up in another order.
        np.testing.assert_allclose(found[:, 0], vectors.reshape(-1, WIDTH)[order], rtol=0 if exact else 1e-5)
        gradient = rng.standard_normal((B, features, WIDTH)).astype(np.float32)
        whole.update(ids, gradient, 0.1)
        single.update(
            ids.reshape(-1, 1), gradient.reshape(-1, 1, WIDTH), 0.1, np.arange(B * features) % features
        )
        for key, array in whole.state().items():
            np.testing.assert_allclose(
                single.state()[key], array, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5, err_msg=key
            )
    assert single.steps == 3
    assert single.counts() == whole.counts()


@pytest.mark.kernels
@pytest.mark.parametrize(("method", "name"), RUNS)
def test_scratch_grows_with_the_bags_and_none_may_hold_an_id(method, name, rng):
    embedding = create(settings(method), TABLES, select(name))
    for count in (5 * B * len(TABLES.cardinalities), 0):
        features = np.arange(count) % len(TABLES.cardinalities)
        ids = rng.integers(0, np.array(TABLES.cardinalities)[features], count).astype(np.uint32)[:, None]
        gradient = rng.standard_normal((count, 1, WIDTH)).astype(np.float32)
        before = {key: array.copy() for key, array in embedding.state().items()}
        embedding.update(ids, gradient, 0.1, features)
        embedding.lookup(ids, gradient, features)
        changed = any((before[key] != array).any() for key, array in embedding.state().items())
        assert changed == (count > 0)
    assert embedding.steps == 2


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradient_of_every_parameter(pooling, rng):
    """float64 central differences of the mean loss, with weights and empty bags."""
    data = dataclasses.replace(DATA, pooling=(pooling, "sum", pooling))
    config = settings("robe", "sgd")
    config = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, weights=40))
    model = build(config, data, select("reference"), "float64")
    (label, dense), bags = batch(rng, "float64"), draw_bags(rng, weighted=pooling != "max")

    def loss():
        return float(model.backward(model.forward(dense, bags), label, bags, 0.0).mean())

    loss()
    layer, embedding = model.interaction, model.embedding
    d_memory, count = np.zeros_like(embedding.memory), len(bags.values)
    slots = embedding.slots(bags.values[:, None], bags.features(F))
    model.backend.kernels.scatter_add(layer.looked_up[1, :count, None], *slots, 1, d_memory)
    gradients = {key: gradient.copy() for key, gradient in model.gradients.items()}
    gradients["embedding.memory"] = d_memory
    for parameter, gradient in gradients.items():
        array, numeric = model.state()[parameter].reshape(-1), np.empty(gradient.size)
        for i in range(array.size):
            kept, losses = array[i], []
            for moved in (1e-6, -1e-6):
                array[i] = kept + moved
                losses.append(loss())
            array[i], numeric[i] = kept, (losses[0] - losses[1]) / 2e-6
        # Round-off of the losses (1e-16) over the step (1e-6); no rectifier, no maximum switches within it.
        np.testing.assert_allclose(gradient.ravel(), numeric, rtol=1e-6, atol=1e-8, err_msg=parameter)
    assert np.count_nonzero(d_memory) > 30


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_of_bags_of_one_id_is_that_of_single_ids(version, optimizer):
    for method in ("robe", "full", "quotient_remainder"):
        config, backend, rng = settings(method, optimizer), select(version), np.random.default_rng(0)
        single, pooled = (build(config, data, backend) for data in (DATA, POOLED))
        for _ in range(3):
            (label, dense), ids = batch(rng), draw_ids(rng)
            # float32 sums, on a GPU in no fixed order.
            exact = {"rtol": 0} if version == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
            found = pooled.predict(dense, of_one_id(ids)).copy()
            np.testing.assert_allclose(found, single.predict(dense, ids), **exact)
            losses = pooled.step(label, dense, of_one_id(ids), 0.1).copy()
            np.testing.assert_allclose(losses, single.step(label, dense, ids, 0.1), **exact)
        for name, array in single.state().items():
            np.testing.assert_allclose(pooled.state()[name], array, err_msg=name, **exact)


@pytest.mark.kernels
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("version", VERSIONS)
def test_steps_are_those_of_embedding_bag(version, optimizer, rng):
    """Three steps of a table by NumPy: rows that no bag of the batch holds stay as they are."""
    config, backend = settings("full", optimizer), select(version)
    embedding = create(config, DATA, backend)
    layer = Interaction(embedding, B, backend, pooling=POOLED.pooling)
    table = embedding.memory.reshape(-1, WIDTH).astype(np.float64)
    accumulator, mean, square = (np.zeros_like(table) for _ in range(3))
    first = np.cumsum((0, *CARDINALITIES))[:F]
    for step in (1, 2, 3):
        bags, d = draw_bags(rng), rng.standard_normal((B, 1 + F, WIDTH)).astype(np.float32)
        rows = first[bags.features(F)] + bags.values
        vectors, gradient = embedding_bag(table[rows], bags, POOLED.pooling)
        np.testing.assert_allclose(layer.look_up(bags)[:, 1:], vectors, rtol=1e-4, atol=1e-6)
        layer.update(bags, d, 0.1)
        g = np.zeros_like(table)
        np.add.at(g, rows, gradient(d[:, 1:]))
        touched = g != 0  # a row of a maximum has elements without a gradient
        if optimizer == "sgd":
            table -= 0.1 * g
        elif optimizer == "adagrad":
            accumulator += g**2
            table -= 0.1 * g / (np.sqrt(accumulator) + config.optimizer.eps)
        else:
            beta1, beta2 = config.optimizer.beta1, config.optimizer.beta2
            mean = np.where(touched, beta1 * mean + (1 - beta1) * g, mean)
            square = np.where(touched, beta2 * square + (1 - beta2) * g**2, square)
            root = np.sqrt(square / (1 - beta2**step)) + config.optimizer.eps
            table -= np.where(touched, 0.1 * mean / (1 - beta1**step) / root, 0)
        # float32 sums of some rows, whose steps are of 0.1.
        np.testing.assert_allclose(embedding.memory.reshape(-1, WIDTH), table, rtol=1e-4, atol=1e-5)


def test_the_order_in_a_bag_is_of_no_account_and_an_id_given_twice_counts_twice():
    model = build(settings("robe"), dataclasses.replace(DATA, pooling=("sum", "sum", "mean")), select("cpu"))
    dense = np.zeros((1, 2), np.float32)

    def logit(values, lengths, weights=None):
        offsets = np.cumsum((0, *lengths))
        weights = None if weights is None else np.float32(weights)
        return float(model.predict(dense, (np.array(values, np.uint32), offsets, weights))[0])

    one = logit([5, 17, 2, 4, 9], (2, 1, 2))
    assert logit([17, 5, 2, 9, 4], (2, 1, 2)) == pytest.approx(one, rel=1e-6)
    twice = logit([5, 17, 5, 2, 4, 9, 9], (3, 1, 3))
    assert twice == pytest.approx(logit([5, 17, 2, 4, 9], (2, 1, 2), [2, 1, 1, 2 / 3, 4 / 3]), rel=1e-6)
    assert abs(twice - one) > 1e-4
    # The mean is over the number of ids: half of the weights is half of it.
    assert logit([1, 4, 9], (1, 0, 2), [1, 0.5, 0.5]) != pytest.approx(logit([1, 4, 9], (1, 0, 2)), rel=1e-4)


def test_what_are_no_bags_is_refused_in_one_line(rng):
    model, good = build(settings("full"), POOLED, select("cpu")), draw_bags(rng)
    _, dense = batch(rng)
    cases = {
        "ids: must be bags": draw_ids(rng),
        "values of the bags: hold int64": good._replace(values=good.values.astype(np.int64)),
        "offsets of the bags: have shape": good._replace(offsets=good.offsets[1:]),
        "weights of the bags: have shape": good._replace(weights=good.weights[1:]),
        "weights of the bags: hold float64": good._replace(weights=good.weights.astype(float)),
    }
    for words, bags in cases.items():
        with pytest.raises(ArrayError, match=words):
            model.predict(dense, bags)
    offsets, heavy = good.offsets.copy(), good.weights.copy()
    offsets[1:3] = offsets[2:0:-1]
    heavy[good.features(F) == 2] = 2
    cases |= {
        "never fall": good._replace(offsets=offsets),
        "must go from 0 to": good._replace(offsets=good.offsets + 1),
        "where a feature is pooled by max, as 2 is": good._replace(weights=heavy),
        "weights of the bags: must be finite": good._replace(weights=good.weights * np.float32("nan")),
    }
    for words, bags in cases.items():
        with pytest.raises(ArrayError, match=words):
            model.checked(bags, B)
    with pytest.raises(ConfigError, match="feature 1 has 3 rows, but an id of the data is 3"):
        model.checked(good._replace(values=np.where(good.features(F) == 1, 3, 0).astype(np.uint32)), B)
    with pytest.raises(ArrayError, match="one id a feature"):
        build(settings("full"), DATA, select("cpu")).predict(dense, good)
    with pytest.raises(ConfigError, match="2 ways of pooling for 3 features"):
        dataclasses.replace(DATA, pooling=("sum", "max"))


def test_a_checkpoint_tells_how_it_pools(tmp_path, rng):
    config = settings("robe")
    for data in (POOLED, DATA):
        model = build(config, data, select("cpu"))
        folder = checkpoint.save(tmp_path / str(data.pooling), model, config, data, Position())
        _, _, found, _ = checkpoint.load_model(folder.parents[1], "cpu")
        assert found == data
        assert ('"pooling"' in (folder / "state.json").read_text()) == (data is POOLED)
    (_, dense), bags = batch(rng), draw_bags(rng)
    model = checkpoint.load_model(tmp_path / str(POOLED.pooling), "cpu")[0]
    found = build(config, POOLED, select("cpu")).predict(dense, bags)
    np.testing.assert_array_equal(model.predict(dense, bags), found)


def test_a_baseline_without_features_takes_no_bags(rng):
    config = resolved({"width": 4, "bottom": (3,), "top": (3,)}, {"method": "none"}, batch=B)
    model = build(config, POOLED, select("cpu"))
    label, dense = batch(rng)
    ((_, arrays),) = fed(model, ((None, part) for part in [(label, dense, draw_bags(rng))]), B)
    assert arrays[-1].shape == (B, 0)
    assert np.isfinite(model.step(*arrays, 0.1)).all()


def some_bags(rng, rows, cardinalities):
    """Bags of 0 to 4 ids for each of two features."""
    lengths = rng.integers(0, 5, rows * 2)
    of = np.arange(rows * 2).repeat(lengths) % 2
    return rng.integers(0, np.array(cardinalities)[of]), np.cumsum((0, *lengths))


def test_a_model_of_ones_own_arrays_takes_bags(tmp_path, rng):
    """It learns what one of the ids in a bag tells, and predicts in parts what it predicts row by row."""
    cardinalities = 40, 9
    chosen = {"method": "full", "lr": 0.1, "bottom": (4,), "top": (8,), "width": 4}
    model = robe.DLRM(cardinalities, dense=1, pooling=("sum", "mean"), **chosen)
    values, offsets = some_bags(rng, 2100, cardinalities)
    dense = np.zeros((2100, 1), np.float32)
    bags = values, offsets, rng.uniform(0.5, 1, len(values))
    of_row = np.split(values, offsets[1:-1])[::2]  # the ids of the first feature
    label = np.array([7 in ids or 11 in ids for ids in of_row])
    model.fit([(label[:600], dense[:600], tuple(cut(bags, 0, 600, 2100)))] * 60)
    assert model.losses[-1] < 0.5 * model.losses[0]
    found = model.predict(dense, bags)
    assert found[label].mean() > found[~label].mean() + 0.3
    for b in (0, 599, 2047, 2048, 2099):  # where parts of an evaluation begin and end
        (alone,) = model.predict(dense[b : b + 1], tuple(cut(bags, b, b + 1, 2100)))
        assert alone == pytest.approx(found[b], rel=1e-5)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(robe.DLRM.load(tmp_path / "model").predict(dense, bags), found)
    same = robe.DLRM(cardinalities, dense=1, pooling="sum", **chosen)
    assert same.data.pooling == ("sum", "sum")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], "ids: must be bags"),
        (([1, 2], [0, 1]), r"offsets of the bags: has shape \(2,\), but must have \(3,\)"),
        (
            ([1, 9], [0, 1, 2]),
            "values of the bags, number 1: is 9, but those of feature 1 must be from 0 to 8",
        ),
        (([-1, 2], [0, 1, 2]), "values of the bags, number 0: is -1, but those of feature 0"),
        (([1.0, 2.0], [0, 1, 2]), "values of the bags: holds float64, but must hold integers"),
        (([1, 2], [0, 2, 1]), "offsets of the bags: must go from 0 to 2, the number of ids, and never fall"),
        (([1, 2], [0, 1, 2], [1]), "weights of the bags: has shape"),
        (([1, 2], [0, 1, 2], [1, np.inf]), "weights of the bags: must be finite"),
        (
            ([1, 2], [0, 1, 2], [1, 2]),
            "weights of the bags: must be 1 where a feature is pooled by max, as 1 is",
        ),
    ],
)
def test_bad_bags_are_refused_before_a_kernel_sees_them(ids, message):
    chosen = {"method": "full", "bottom": (2,), "top": (2,), "width": 2}
    model = robe.DLRM((40, 9), dense=1, pooling=("sum", "max"), **chosen)
    with pytest.raises(ArrayError, match=message):
        model.predict([[0.0]], ids)


def test_ways_of_pooling_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="pooling must be of sum, mean, max, not 'min'"):
        robe.DLRM((40, 9), dense=1, pooling="min")
    with pytest.raises(ConfigError, match="1 ways of pooling for 2 features"):
        robe.DLRM((40, 9), dense=1, pooling=("sum",))


def test_a_plan_counts_the_rows_of_bags(rng):
    """As if each held one id; and of a GPU neither graphs nor sums for vectors that are looked up again."""
    config = settings("robe", "sgd", backend="cuda")
    planned, single = (plan(config, data, 1)["memory"] for data in (POOLED, DATA))
    model = build(settings("robe", "sgd"), POOLED, select("reference"))
    model.predict(np.zeros((model.rows, 2), np.float32), of_one_id(np.zeros((model.rows, F), np.uint32)))
    item = "rows of bags and their gradients, of one id each"
    assert planned.pop(item) == model.interaction.looked_up.nbytes
    assert single.pop("batches of CUDA graphs") > 0
    assert planned == single


@pytest.mark.kernels
@needs_simulator
def test_batches_of_bags_are_no_graphs(monkeypatch):
    """Where a batch has the shapes of the one before, too."""
    losses = []
    for backend in recording(monkeypatch):
        model, rng = build(settings("robe", "adam"), POOLED, backend), np.random.default_rng(1)
        bags = draw_bags(rng)
        for _ in range(4):
            label, dense = batch(rng)
            values = rng.integers(0, 3, len(bags.values)).astype(np.uint32)
            losses.append(np.array(model.step(label, dense, bags._replace(values=values), 0.1)))
            losses.append(np.array(model.predict(dense, bags)))
        assert not model.graphs.replayed
        assert model.embedding.steps == 4
    np.testing.assert_allclose(losses[:8], losses[8:], rtol=1e-4, atol=1e-5)  # sums are atomic
